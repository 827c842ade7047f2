"""Measure template_ray_serve.py and its peers with one model, in one go and in turns: `make bench`.

    python bench.py [--rounds N] [--seconds S] [--servers template,ray-docs,...]
                    [--clients 1,8,32,128]

Each round starts every server once, alone. The clients wait for an answer before they send the
next request. Writes results.json, and with all servers and clients also docs/benchmark.md and its
chart. Only ratios within one run tell something: machines drift.
"""

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import platform
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path

import page
import psutil
import yaml
from helpers.arrivals import percentile, random_arrivals
from model import texts

HERE = Path(__file__).parent
CLIENTS, PORT, THREADS = (1, 8, 32, 128), 8123, os.cpu_count() or 1
RUN_APP = ["-m", "uvicorn", "--host", "127.0.0.1", "--port", str(PORT), "--log-level", "warning"]


def template(precision):
    """The command of the template with a production-like config, all CPUs for the one replica."""

    def config(folder):
        content = yaml.safe_load((HERE.parent / "templates/serve_config.yaml").read_text("utf-8"))
        content["http_options"] = {"host": "127.0.0.1", "port": PORT}
        application = content["applications"][0]
        application["args"] = {
            "model": str(folder / "model"),
            "precision": precision,
            "max_new_tokens": 20,
            "max_request_tokens": 100_000,  # lists of 900 texts
            "max_queue": 1000 * page.LISTS,
        }
        deployment = application["deployments"][0]
        deployment["autoscaling_config"].update({"max_replicas": 1})
        deployment["ray_actor_options"] = {"num_cpus": THREADS}
        deployment["max_surge_percent"] = 0
        (folder / "serve_config.yaml").write_text(yaml.safe_dump(content))
        return [
            "-m",
            "ray.serve.scripts",
            "run",
            str(folder / "serve_config.yaml"),
        ], HERE.parent / "templates"

    return config


def ray_docs(folder):
    config = {
        "http_options": {"host": "127.0.0.1", "port": PORT},
        "applications": [
            {"name": "docs", "route_prefix": "/translate", "import_path": "ray_docs:app"}
        ],
    }
    (folder / "ray_docs.yaml").write_text(yaml.safe_dump(config))
    return ["-m", "ray.serve.scripts", "run", str(folder / "ray_docs.yaml")], HERE


SERVERS = {  # name: (virtual environment, what gives command and folder)
    "template": (None, template("float32")),
    "template HAProxy": (None, template("float32")),
    "template bfloat16": (None, template("bfloat16")),
    "template int8": (None, template("int8")),
    "ray-docs": (None, ray_docs),
    "fastapi": (None, lambda _: ([*RUN_APP, "fastapi_app:app"], HERE)),
    "litserve": ("litserve", lambda _: (["litserve_app.py"], HERE)),
    "bentoml": (
        "bentoml",
        lambda _: (
            [
                "-m",
                "bentoml",
                "serve",
                "bentoml_app:Translator",
                "--host",
                "127.0.0.1",
                "--port",
                str(PORT),
                "--api-workers",
                "1",
            ],
            HERE,
        ),
    ),
    "ctranslate2": ("ctranslate2", lambda _: ([*RUN_APP, "ctranslate2_app:app"], HERE)),
}

HAPROXY = {"template HAProxy": {"RAY_SERVE_ENABLE_HA_PROXY": "1"}}  # in place of Ray's own proxy


