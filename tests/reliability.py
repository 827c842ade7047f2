"""Break the server and the flow on purpose and count what is lost: `make faults`.

    python tests/reliability.py [--times 10] [--seconds 300] [--minutes 30] [--only NAME ...]

Every answer is compared with the right one. Half of the clients take the first answer as it is, the
other half try again as docs/serve.md says. Everything runs on this machine, on loopback, and ends
with it. The results go into docs/reliability.md.
"""

import argparse
import asyncio
import collections
import contextlib
import json
import logging
import os
import platform
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from datetime import date
from pathlib import Path
from unittest.mock import patch

import aiohttp
import boto3
import matplotlib
import psutil
import ray
import yaml
from moto.moto_server.werkzeug_app import (
    DomainDispatcherApplication,
    MotoRequestHandler,
    create_backend_app,
)
from werkzeug.serving import make_server

HERE = Path(__file__).parent
TEMPLATES = HERE.parent / "templates"
sys.path[:0] = [str(HERE), str(TEMPLATES)]

from load import Load  # noqa: E402
from remote import pods  # noqa: E402
from serve_process import Server  # noqa: E402
from test_remote import KEYS  # noqa: E402
from test_serve_cluster import Cluster as ContainerCluster  # noqa: E402
from test_serve_hostile import log_files  # noqa: E402
from test_serve_image import FILES, Container, build  # noqa: E402
from test_serve_load import with_code_in_call  # noqa: E402
from test_serve_nodes import lose_node, make_app, three_nodes  # noqa: E402
from test_template_flow import FLOW, artifacts, clean_environment  # noqa: E402
from test_template_ray_serve import PAIRS  # noqa: E402
from test_tracking import KEY  # noqa: E402
from wandb_stand_in import StandIn  # noqa: E402

PAGE = HERE.parent / "docs/reliability.md"


def since(load, at):
    """(in flight then, lost by who asks once, by who tries again, wrong, recovery in s)."""
    lost = [each for each in load.lost() if each.end > at]
    again = sum(each.again for each in lost)
    return (
        sum(each.begin < at < each.end for each in load.answers),
        len(lost) - again,
        again,
        len(load.wrong()),
        max([each.end - at for each in lost], default=0.0),
    )


@contextlib.contextmanager
def under_load(results, warm, *ports):
    """Eight clients, four of which try again; `since` of what follows `warm` joins the results."""
    with Load(*ports, clients=8, again=True) as load:
        time.sleep(warm)
        at = time.monotonic()
        yield load
    results.append(since(load, at))


def deploy(server, config):
    """Ask the running server for another config, by the documented command; its exit code."""
    done = subprocess.run(
        [
            sys.executable,
            TEMPLATES / "check_serve_config.py",
            config,
            "--deploy",
            f"http://127.0.0.1:{server.dashboard}",
        ],
        cwd=server.folder,
        env=server.environment,
        capture_output=True,
        timeout=200,
    )
    return done.returncode


LIKE_IMAGE = dict(
    re.findall(
        r"(RAY_(?:SERVE|ROTATION)\w+)=(\S+)", (TEMPLATES / "Dockerfile-rayserve").read_text()
    )
)


def kill(part):
    """A fault: kill -9 of one process whose command line has this part."""

    def fault(server, number):
        random.choice(list(server.processes(part))).kill()

    return fault


def leave_at_once(server, number):
    """200 clients send a request, and close before there is an answer."""
    import socket

    body = b'{"text": "Thank you."}'
    head = (
        b"POST /translate HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n"
    )
    lines = [socket.create_connection(("127.0.0.1", server.port), timeout=10) for _ in range(200)]
    for line in lines:
        line.sendall(head % len(body) + body)
    for line in lines:
        line.close()


def redeploy(server, number):
    """A change that needs new replicas; they start before the old ones end."""
    config = yaml.safe_load((server.folder / "config.yaml").read_text())
    config["applications"][0]["args"]["max_queue"] = 300 + number
    (server.folder / "next.yaml").write_text(yaml.safe_dump(config))
    assert deploy(server, server.folder / "next.yaml") == 0


