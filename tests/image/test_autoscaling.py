"""Replicas come and go with the load, on four nodes of containers; Prometheus sees each of them.

There is no Kubernetes here. The clients do what its Service does: they ask the workers whose
readiness probe succeeds. KubeRay would also add and remove the workers; here all four are up.
"""

import contextlib
import json
import shutil
import threading
import time

import pytest
import yaml
from helpers.app import with_code_in_call
from helpers.clusters import ContainerCluster
from helpers.images import APP, address
from helpers.load import Load
from helpers.prometheus import Prometheus
from helpers.remote import pods
from helpers.repository import TEMPLATES
from tiny_translator import PAIRS

pytestmark = [
    pytest.mark.xdist_group("docker"),
    pytest.mark.slow,
    pytest.mark.skipif(not shutil.which("prometheus"), reason="no prometheus: install the package"),
]
REPLICAS = 'sum(ray_serve_deployment_replica_healthy{deployment="ModelServer"})'


@pytest.fixture(scope="module")
def cluster(image, tmp_path_factory):
    """Four workers, one replica; a replica for every two requests, decided within seconds."""
    content = yaml.safe_load((TEMPLATES / "serve_config.yaml").read_text("utf-8"))
    scaling = content["applications"][0]["deployments"][0]["autoscaling_config"]
    assert (scaling["min_replicas"], scaling["max_replicas"]) == (1, 4)
    scaling |= {"target_ongoing_requests": 2, "upscale_delay_s": 2, "downscale_delay_s": 10}
    scaling["metrics_interval_s"] = 1
    scaling["look_back_period_s"] = 5
    folder = tmp_path_factory.mktemp("scaling")
    config = folder / "new.yaml"
    config.write_text(yaml.safe_dump(content))
    # A model that takes its time, as a larger one does, and leaves the CPUs to others.
    (folder / "app.py").write_text(with_code_in_call("time.sleep(0.2)"), "utf-8")
    mount = f"--mount=type=bind,source={folder / 'app.py'},target={APP},readonly"
    cluster = ContainerCluster(image, config, 4, mount)
    cluster.config = config
    try:
        yield cluster.deploy(wait=False)
    finally:
        cluster.end()


@pytest.fixture(scope="module")
def prometheus(cluster):
    with Prometheus(*[f"{address(each)}:8080" for each in cluster.ids]) as prometheus:
        yield prometheus


@contextlib.contextmanager
def service(cluster, load):
    """Keep the ports of a load as a Service does: those of the workers that are ready."""
    over = threading.Event()

    def follow():
        while not over.wait(0.3):
            load.ports = cluster.ready() or load.ports

    thread = threading.Thread(target=follow)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(100)


def seconds_until(prometheus, replicas):
    begin = time.monotonic()
    prometheus.wait_for(f"{REPLICAS} == {replicas}", seconds=300)
    return time.monotonic() - begin


def test_from_one_replica_to_four_and_back_no_request_is_lost(cluster, prometheus):
    seconds_until(prometheus, 1)
    assert len(prometheus.wait_for("count(up == 1) == 5")) == 1  # the head and four workers
    with contextlib.ExitStack() as stack:
        few = stack.enter_context(Load(*cluster.ready(), clients=1))
        stack.enter_context(service(cluster, few))
        with Load(*cluster.ready(), clients=12) as many, service(cluster, many):
            up = seconds_until(prometheus, 4)
            prometheus.wait_for("count(count by (replica) (ray_translator_served)) == 4")
            time.sleep(5)
        down = seconds_until(prometheus, 1)
    answers = few.answers + many.answers
    lost = few.lost() + many.lost()
    print(
        f"1 to 4 replicas in {up:.0f} s, back in {down:.0f} s: "
        f"{len(answers)} requests, {len(lost)} lost"
    )
    assert not lost
    assert not few.wrong() and not many.wrong()
    # All four have answered.
    served = prometheus.query(
        "count(sum by (replica) (increase(ray_translator_texts_total[5m])) > 0)"
    )
    assert served[0][1] >= 4


def test_a_node_is_drained_without_a_lost_request(cluster, prometheus):
    """As `kubectl drain` does: no more requests, then SIGTERM, then the worker is gone."""
    with Load(*cluster.ready(), clients=8) as load, service(cluster, load):
        seconds_until(prometheus, 4)
        time.sleep(3)
        port, container = list(cluster.workers.items())[-1]
        del cluster.workers[port]  # Kubernetes takes a pod that ends out of its Service
        load.ports = cluster.ready()
        time.sleep(2)
        begin = time.monotonic()
        pods.docker("stop", "--time=100", container, seconds=200)
        ended = time.monotonic() - begin
        prometheus.wait_for("count(up == 1) == 4")
        time.sleep(5)
    lost = load.lost()
    print(f"drained in {ended:.0f} s: {len(load.answers)} requests, {len(lost)} lost")
    assert not load.wrong()
    # Proxies on other nodes had sent it requests: at most one for each client.
    assert len(lost) <= 8


def test_to_no_replica_and_back(cluster, prometheus):
    """Only the head has a proxy then: a Service that leaves out the head has nobody to ask."""
    content = yaml.safe_load(cluster.config.read_text())
    scaling = content["applications"][0]["deployments"][0]["autoscaling_config"]
    scaling |= {"min_replicas": 0, "downscale_delay_s": 2}
    cluster.config.write_text(yaml.safe_dump(content))  # the head has it mounted
    cluster.deploy(wait=False)
    seconds_until(prometheus, 0)
    assert cluster.ready() == []
    ask = (
        "import urllib.request as u; request = u.Request('http://127.0.0.1:8000/translate', "
        "b'{\"text\": \"Hello world!\"}', {'Content-Type': 'application/json'}); "
        "print(u.urlopen(request, timeout=100).read().decode())"
    )
    begin = time.monotonic()
    done = pods.docker("exec", cluster.head, "python", "-c", ask, seconds=200)
    print(f"without a replica, the first request takes {time.monotonic() - begin:.0f} s")
    assert json.loads(done.stdout) == {"translation": PAIRS["Hello world!"]}
