"""Measure the throughput of 1, 2 and 4 replicas, each on a node with its own CPU quota.

    PYTHONPATH=templates:tests python bench/replicas.py

Needs Docker: the nodes are containers of the image, started as KubeRay does, a head and workers
with a proxy and one replica each. The model is tiny, so that the overhead of serving shows. The
results are added to results.json and to docs/benchmark.md.
"""

import json
import shutil
import tempfile
import time
from pathlib import Path

import page
from helpers.app import make_app
from helpers.clusters import ContainerCluster
from helpers.images import FILES, LABEL, build
from helpers.load import Load
from helpers.remote import pods
from helpers.repository import TEMPLATES

IMAGE = "template_rayserve_image:bench"
COUNTS = (1, 2, 4)
CPUS = 0.35  # of a worker: four of them leave something to the head and to the clients
WARM_UP, SECONDS = 10, 30
# The CPU seconds and the memory of a worker's processes.
USED = """
import json, ray  # first: it makes its own copy of psutil importable
import psutil
found = {"proxy": 0, "replica": 0, "other": 0, "MB": 0}
for process in psutil.process_iter():
    name = " ".join(process.cmdline())
    kind = "proxy" if "ProxyActor" in name else "replica" if "ServeReplica" in name else "other"
    found[kind] += sum(process.cpu_times()[:2])
    if kind == "replica":
        found["MB"] += process.memory_info().rss / 1e6
print(json.dumps(found))
"""


def used(cluster):
    """Return what all workers have used so far, {"proxy": CPU seconds, ..., "MB": memory}."""
    total = {}
    for worker in cluster.workers.values():
        done = pods.docker("exec", worker, "python", "-c", USED)
        for name, value in json.loads(done.stdout.splitlines()[-1]).items():
            total[name] = total.get(name, 0) + value
    return total


def measure(folder, replicas):
    """Return the figures of a cluster with so many workers."""
    cluster = ContainerCluster(IMAGE, make_app(folder, replicas), replicas)
    try:
        cluster.deploy()
        for worker in cluster.workers.values():
            pods.docker("update", f"--cpus={CPUS}", worker)
        with Load(*cluster.workers, clients=page.CLIENTS_EACH * replicas) as load:
            time.sleep(WARM_UP)
            before, begin, first = used(cluster), time.monotonic(), len(load.answers)
            time.sleep(SECONDS)
            requests, took = len(load.answers) - first, time.monotonic() - begin
            after = used(cluster)
        assert not load.lost() and not load.wrong()
    finally:
        cluster.end()
    cost = {
        f"{part}_ms": round(1000 * (after[part] - before[part]) / requests, 2)
        for part in ("proxy", "replica", "other")
    }
    return {
        "replicas": replicas,
        "requests_per_s": round(requests / took, 1),
        **cost,
        "MB": round(after["MB"] / replicas),
    }


def main():
    folder = Path(tempfile.mkdtemp(prefix="replicas."))
    found = []
    try:
        make_app(folder)
        for name in FILES:
            shutil.copy(TEMPLATES / name, folder)
        build(folder, IMAGE)
        for replicas in COUNTS:
            found.append(measure(folder, replicas))
            print(json.dumps(found[-1]), flush=True)
    finally:
        pods.remove(LABEL)
        pods.docker("image", "rm", IMAGE)
        shutil.rmtree(folder, ignore_errors=True)
    page.add("replicas", {"cpus": CPUS, "results": found})


if __name__ == "__main__":
    main()
