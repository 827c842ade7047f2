"""What a request costs besides the model, on 1, 2 and 3 Ray nodes: `make bench`.

    python scale.py [--requests N]

The nodes are raylets on one machine, with one replica each. More nodes cannot exceed its CPUs, so
compare the CPU time per request, which should stay the same. The model is small, to make the other
costs visible. Afterwards, the memory after many requests is measured.
"""

import argparse
import asyncio
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil

import bench

HERE = Path(__file__).parent
NODES = """
import sys, threading
import ray
from ray import serve
from ray.cluster_utils import Cluster
from template_ray_serve import ModelServer, Settings

folder, port, nodes, replicas = sys.argv[1], *map(int, sys.argv[2:])
head = {"num_cpus": replicas, "temp_dir": f"{folder}/ray", "include_dashboard": False}
cluster = Cluster(True, head_node_args=head)
for _ in range(nodes - 1):
    cluster.add_node(num_cpus=replicas)
ray.init(address=cluster.address, namespace="serve")
serve.start("HeadOnly", {"host": "127.0.0.1", "port": port})
app = ModelServer.options(num_replicas=nodes * replicas, max_replicas_per_node=replicas)
serve.run(app.bind(Settings(model=f"{folder}/model", max_new_tokens=20)), route_prefix="/translate")
threading.Event().wait()
"""


class Nodes(bench.Server):
    """The template on so many nodes, with so many replicas each."""

    def __init__(self, folder, nodes, replicas=1):
        command = ["-c", NODES, str(folder), str(bench.PORT), str(nodes), str(replicas)]
        super().__init__("template", folder, (None, lambda _: (command, HERE.parent / "templates")))

    def processes(self, part=""):
        return [
            process
            for process in psutil.process_iter()
            if self.ours(process) and part in " ".join(process.cmdline())
        ]

    def cpu_seconds(self):
        return sum(sum(process.cpu_times()[:2]) for process in self.processes())


def memory_of_weights(process):
    """(MB of the weights that a process has mapped, its share where others have them too)."""
    part = re.findall(
        r"\S+ \S+ \S+ \S+ \S+ +\S*\.safetensors\n(?:\w+: .*\n)*",
        Path(f"/proc/{process.pid}/smaps").read_text(),
    )
    text = "".join(part)
    return [
        sum(map(int, re.findall(rf"^{key}: +(\d+)", text, re.M))) / 1000 for key in ("Rss", "Pss")
    ]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=10_000, help="for the figures of memory")
    requests = parser.parse_args().requests
    folder = Path(tempfile.mkdtemp(prefix="bench.", dir="/tmp"))
    try:
        subprocess.run([sys.executable, HERE / "model.py", folder / "model", "small"], check=True)
        print(
            f"{'nodes':>5} {'requests/s':>10} {'p50 ms':>7} {'p99 ms':>7} "
            f"{'CPU ms a request':>17} {'errors':>6}"
        )
        for nodes in (1, 2, 3):
            with Nodes(folder, nodes) as server:
                asyncio.run(bench.closed_loop("template", 32, "equal", 5))
                before, seconds = server.cpu_seconds(), 10
                found = asyncio.run(bench.closed_loop("template", 32, "equal", seconds))
                # closed_loop also asks for 2 s before it counts
                cost = (
                    1000
                    * (server.cpu_seconds() - before)
                    / (found["requests_per_s"] * (seconds + 2))
                )
                print(
                    f"{nodes:5} {found['requests_per_s']:10.0f} {found['p50_ms']:7.0f} "
                    f"{found['p99_ms']:7.0f} "
                    f"{cost:17.1f} {found['errors']:6}",
                    flush=True,
                )
                if nodes == 1:
                    memory(server, found["requests_per_s"], requests)
        subprocess.run([sys.executable, HERE / "model.py", folder / "model"], check=True)
        with Nodes(folder, 1, replicas=2) as server:
            # Weights that are not used yet are not read yet.
            asyncio.run(bench.closed_loop("template", 8, "equal", 5))
            for process in server.processes("ServeReplica"):
                mapped, share = memory_of_weights(process)
                print(
                    f"one of two replicas on a node: {mapped:.0f} MB of weights mapped, "
                    f"its share {share:.0f} MB"
                )
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def memory(server, rate, requests):
    """Print the memory of replica and proxy before and after so many requests."""

    def sizes():
        return {
            name: round(process.memory_info().rss / 1e6)
            for name in ("ServeReplica", "ProxyActor")
            for process in server.processes(name)
        }

    before = sizes()
    asyncio.run(bench.closed_loop("template", 32, "equal", requests / rate))
    print(
        f"MB before and after {requests} requests:",
        json.dumps(before),
        json.dumps(sizes()),
        flush=True,
    )


if __name__ == "__main__":
    main()
