"""A Ray cluster of containers of the image, started as KubeRay does: loss, roll-out, roll-back.

There is no Kubernetes here. The clients do what its Service does: they ask the workers that run.
"""

import shutil
import time

import pytest
import yaml
from helpers.clusters import ContainerCluster
from helpers.images import build
from helpers.load import Load
from helpers.remote import pods
from helpers.repository import TEMPLATES
from tiny_translator import PAIRS, make_model

pytestmark = [pytest.mark.xdist_group("docker"), pytest.mark.slow]
NEW_IMAGE = "template_rayserve_image:next"
NEW_PAIRS = {**PAIRS, "Hello world!": "Salut le monde !"}


def config(folder, replicas):
    """Write a config for so many replicas; return its path."""
    content = yaml.safe_load((TEMPLATES / "serve_config.yaml").read_text())
    content["applications"][0]["deployments"][0]["autoscaling_config"].update(
        {"min_replicas": replicas, "max_replicas": replicas}
    )
    path = folder / f"{replicas}.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture
def new_image(image, project, tmp_path):  # noqa: F811
    """The next version: the same code with another model."""
    folder = shutil.copytree(project, tmp_path / "next")
    shutil.rmtree(folder / "model")
    make_model(folder / "model", NEW_PAIRS)
    build(folder, NEW_IMAGE)
    yield NEW_IMAGE
    pods.docker("image", "rm", NEW_IMAGE)


def ports(cluster):
    return list(cluster.workers)


def test_loss_of_a_worker_then_a_new_version_and_back(image, new_image, tmp_path):  # noqa: F811
    clusters = [ContainerCluster(image, config(tmp_path, replicas=2), workers=2)]
    try:
        first = clusters[0].deploy()
        healthz = "import urllib.request as u; print(u.urlopen('http://worker0:52365/api/local_raylet_healthz').read())"
        # The probe of rayservice.yaml.
        assert "success" in pods.docker("exec", first.head, "python", "-c", healthz).stdout

        # A node is lost: what Kubernetes sees by its readiness probe, the clients here see at once.
        with Load(*ports(first), pause=0.05) as load:
            time.sleep(3)
            lost, killed = load.ports[1], time.monotonic()
            pods.docker("kill", first.workers[lost])
            load.ports = load.ports[:1]
            at = time.monotonic()
            time.sleep(10)
        failed = load.lost()
        elsewhere = [answer for answer in failed if answer.port != lost]
        print(
            f"worker killed: {len(load.answers)} requests, {len(failed)} lost, "
            f"{len(elsewhere)} of them elsewhere"
        )
        # At most one in flight per client; what begins while `docker kill` runs is refused.
        assert len([answer for answer in failed if answer.begin < killed]) <= 4
        assert not load.wrong() and not [answer for answer in elsewhere if answer.end > at + 5]
        assert not [
            answer for answer in failed if answer.port == lost and answer.begin > at
        ]  # the clients know by then

        for version, expected in ((new_image, NEW_PAIRS), (image, PAIRS)):  # forward, and back
            old = clusters[-1]
            with Load(*load.ports, pause=0.05) as load:
                one = config(tmp_path, replicas=1)
                clusters.append(ContainerCluster(version, one, workers=1))
                clusters[-1].deploy()
                at = time.monotonic()
                load.ports = ports(clusters[-1])
                time.sleep(3)
                old.end()
                time.sleep(2)
            print(f"to {version}: {len(load.answers)} requests, {len(load.lost())} failed")
            assert not load.lost()
            assert all(
                answer.translation in (PAIRS[answer.text], NEW_PAIRS[answer.text])
                for answer in load.answers
            )
            assert all(
                answer.translation == expected[answer.text]
                for answer in load.answers
                if answer.begin > at + 2
            )
    finally:
        for cluster in clusters:
            cluster.end()
