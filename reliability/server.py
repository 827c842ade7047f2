"""Break parts of a server: replica, proxy, controller, clients, configs, disk, a node."""

import random
import shutil
import signal
import socket
import subprocess
import time

import yaml
from helpers.app import log_files, make_app
from helpers.nodes import lose_node, three_nodes
from serve_testing import Server

from reliability.measure import LIKE_IMAGE, deploy, row, settled, under_load


def kill(part):
    """A fault: kill -9 of one process whose command line has this part."""

    def fault(server, number):
        random.choice(list(server.processes(part))).kill()

    return fault


def leave_at_once(server, number):
    """200 clients send a request, and close before there is an answer."""
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
    tracer.wait(400)
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
