# serve_testing.py, version 0.1.0
"""What the tests of the server share: a server in a separate process, a toy app, configs.

    with Server(folder, "run", "serve_config.yaml") as server:
        status, answer = server.wait().ask(body={"text": "Hello world!"})

Each server starts its own Ray on free ports, and removes its processes and temporary files when it
ends. It reads its route from the command.
"""

import ast
import contextlib
import http.client
import importlib.util
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import psutil  # Ray needs it too
import yaml

HERE = Path(__file__).parent
APP = "template_ray_serve.py"
ROUTE = "/toy"  # of the toy

# -- A server --------------------------------------------------------------------------------------

# Start Ray in a separate folder, on free ports; then run the command line `serve`.
START = """
import json, psutil, sys, ray
from ray import serve
from ray.serve.scripts import cli
ray_options = json.loads(sys.argv.pop(1))
http_options = json.loads(sys.argv.pop(1))
for tries_left in (4, 3, 2, 1, 0):
    try:
        ray.init(address="local", namespace="serve", **ray_options)
        break
    except Exception as error:  # Ray gives a node 30 s to start, however slow the machine is
        if "timed out during startup" not in str(error) or not tries_left:
            raise
        begun = psutil.Process().children(recursive=True)
        for process in begun:
            process.kill()
        psutil.wait_procs(begun)
        ray.shutdown()
serve.start(http_options=http_options)
cli()
"""
NOT_PASSED_ON = ("RAY_", "SERVE_", "HF_", "OMP_")  # environment variables of whoever runs the test


