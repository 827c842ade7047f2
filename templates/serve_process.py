# serve_process.py, version 0.1.0
"""Run a `serve` command as tests need it: in a process of its own, with a Ray of its own.

    with Server(folder, "run", "serve_config.yaml") as server:
        status, answer = server.wait().ask(body={"text": "Hello world!"})

Ports are free ones, and all processes and temporary files end with the server. It knows its route
from the command.
"""

import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil  # Ray needs it too
import yaml

# Start Ray in a folder of its own, on free ports; then hand over to the command line `serve`.
START = """
import json, sys, ray
from ray import serve
from ray.serve.scripts import cli
ray_options = json.loads(sys.argv.pop(1))
http_options = json.loads(sys.argv.pop(1))
ray.init(address="local", namespace="serve", **ray_options)
serve.start(http_options=http_options)
cli()
"""
NOT_PASSED_ON = ("RAY_", "SERVE_", "HF_", "OMP_")  # environment variables of whoever runs the test


def free_port():
    """Return a port that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


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
        self.scratch = tempfile.mkdtemp(prefix="ray-")  # short: Ray puts sockets there
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
        end = time.monotonic() + 30
        while self.processes() and time.monotonic() < end:
            self.process.poll()
            time.sleep(0.1)
        late = self.processes()
        for process in late:
            process.kill()
        self.process.wait(10)
        shutil.rmtree(self.scratch, ignore_errors=True)
        if late:
            raise AssertionError(f"still running 30 s after SIGTERM: {late.values()}")

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

    def ask(
        self,
        path=None,
        body=None,
        method="POST",
        kind="application/json",
        timeout=60,
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
        except OSError:
            return 0, ""
        finally:
            connection.close()
        try:
            return reply.status, json.loads(text)
        except ValueError:
            return reply.status, text
