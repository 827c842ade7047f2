"""A Ray cluster of three nodes on this machine."""

import contextlib
import re

from serve_testing import START, Server


class ThreeNodes(Server):
    """`serve ARGUMENTS` on three nodes of one CPU, each with its own raylet."""

    start = re.sub(
        "^for tries_left.*?(?=^serve)",
        """
import os, tempfile
from ray.cluster_utils import Cluster
os.makedirs(tempfile.gettempdir() + "/ray", exist_ok=True)  # Cluster writes its address there
head = {"num_cpus": 1, "temp_dir": ray_options["_temp_dir"], "include_dashboard": False}
cluster = Cluster(True, head_node_args=head)
for _ in range(2):
    cluster.add_node(num_cpus=1)
ray.init(address=cluster.address, namespace="serve")
""",
        START,
        flags=re.DOTALL | re.MULTILINE,
    ).replace("serve.start(", "serve.start('HeadOnly', ")


@contextlib.contextmanager
def three_nodes(folder):
    """A cluster that answers. Ray gives a node 30 s to start; if that is too little, try again."""
    for tries_left in (2, 1, 0):
        with ThreeNodes(folder, "run", "config.yaml") as running:
            try:
                running.wait()
            except AssertionError as err:
                if "timed out during startup" in str(err) and tries_left:
                    continue
                raise
            yield running
            return


def node(process):
    """The raylet that a process belongs to."""
    return next(parent for parent in process.parents() if parent.name() == "raylet")


def replicas(server):
    return {process: node(process) for process in server.processes("ServeReplica")}


def lose_node(server):
    """Kill a raylet and all that runs on it: with a replica, and without the proxy."""
    head = {node(process) for process in server.processes("ProxyActor")}
    lost = next(raylet for raylet in replicas(server).values() if raylet not in head)
    for process in [lost, *lost.children(recursive=True)]:
        process.kill()