def broken_model(server, number):
    """An update to a model with one bit turned: it must be refused, and what runs must go on."""
    broken = server.folder / f"broken{number}"
    shutil.copytree(server.folder / "model", broken)
    weights = bytearray((broken / "model.safetensors").read_bytes())
    weights[len(weights) // 2 + 3] ^= 0x40
    (broken / "model.safetensors").write_bytes(weights)
    config = yaml.safe_load((server.folder / "config.yaml").read_text())
    config["applications"][0]["args"]["model"] = str(broken)
    (server.folder / "next.yaml").write_text(yaml.safe_dump(config))
    assert deploy(server, server.folder / "next.yaml") == 1
    assert deploy(server, server.folder / "config.yaml") == 0


def slow_disk(server, number):
    """For three seconds, each write of the replica and the proxy to a log takes 50 ms longer."""
    logs = [path for path in log_files(server) if path.suffix in (".log", ".err")]
    pids = [each.pid for part in ("ServeReplica", "ProxyActor") for each in server.processes(part)]
    tracer = subprocess.Popen(
        [
            "strace",
            "-f",
            "-o",
            server.folder / "writes",
            *[f"-p{pid}" for pid in pids],
            *[f"-P{path}" for path in logs],
            "-e",
            "trace=write",
            "-e",
            "inject=write:delay_enter=50000",
        ],
        stderr=subprocess.DEVNULL,
    )
    time.sleep(3)
    tracer.send_signal(signal.SIGINT)
    tracer.wait(10)
    assert "DELAYED" in (server.folder / "writes").read_text()


SERVE = {
    "replica killed": kill("ServeReplica"),
    "proxy killed": kill("ProxyActor"),
    "controller killed": kill("ServeController"),
    "200 clients leave at once": leave_at_once,
    "new config deployed": redeploy,
    "broken model deployed": broken_model,
    "slow disk": slow_disk,
}


def settled(server, replicas, seconds=60):
    """Wait until all replicas are back and a request is answered."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if len(server.processes("ServeReplica")) == replicas and server.ask(
            body={"text": "Thank you."}, timeout=5
        ) == (200, {"translation": "Merci."}):
            return
        time.sleep(0.3)
    raise AssertionError(f"not itself again after {seconds} s:\n{server.log.read_text()[-3000:]}")


def row(name, results):
    """A line of the table out of the tuples that `since` gives."""
    flying, once, again, wrong, recovery = zip(*results)
    return (
        name,
        len(results),
        sum(flying),
        sum(once),
        sum(again),
        sum(wrong),
        f"{max(recovery):.1f}",
    )


def serve_faults(folder, names, times, pause=4):
    config = make_app(folder)
    if wanted := [name for name in SERVE if name in names]:
        with Server(folder, "run", config.name, cpus=4, dashboard=True, **LIKE_IMAGE) as server:
            server.folder = folder
            server.wait()
            settled(server, 2)
            for name in wanted:
                results = []
                for number in range(times):
                    with under_load(results, 1.5, server.port):
                        SERVE[name](server, number)
                        time.sleep(pause)
                        settled(server, 2)
                yield row(name, results)
    if "node lost" in names:
        results = []
        make_app(folder, replicas=3, max_replicas_per_node=1)
        for _ in range(times):
            with three_nodes(folder) as server:
                settled(server, 3)
                with under_load(results, 1.5, server.port):
                    lose_node(server)
                    time.sleep(pause + 8)  # until Ray has seen it
        yield row("node lost", results)


def told_to_stop(container, load):
    """SIGTERM: what has begun is answered. The clients end too: what comes later is for others."""
    pods.docker("kill", "--signal=SIGTERM", container.id)
    load.over.set()
    pods.docker("wait", container.id)
    pods.docker("start", container.id)


def killed(container, load):
    """The whole container, head of Ray and all, killed and started again."""
    pods.docker("kill", container.id)
    pods.docker("start", container.id)


IMAGE = "template_rayserve_image:faults"
# What somebody's model might do.
GREEDY = """
if Path("/tmp/greedy").exists():
    Path("/tmp/greedy").unlink()
    held = [b"x" * 100_000_000 for _ in range(40)]
    print("took 40 times 100 MB")
"""


def out_of_memory(container, load):
    """The replica takes more memory than the container may have: it is killed."""
    container.inside("touch", "/tmp/greedy")
    end = time.monotonic() + 30
    while container.inside("ls", "/tmp/greedy").returncode == 0 and time.monotonic() < end:
        time.sleep(0.2)
    time.sleep(5)
    assert "took 40 times" not in container.logs()


CONTAINER = {
    "container told to stop": told_to_stop,
    "container killed, started again": killed,
    "out of memory": out_of_memory,
}


HEAD_LOST = "head of a cluster killed"


def container_faults(folder, names, times):
    """The image, with one replica: who asks once loses what comes while it starts again."""
    wanted = [name for name in CONTAINER if name in names]
    if not wanted and HEAD_LOST not in names:
        return
    config = make_app(folder)
    for name in FILES:
        shutil.copy(TEMPLATES / name, folder)
    build(folder, IMAGE)
    (folder / "greedy.py").write_text(with_code_in_call(GREEDY), "utf-8")
    mount = (
        f"--mount=type=bind,source={folder / 'greedy.py'},target=/serve_app/template_ray_serve.py"
    )
    for name in wanted:
        results, options = [], [mount] if name == "out of memory" else []
        with Container("--memory=3g", "--memory-swap=3g", *options, image=IMAGE) as running:
            running.wait()
            for _ in range(times):
                with under_load(results, 2, running.port) as load:
                    CONTAINER[name](running, load)
                    running.wait()
                    time.sleep(2)
        yield row(name, results)
    if HEAD_LOST in names:
        results = []
        for _ in range(times):
            head_lost(config, results)
        yield row(HEAD_LOST, results)
    pods.docker("image", "rm", IMAGE)


def head_lost(config, results):
    """The head of a cluster of containers is killed; another one takes over, as with KubeRay."""
    clusters = []
    try:
        clusters.append(ContainerCluster(IMAGE, config, workers=2))
        clusters[0].deploy()
        with under_load(results, 2, *clusters[0].workers) as load:
            pods.docker("kill", clusters[0].head)
            clusters.append(ContainerCluster(IMAGE, config, workers=2))
            load.ports = list(clusters[1].deploy().workers)
            time.sleep(3)
            clusters[0].end()
            time.sleep(2)
    finally:
        for each in clusters:
            each.end()


def flow(folder, *arguments, command="run", before=()):
    """The flow as a process of its own, in a session of its own."""
    return subprocess.Popen(
        [sys.executable, str(FLOW), "--no-pylint", *before, command, *arguments],
        cwd=folder,
        text=True,
        env=clean_environment(folder),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def model_of(folder):
    return artifacts(folder, "train")["model"]["model.safetensors"]


EPOCHS = ("--epochs", "8")


def outcome(folder, right, begin, runs=1, lost=0):
    """A tuple as `since` gives it, of runs that began then; wrong is any other model."""
    return runs, lost, lost, int(model_of(folder) != right), time.monotonic() - begin


def resumed(folder, right, before=()):
    """Resume what was broken off; a tuple as `since` gives it."""
    begin = time.monotonic()
    again = flow(folder, command="resume", before=before)
    output = again.communicate(timeout=200)[0]
    if again.returncode:  # killed before there was anything to resume
        again = flow(folder, *EPOCHS, before=before)
        output = again.communicate(timeout=200)[0]
    assert again.returncode == 0, output
    return outcome(folder, right, begin)


def kill_task(folder, right, seconds):
    """kill -9 of the training task, some time between its start and its end."""
    running = flow(folder, *EPOCHS)
    time.sleep(random.uniform(1, seconds))
    for each in psutil.Process(running.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it has just ended
            if " train " in " ".join(each.cmdline()):
                each.kill()
    running.communicate(timeout=200)
    if running.returncode == 0:  # it had finished
        return 1, 0, 0, int(model_of(folder) != right), 0.0
    return resumed(folder, right)


def kill_flow(folder, right, seconds):
    """kill -9 of the whole flow, at any time."""
    running = flow(folder, *EPOCHS)
    time.sleep(random.uniform(1, seconds))
    for each in [
        *psutil.Process(running.pid).children(recursive=True),
        psutil.Process(running.pid),
    ]:
        with contextlib.suppress(psutil.Error):
            each.kill()
    running.communicate(timeout=60)
    return resumed(folder, right)


def two_at_once(folder, right, seconds):
    """Two runs in one folder."""
    begin = time.monotonic()
    both = [flow(folder, *EPOCHS) for _ in range(2)]
    outputs = [each.communicate(timeout=300)[0] for each in both]
    lost = sum(each.returncode != 0 for each in both)
    assert lost or "Done!" in outputs[0]
    return outcome(folder, right, begin, runs=2, lost=lost)


def disk_full(folder, right, seconds):
    """The disk is full: a clear end, and once there is room, `resume` does the rest."""
    # The model, its checkpoints and the code take 20 MB or so.
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={random.randint(2, 8)}m", "tmpfs", folder], check=True
    )
    try:
        running = flow(folder, *EPOCHS)
        output = running.communicate(timeout=200)[0]
        assert running.returncode != 0 and "No space left on device" in output, output[-2000:]
        subprocess.run(["mount", "-o", "remount,size=200m", folder], check=True)
        return resumed(folder, right)
    finally:
        subprocess.run(["umount", folder], check=True)


def exporter(folder):
    """The command of an export that replaces a model, in a folder with a run of the right one."""
    if not (folder / "model").exists():
        assert flow(folder, *EPOCHS).wait(200) == 0
    shutil.copy(TEMPLATES / "export_model.py", folder)
    return [sys.executable, "export_model.py", "--replace"]


def export_interrupted(folder, right, seconds):
    """kill -9 of an export that replaces a model: there is the old one, or the new one, whole."""
    command = exporter(folder)
    subprocess.run(
        command,
        cwd=folder,
        env=clean_environment(folder),
        check=True,
        capture_output=True,
        timeout=100,
    )
    begin = time.monotonic()
    running = subprocess.Popen(
        command, cwd=folder, env=clean_environment(folder), stdout=subprocess.DEVNULL
    )
    time.sleep(random.uniform(0.3, 2.5))
    running.kill()
    running.wait(10)
    whole = all(
        (folder / "model" / name).exists()
        for name in ("model.safetensors", "known_answers.json", "README.md")
    )
    wrong = not whole or (folder / "model/model.safetensors").read_bytes() != right
    return 1, 0, 0, int(wrong), time.monotonic() - begin


def export_during_a_run(folder, right, seconds):
    """An export while another run is under way: the model of the one that is done, whole."""
    command = exporter(folder)
    begin, running = time.monotonic(), flow(folder, *EPOCHS, "--seed", "2")
    time.sleep(random.uniform(1, seconds))
    export = subprocess.run(
        command, cwd=folder, env=clean_environment(folder), capture_output=True, timeout=100
    )
    done = running.poll() is not None  # then the newest run may be that one
    running.communicate(timeout=200)
    found = (folder / "model/model.safetensors").read_bytes()
    lost = int(export.returncode != 0 or running.returncode != 0)
    right_ones = [right, model_of(folder)] if done else [right]
    result = 2, lost, lost, int(found not in right_ones), time.monotonic() - begin
    assert flow(folder, *EPOCHS).wait(200) == 0  # the newest is the right one again
    return result


class BadS3:
    """S3 by moto, of whose answers one in ten is an error, as S3 gives them when it is too busy."""

    def __init__(self, app):
        self.app, self.failed = app, 0

    def __call__(self, environ, start):
        if random.random() > 0.1:
            return self.app(environ, start)
        self.failed += 1
        environ["wsgi.input"].read(
            int(environ.get("CONTENT_LENGTH") or 0)
        )  # else the connection breaks
        status, code = random.choice(
            [("503 Slow Down", b"SlowDown"), ("500 Internal Server Error", b"InternalError")]
        )
        start(status, [("Content-Type", "application/xml")])
        return [b"<Error><Code>%b</Code><Message>Try again.</Message></Error>" % code]


def s3_errors(folder, right, seconds):
    """A run whose artifacts go to S3, where one answer in ten is an error."""
    logging.getLogger("werkzeug").setLevel("ERROR")
    bad = BadS3(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, bad, threaded=True, request_handler=MotoRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    settings = {
        "METAFLOW_S3_ENDPOINT_URL": url,
        "METAFLOW_DATASTORE_SYSROOT_S3": "s3://flows/metaflow",
        "PYTHONPATH": str(HERE / "remote/extension"),
        "STAND_IN_CLUSTER": "http://127.0.0.1:9",
        **KEYS,
    }
    try:
        with patch.dict(os.environ, settings):
            boto3.client("s3", endpoint_url=url).create_bucket(Bucket="flows")
            begin, to_s3 = time.monotonic(), ("--datastore", "s3")
            running = flow(folder, *EPOCHS, before=to_s3)
            running.communicate(timeout=300)
            if running.returncode:
                return resumed(folder, right, to_s3)
            assert bad.failed
            return outcome(folder, right, begin)
    finally:
        server.shutdown()


def wandb_dies(folder, right, seconds):
    """The W&B server ends, or freezes, as soon as the run has begun: the training goes on."""
    begin = time.monotonic()
    with (
        StandIn(random.choice(["dies", "freezes"])) as server,
        patch.dict(
            os.environ,
            {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": KEY, "WANDB_PROJECT": "project"},
        ),
    ):
        running = flow(folder, *EPOCHS, "--offline", "False")
        output = running.communicate(timeout=300)[0]
        assert server.runs, output
    return outcome(folder, right, begin, lost=int(running.returncode != 0))


TRAIN = {
    "training killed, then resume": kill_task,
    "flow killed, then resume": kill_flow,
    "disk full, then resume": disk_full,
    "S3 errors": s3_errors,
    "W&B dies": wandb_dies,
    "two runs at once": two_at_once,
    "export killed": export_interrupted,
    "export during a run": export_during_a_run,
}


def train_faults(folder, names, times):
    if not (wanted := [name for name in TRAIN if name in names]):
        return
    folder.mkdir()
    (folder / "right").mkdir()
    begin = time.monotonic()
    undisturbed = flow(folder / "right", *EPOCHS)
    output = undisturbed.communicate(timeout=200)[0]
    assert undisturbed.returncode == 0, output
    right, seconds = model_of(folder / "right"), time.monotonic() - begin
    for name in wanted:
        results = []
        for number in range(times):
            # An export takes the model of a run before it.
            place = folder / (name if "export" in name else f"{list(TRAIN).index(name)}-{number}")
            place.mkdir(exist_ok=True)
            results.append(TRAIN[name](place, right, seconds))
        yield row(name, results)


def arrivals(folder, names, seconds):
    """Open loop: requests come by chance, as many a second as a part of what the server can do."""
    wanted = [name for name in RATES if name in names]
    if not wanted:
        return
    config = make_app(folder, replicas=1)
    with Server(folder, "run", config.name, cpus=2) as server:
        server.wait()
        with Load(server.port, clients=32) as load:
            time.sleep(4)
            at = time.monotonic()
            time.sleep(6)
        capacity = sum(each.begin > at and each.right for each in load.answers) / 6
        for name in wanted:
            yield name, f"{seconds:g}", *arrive(server, capacity * RATES[name], seconds)


PARTS = ("ServeReplica", "ProxyActor", "ServeController", "raylet/raylet", "gcs_server")


def sample(server):
    """{(process, what): figure}: memory, open files, threads of each process, and all logs."""
    found = {}
    for part in PARTS:
        for process in server.processes(part):
            found[part, "memory in MB"] = process.memory_info().rss / 1e6
            found[part, "open files"] = process.num_fds()
            found[part, "threads"] = process.num_threads()
    found["all", "logs in MB"] = sum(path.stat().st_size for path in log_files(server)) / 1e6
    return found


def nonsense(server, over):
    """Requests that are none: bad JSON, too large, unknown paths, clients that leave."""
    number = 0
    while not over.wait(0.2):
        number += 1
        server.ask(body=b"{" * (number % 900))
        server.ask(body={"text": "a" * 300_000})
        server.ask(f"/translate/{number}", method="GET")
        server.ask(body={"text": list(PAIRS) * 20}, timeout=0.02)


def long_run(folder, names, minutes):
    """(figure, minutes, after a fifth, at the end, requests, wrong) under mixed load; a picture."""
    if "long run" not in names:
        return
    config, samples, over = make_app(folder, replicas=1), [], threading.Event()
    # Logs a twentieth of what the image allows, so that it is seen when they are full.
    limits = {**LIKE_IMAGE, "RAY_ROTATION_MAX_BYTES": "1000000"}
    with Server(folder, "run", config.name, cpus=2, **limits) as server:
        server.wait()
        other = threading.Thread(target=nonsense, args=[server, over])
        with Load(server.port, clients=4) as load:
            other.start()
            begin = time.monotonic()
            while time.monotonic() < begin + 60 * minutes:
                time.sleep(60 * minutes / 100)
                samples.append((time.monotonic() - begin, sample(server)))
            over.set()
            other.join(100)
    draw(samples)
    early, late = samples[len(samples) // 5][1], samples[-1][1]
    for part, what in late:
        figures = f"{early[part, what]:.0f}", f"{late[part, what]:.0f}"
        yield f"{part}, {what}", f"{minutes:g}", *figures, len(load.answers), len(load.wrong())


def draw(samples):
    matplotlib.use("svg")
    from matplotlib import pyplot

    kinds = ("memory in MB", "open files", "threads", "logs in MB")
    figure, axes = pyplot.subplots(2, 2, figsize=(9, 6), sharex=True, layout="constrained")
    for plot, kind in zip(axes.flat, kinds):
        for part in [part for part, what in samples[-1][1] if what == kind]:
            plot.plot(
                [at / 60 for at, _ in samples],
                [found.get((part, kind), 0) for _, found in samples],
                label=part,
            )
        plot.set(title=kind, ylim=(0, None))
        plot.legend(fontsize="x-small")
    for plot in axes[1]:
        plot.set_xlabel("minutes")
    figure.savefig(PAGE.with_suffix(".svg"))


RATES = {f"load of {percent} %": percent / 100 for percent in (50, 80, 100, 150)}


def arrive(server, rate, seconds):
    """(requests/s, requests, p50 ms, p99 ms, refused, lost, wrong)."""
    texts, found, chance = list(PAIRS), [], random.Random(0)
    address = f"http://127.0.0.1:{server.port}/translate"

    async def one(session, text, at):
        status, right = 0, False
        with contextlib.suppress(aiohttp.ClientError, TimeoutError, ValueError):
            async with session.post(address, json={"text": text}) as reply:
                content = await reply.read()
            status, right = (
                reply.status,
                reply.status == 200 and json.loads(content) == {"translation": PAIRS[text]},
            )
        found.append(
            (time.monotonic() - at, status, right)
        )  # from when it was due, however late it was sent

    async def all_of_them():
        limits = {
            "connector": aiohttp.TCPConnector(limit=1000),
            "timeout": aiohttp.ClientTimeout(60),
        }
        async with aiohttp.ClientSession(**limits) as session, asyncio.TaskGroup() as tasks:
            at = begin = time.monotonic()
            while (at := at + chance.expovariate(rate)) < begin + seconds:
                await asyncio.sleep(max(0, at - time.monotonic()))
                tasks.create_task(one(session, random.choice(texts), at))

    asyncio.run(all_of_them())
    times = sorted(took for took, status, _ in found if status == 200)
    statuses = collections.Counter(status for _, status, _ in found)
    p50, p99 = (f"{1000 * times[int(len(times) * part)]:.0f}" for part in (0.5, 0.99))
    wrong = sum(status == 200 and not right for _, status, right in found)
    return (
        f"{rate:.0f}",
        len(found),
        p50,
        p99,
        statuses[503],
        len(found) - statuses[200] - statuses[503],
        wrong,
    )


NAMES = [*RATES, *SERVE, "node lost", *CONTAINER, HEAD_LOST, *TRAIN, "long run"]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--times", type=int, default=10, help="how often each fault is tried")
    parser.add_argument("--seconds", type=float, default=300, help="of each load")
    parser.add_argument("--minutes", type=float, default=30, help="of the long run")
    parser.add_argument("--only", nargs="*", default=NAMES, choices=NAMES, metavar="NAME")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("reliability.py: told to end"))
    os.environ["OMP_NUM_THREADS"] = "1"
    folder = Path(tempfile.mkdtemp(prefix="faults.", dir="/tmp"))  # short: Ray puts sockets there
    tables = {name: [] for name in HEADS}
    try:
        for table, part, how_much in (
            ("load", arrivals, arguments.seconds),
            ("faults", serve_faults, arguments.times),
            ("faults", container_faults, arguments.times),
            ("faults", train_faults, arguments.times),
            ("long run", long_run, arguments.minutes),
        ):
            for each in part(folder / part.__name__, arguments.only, how_much):
                print(*each, sep=", ", flush=True)
                tables[table].append(each)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        write(tables)  # what is done is not lost if the rest fails


HEADS = {
    "load": [
        "arrivals",
        "s",
        "requests/s",
        "requests",
        "p50 ms",
        "p99 ms",
        "refused (503)",
        "lost",
        "wrong",
    ],
    "faults": [
        "fault",
        "times",
        "in flight",
        "lost",
        "lost with retry",
        "wrong",
        "recovered after s",
    ],
    "long run": ["process, figure", "minutes", "after a fifth", "at the end", "requests", "wrong"],
}


def write(tables):
    """Put the rows between their marks in the page, in place of earlier ones of their names."""
    python = platform.python_version()
    how = f"{date.today()}, {os.cpu_count()} CPUs, Python {python}, Ray {ray.__version__}"
    text = re.sub(
        r"(<!-- how -->\n).*?\n(<!-- end -->)",
        rf"\g<1>{how}\n\2",
        PAGE.read_text("utf-8"),
        flags=re.DOTALL,
    )
    for name, rows in tables.items():
        before, _, rest = text.partition(f"<!-- {name} -->\n")
        old, end, after = rest.partition("<!-- end -->")
        kept = {line.split(" | ")[0][2:]: line for line in old.splitlines()[2:]}
        kept.update((str(row[0]), f"| {' | '.join(map(str, row))} |") for row in rows)
        ranked = sorted(kept, key=lambda each: NAMES.index(each) if each in NAMES else 0)
        lines = [f"| {' | '.join(cells)} |" for cells in (HEADS[name], ["---"] * len(HEADS[name]))]
        lines += [kept[each] for each in ranked]
        text = before + f"<!-- {name} -->\n" + "\n".join(lines) + "\n" + end + after
    PAGE.write_text(text, "utf-8")
    print(f"{how}: written to {PAGE}")


if __name__ == "__main__":
    main()