class Server:
    """A server in a session of its own, ended with all that it started."""

    def __init__(self, name, folder, launch=None):
        venv, command = launch or SERVERS[name]
        python = str(HERE / f".venv-{venv}/bin/python") if venv else sys.executable
        arguments, at = command(folder)
        environment = {
            **os.environ,
            "BENCH_MODEL": str(folder / "model"),
            "BENCH_THREADS": str(THREADS),
            "BENCH_PORT": str(PORT),
            "OMP_NUM_THREADS": str(THREADS),
            "RAY_ADDRESS": "local",
            "RAY_TMPDIR": str(folder),
            "HF_HUB_OFFLINE": "1",
            "BENTOML_HOME": str(folder / "bentoml"),
            "BENTOML_DO_NOT_TRACK": "1",
            **HAPROXY.get(name, {}),
        }
        self.name, self.log = name, (folder / "log").open("w+")
        self.process = subprocess.Popen(
            [python, *arguments],
            cwd=at,
            env=environment,
            start_new_session=True,
            stdout=self.log,
            stderr=subprocess.STDOUT,
        )

    def __enter__(self):
        for _ in range(120):
            if asyncio.run(Line(self.name).ask("hello"))[1]:
                return self
            if self.process.poll() is not None:
                break
            time.sleep(1)
        self.__exit__()
        self.log.seek(0)
        raise SystemExit(f"{self.name} did not start:\n{self.log.read()[-3000:]}")

    def __exit__(self, *_):
        started = [process for process in psutil.process_iter() if self.ours(process)]
        self.process.terminate()
        for process in psutil.wait_procs(started, timeout=30)[1]:
            process.kill()
        self.process.wait(10)

    def ours(self, process):
        try:
            return os.getsid(process.pid) == self.process.pid
        except ProcessLookupError:
            return False


class Line:
    """One client's connection.

    HTTP/1.1 by hand: a full client would take CPU time from the server.
    """

    def __init__(self, server):
        self.reader = self.writer = None
        self.form = (
            (lambda text: [text]) if server == "bentoml" else str
        )  # a batching endpoint accepts only lists

    async def ask(self, text):
        """Seconds until the answer, and whether it was one; a list of texts is sent as it is."""
        content = self.form(text) if isinstance(text, str) else text
        body = json.dumps({"text": content}).encode()
        begin = time.perf_counter()
        try:
            if self.writer is None:
                self.reader, self.writer = await asyncio.open_connection("127.0.0.1", PORT)
            self.writer.write(
                b"POST /translate HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
                b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
            )
            head = (await asyncio.wait_for(self.reader.readuntil(b"\r\n\r\n"), 120)).lower()
            answer = b""
            if b"chunked" in head:
                while size := int(await self.reader.readline(), 16):
                    answer += (await self.reader.readexactly(size + 2))[:-2]
                await self.reader.readline()
            else:
                answer = await self.reader.readexactly(
                    int(head.split(b"content-length:")[1].split(b"\r\n")[0])
                )
            return time.perf_counter() - begin, head.split()[1] == b"200" and len(answer) > 20
        except (TimeoutError, OSError, asyncio.IncompleteReadError, IndexError):
            self.writer = None
            await asyncio.sleep(0.1)
            return time.perf_counter() - begin, False


def figures(asked, rate):
    """The results of [(seconds, whether there was an answer), ...] at this rate."""
    times = [1000 * took for took, good in asked if good]
    return {
        "requests_per_s": rate,
        "p50_ms": percentile(times, 50),
        "p99_ms": percentile(times, 99),
        "errors": len(asked) - len(times),
    }


async def closed_loop(server, clients, mix, seconds):
    """What `clients` clients get that ask again as soon as they have an answer.

    The first answers are not counted. A slow server gets enough time to answer every client.
    """
    many = itertools.cycle(texts(mix))
    begin = time.perf_counter()
    warm = begin + max(2.0, clients / 16)  # until the batches have found their size
    counted: list = []

    async def client(line):
        while time.perf_counter() < warm + seconds or len(counted) < clients:
            took, good = await line.ask(next(many))
            if time.perf_counter() > warm:
                counted.append((took, good))

    await asyncio.gather(*[client(Line(server)) for _ in range(clients)])
    times = [took for took, good in counted if good]
    assert times, "no request was answered"
    # Little's law: each client always has exactly one request in flight.
    return figures(counted, clients / statistics.mean(times))


async def open_loop(server, rate, seconds):
    """The same for random arrivals, `rate` a second, whether the others are served or not."""
    many, idle, found = itertools.cycle(texts("equal")), [], []

    async def ask(due):
        line = idle.pop() if idle else Line(server)
        _, good = await line.ask(next(many))
        found.append((time.monotonic() - due, good))
        idle.append(line)

    await random_arrivals(ask, rate, seconds)
    return figures(found, rate)


