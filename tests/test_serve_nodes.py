"""The app on a Ray cluster of three nodes: replicas spread, and a node is lost under load."""

import contextlib
import re
import shutil
import sys
import time
from pathlib import Path

import pytest
import yaml

TEMPLATES = Path(__file__).parents[1] / "templates"
sys.path.insert(0, str(TEMPLATES))

from load import Load  # noqa: E402
from serve_process import START, Server  # noqa: E402
from test_template_ray_serve import PAIRS, make_model  # noqa: E402

pytestmark = pytest.mark.xdist_group("ray")


class Cluster(Server):
    """`serve ARGUMENTS` on three nodes of one CPU, each with a raylet of its own."""

    start = re.sub(
        "ray.init.*\n",
        """
import os
from ray.cluster_utils import Cluster
os.makedirs("/tmp/ray", exist_ok=True)  # Cluster writes its address there
head = {"num_cpus": 1, "temp_dir": ray_options["_temp_dir"], "include_dashboard": False}
cluster = Cluster(True, head_node_args=head)
for _ in range(2):
    cluster.add_node(num_cpus=1)
ray.init(address=cluster.address, namespace="serve")
""",
        START,
    ).replace("serve.start(", "serve.start('HeadOnly', ")


@contextlib.contextmanager
def three_nodes(folder):
    """A cluster that answers. Ray gives a node 30 s to start; if that is too little, try again."""
    for tries_left in (2, 1, 0):
        with Cluster(folder, "run", "config.yaml") as running:
            try:
                running.wait()
            except AssertionError as err:
                if "timed out during startup" in str(err) and tries_left:
                    continue
                raise
            yield running
            return


def make_app(folder, replicas=2, **more):
    """Write the server's files and a model that knows the pairs; return the path of the config."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(TEMPLATES / "template_ray_serve.py", folder)
    if not (folder / "model").exists():
        make_model(folder / "model", PAIRS)
    config = yaml.safe_load((TEMPLATES / "serve_config.yaml").read_text())
    deployment = config["applications"][0]["deployments"][0]
    del deployment["autoscaling_config"]
    deployment.update({"num_replicas": replicas, **more})
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder / "config.yaml"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Three replicas, each on its node, behind one proxy: the nodes share one machine's ports."""
    folder = tmp_path_factory.mktemp("nodes")
    make_app(folder, replicas=3, max_replicas_per_node=1)
    with three_nodes(folder) as running:
        yield running


def node(process):
    """The raylet that a process belongs to."""
    return next(parent for parent in process.parents() if parent.name() == "raylet")


def replicas(server):
    return {process: node(process) for process in server.processes("ServeReplica")}


def test_replicas_are_spread_and_all_take_part(server):
    end = time.monotonic() + 60
    while len(replicas(server)) < 3 and time.monotonic() < end:
        time.sleep(0.5)
    found = replicas(server)
    assert len(found) == len(set(found.values())) == 3
    idle = {process: sum(process.cpu_times()[:2]) for process in found}
    while idle and time.monotonic() < end:
        with Load(server.port) as load:
            time.sleep(2)
        assert not load.wrong()
        idle = {
            process: used
            for process, used in idle.items()
            if sum(process.cpu_times()[:2]) < used + 0.05
        }
    assert not idle


def lose_node(server):
    """Kill a raylet and all that runs on it: with a replica, and without the proxy."""
    head = {node(process) for process in server.processes("ProxyActor")}
    lost = next(raylet for raylet in replicas(server).values() if raylet not in head)
    for process in [lost, *lost.children(recursive=True)]:
        process.kill()


def test_a_lost_node_costs_no_more_than_what_it_was_working_on(server):
    with Load(server.port) as load:
        time.sleep(1)
        at = time.monotonic()
        lose_node(server)
        time.sleep(12)
    failed = [(round(answer.end - at, 2), answer.status) for answer in load.lost()]
    print(f"{len(load.answers)} requests, failed after (seconds, status): {failed}")
    assert (
        not load.wrong() and len(failed) <= 4 and all(status in (500, 503) for _, status in failed)
    )  # one a client
    assert all(when < 5 for when, _ in failed) and len(replicas(server)) == 2