def free_port():
    """Return a free port, below the range from which the system assigns ports."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def route_of(folder, arguments):
    """Return the route of `run APP --route-prefix ROUTE` or `run CONFIG`."""
    if "--route-prefix" in arguments:
        return arguments[arguments.index("--route-prefix") + 1]
    if arguments[-1].endswith(".yaml"):
        config = yaml.safe_load(Path(folder, arguments[-1]).read_text("utf-8"))
        return config["applications"][0].get("route_prefix", "/")
    return "/"


class Server:
    """`serve ARGUMENTS` in a folder, with this many CPUs; its output is in `serve.log` there."""

    start = START

    def __init__(self, folder, *arguments, cpus=1, dashboard=False, **environment):
        self.route = route_of(folder, arguments)
        self.log = Path(folder, "serve.log")
        self.port = free_port()
        self.dashboard = free_port() if dashboard else None
        self.scratch = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # short: Ray puts sockets there
        self.environment = {
            name: value for name, value in os.environ.items() if not name.startswith(NOT_PASSED_ON)
        }
        self.environment |= {
            "HOME": self.scratch,
            "HF_HUB_OFFLINE": "1",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": "a" * 32,
            "OMP_WAIT_POLICY": "passive",  # other tests need the CPUs too
            "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",  # 5 s is too short on a slow machine
        }
        self.environment |= environment
        ray_options = {
            "num_cpus": cpus,
            "_temp_dir": self.scratch,
            "include_dashboard": dashboard,
            "dashboard_port": self.dashboard,
        }
        http_options = {"host": "127.0.0.1", "port": self.port}
        options = [json.dumps(ray_options), json.dumps(http_options)]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", self.start, *options, *arguments],
                cwd=folder,
                env=self.environment,
                stdout=log,
                stderr=log,
                start_new_session=True,  # by which `processes` finds all that it starts
            )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)
        end = time.monotonic() + 120
        while self.processes() and time.monotonic() < end:
            self.process.poll()
            time.sleep(0.1)
        late = self.processes()
        for process in late:
            process.kill()
        self.process.wait(400)
        shutil.rmtree(self.scratch, ignore_errors=True)
        if late:
            raise AssertionError(f"still running 120 s after SIGTERM: {late.values()}")

    def processes(self, part=""):
        """Return {process: command line} of what it has started, with `part` in that line."""
        found = {}
        for process in psutil.process_iter():
            try:
                if os.getsid(process.pid) != self.process.pid:
                    continue
                line = " ".join(process.cmdline())
                if part in line and process.status() != psutil.STATUS_ZOMBIE:
                    found[process] = line
            except (ProcessLookupError, psutil.NoSuchProcess):
                pass
        return found

    def wait(self, seconds=400):
        """Wait until the app answers, and return the server; fail with the log if it does not."""
        health = self.route.rstrip("/") + "/health"
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.process.poll() is None:
            status, _ = self.ask(health, method="GET", timeout=5)
            if status == 200:
                return self
            time.sleep(0.2)
        raise AssertionError(self.log.read_text())

    def metrics(self):
        """Return what Prometheus would read from all processes of Ray that are up, as text."""
        targets = next(Path(self.scratch).rglob("prom_metrics_service_discovery.json"))
        text = ""
        for group in json.loads(targets.read_text()):
            for target in group["targets"]:
                try:
                    reply = urllib.request.urlopen(f"http://{target}/metrics", timeout=10)
                    text += reply.read().decode()
                except OSError:
                    pass  # not up yet
        return text

    def ask(
        self,
        path=None,
        body=None,
        method="POST",
        kind="application/json",
        timeout=400,
        **headers,
    ):
        """Send a request, by default to the route; return (status, parsed JSON or text).

        A body that is no bytes is sent as JSON. Status 0 means that there was no answer.
        """
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
        if kind is not None:
            headers["Content-Type"] = kind
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            connection.request(method, path or self.route, body, headers)
            reply = connection.getresponse()
            text = reply.read().decode()
        except (OSError, http.client.HTTPException):
            return 0, ""
        finally:
            connection.close()
        try:
            return reply.status, json.loads(text)
        except ValueError:
            return reply.status, text


# -- A toy in place of your work -------------------------------------------------------------------

TOY = '''
import time
from pathlib import Path

from pydantic import BaseModel, ConfigDict


class ModelRequest(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    text: str | list[str]


class ModelResponse(BaseModel):
    loud: str | list[str]
    long_texts: int = 0


EXAMPLE = {"text": "<hello>"}
COUNTERS = ("long_texts",)


class Refuse(Exception):
    def __init__(self, status, reason):
        super().__init__(reason)
        self.status = status


class Model:
    """Answers "hello" with "HELLO!"; what it loads is the "!"."""

    def __init__(self, name, settings, threads):
        self.end = Path(name, "end.txt").read_text() if name else "!"

    def plan(self, request):
        texts = request.text if isinstance(request.text, list) else [request.text]
        if len(texts) > 100:
            raise Refuse(413, "More than 100 texts.")
        if "refuse" in texts:
            raise Refuse(422, "A text that is refused.")
        if "fail to plan" in request.text:
            raise ValueError(texts)
        return texts

    def size(self, text):
        return len(text)

    def __call__(self, texts):
        for text in texts:
            if text.startswith("wait"):
                Path("waiting").touch()
                time.sleep(float(text.split()[1]))
            if text.startswith("fail to run"):
                raise ValueError(text)
        return [text.upper() + self.end for text in texts]

    def answer(self, request, inputs, outputs):
        if "fail to answer" in request.text:
            raise ValueError(inputs)
        loud = outputs if isinstance(request.text, list) else outputs[0]
        return ModelResponse(loud=loud, long_texts=sum(len(text) > 20 for text in inputs))

    def same(self, answer, known):
        return answer == known
'''


def assert_linear(cut, filler):
    """Fail if cutting 8 times the text takes much more than 8 times as long."""

    def seconds(text):
        begin = time.process_time()
        assert "".join(cut(text)) == text
        return time.process_time() - begin

    once = seconds("a" + filler + "b")
    assert seconds("a" + 8 * filler + "b") < 24 * max(once, 0.01)  # quadratic time: 64 times


def parts_of(app):
    """Return (head, imports, settings, work, mechanics) of the app, as its marks part it."""
    head, rest = app.split("# YOUR CODE: imports\n")
    imports, rest = rest.split("# -- 1.", 1)
    settings, rest = rest.split("# YOUR CODE: begin\n")
    work, mechanics = rest.split("# YOUR CODE: end\n")
    return head, imports, "# -- 1." + settings, work, mechanics


def used_by(settings, imports):
    """Return those of your imports that the settings use; the toy needs no others."""
    code = ast.walk(ast.parse(imports + settings))
    used = {node.id for node in code if isinstance(node, ast.Name)}
    kept = []
    for statement in ast.parse(imports).body:
        names = set()
        if isinstance(statement, ast.Import | ast.ImportFrom):
            for alias in statement.names:
                first_part = alias.name.split(".")[0]
                names.add(alias.asname or first_part)
        if names & used or not names:
            line = ast.unparse(statement)
            kept.append(line + "\n")
    return "".join(kept)


def write_toy(folder, moved=False):
    """Write the app with the toy in place of your work; `moved` puts the toy into a module."""
    head, imports, settings, _, mechanics = parts_of((HERE / APP).read_text("utf-8"))
    work = TOY
    if moved:
        (folder / "my_work.py").write_text(TOY, "utf-8")
        work = "from my_work import *\n"
    app = head + used_by(settings, imports) + settings + work + mechanics
    (folder / APP).write_text(app, "utf-8")


def write_model(folder, answers=(), end="!"):
    """Write what the toy loads, with the known answers [(text, answer), ...]."""
    folder.mkdir()
    (folder / "end.txt").write_text(end)
    known = [{"request": {"text": text}, "answer": {"loud": loud}} for text, loud in answers]
    (folder / "known_answers.json").write_text(json.dumps(known))


def imported(folder):
    """Return the app in a folder as a module, as often as there are folders."""
    spec = importlib.util.spec_from_file_location("toy_app", folder / APP)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# -- Configs ---------------------------------------------------------------------------------------


def flat(value, path=""):
    """Return {path: value} of everything in nested dictionaries and lists."""
    items = []
    if isinstance(value, dict):
        items = value.items()
    if isinstance(value, list):
        items = enumerate(value)
    found = {}
    for key, inner in items:
        found |= flat(inner, f"{path}.{key}".lstrip("."))
    return found or {path: value}


def built(folder, to):
    """Return the config that `serve build` writes for the app in a folder."""
    command = [sys.executable, "-m", "ray.serve.scripts", "build"]
    command += ["template_ray_serve:translator_app", "-o", str(to)]
    subprocess.run(command, cwd=folder, check=True, timeout=400, capture_output=True)
    return yaml.safe_load(to.read_text("utf-8"))


def different(config, other):
    """Return the paths at which two configs differ."""
    ours = flat(config)
    theirs = flat(other)
    return {path for path in ours | theirs if ours.get(path, "") != theirs.get(path, "")}