async def beside_lists(server, seconds):
    """The same for a client that sends single texts while others send lists of 900."""
    many, found = itertools.cycle(texts("mixed")), []

    async def send_lists(line):
        while True:
            await line.ask(list(itertools.islice(many, 900)))

    others = [asyncio.create_task(send_lists(Line(server))) for _ in range(page.LISTS)]
    await asyncio.sleep(5)  # until the lists are in work
    line = Line(server)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or not found:
        found.append(await line.ask(next(many)))
    for other in others:
        other.cancel()
    return figures(found, len(found) / seconds)


def measure(name, folder, clients, seconds, rates):
    """Yield the results of one server, started for this."""
    if name == "limit":
        done = subprocess.run(
            [sys.executable, HERE / "limit.py", folder / "model", str(seconds), str(THREADS)],
            check=True,
            stdout=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": str(THREADS)},
        )
        yield from map(json.loads, done.stdout.splitlines())
        return
    with Server(name, folder):
        for mix, number in itertools.product(("equal", "mixed"), clients):
            result = asyncio.run(closed_loop(name, number, mix, seconds))
            yield {"server": name, "clients": number, "mix": mix, **result}
            if (name, number, mix) == ("template", 32, "equal"):
                rates.setdefault(name, 0.8 * result["requests_per_s"])  # of the first round
        if name in rates:
            result = asyncio.run(open_loop(name, rates[name], 3 * seconds))
            yield {"server": name, "clients": 0, "mix": page.LOADED, **result}
            result = asyncio.run(beside_lists(name, 3 * seconds))
            yield {"server": name, "clients": 1, "mix": page.BESIDE_LISTS, **result}


def merged(results):
    """The median of the rounds, with the smallest and the largest rate."""
    groups = {}
    for result in results:
        groups.setdefault((result["server"], result["clients"], result["mix"]), []).append(result)
    for (server, clients, mix), rounds in groups.items():
        rates = [result["requests_per_s"] for result in rounds]
        yield {
            "server": server,
            "clients": clients,
            "mix": mix,
            "errors": sum(result["errors"] for result in rounds),
            **{
                key: round(statistics.median(result[key] for result in rounds), 2)
                for key in ("requests_per_s", "p50_ms", "p99_ms")
            },
            "lowest": round(min(rates), 2),
            "highest": round(max(rates), 2),
            "rounds": len(rounds),
        }


def machine():
    """Name the processor, the number of CPUs and the versions that matter."""
    processor = platform.machine()
    with contextlib.suppress(OSError):
        processor = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[1]
    versions = [f"{name} {version(name)}" for name in ("torch", "transformers", "ray")]
    return (
        f"{processor}, {THREADS} CPUs",
        f"Python {platform.python_version()}, {', '.join(versions)}",
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=10, help="of each measurement")
    parser.add_argument("--servers", default=",".join(["limit", *SERVERS]), help="default: all")
    parser.add_argument("--clients", default=",".join(map(str, CLIENTS)))
    arguments = parser.parse_args()
    names, results, rates = arguments.servers.split(","), [], {}
    clients = [int(number) for number in arguments.clients.split(",")]
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit("bench.py: told to end")
    )  # so that the server ends too
    folder = Path(tempfile.mkdtemp(prefix="bench.", dir="/tmp"))  # short: Ray puts sockets there
    try:
        subprocess.run([sys.executable, HERE / "model.py", folder / "model"], check=True)
        for number, name in itertools.product(range(arguments.rounds), names):
            for result in measure(name, folder, clients, arguments.seconds, rates):
                print(f"round {number + 1}:", json.dumps(result), flush=True)
                results.append(result)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    processor, versions = machine()
    content = {
        "date": str(date.today()),
        "machine": processor,
        "versions": versions,
        "rounds": arguments.rounds,
        "seconds": arguments.seconds,
        "results": list(merged(results)),
    }
    page.RESULTS.write_text(json.dumps(content, indent=1) + "\n", "utf-8")
    if set(names) >= {"limit", *SERVERS} and set(clients) >= set(CLIENTS):
        page.main()
    else:
        print(f"only a part was measured, so docs/benchmark.md stays; see {page.RESULTS}")


if __name__ == "__main__":
    main()
