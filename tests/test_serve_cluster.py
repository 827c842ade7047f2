"""A Ray cluster of containers of the image, started as KubeRay does: loss, roll-out, roll-back.

There is no Kubernetes here. The clients do what its Service does: they ask the workers that run.
"""

import http.client
import shutil
import sys
import time
import uuid
from pathlib import Path

import pytest
import yaml
from load import Load
from remote import pods
from test_serve_image import LABEL, build, image, project  # noqa: F401

TEMPLATES = Path(__file__).parents[1] / "templates"
sys.path.insert(0, str(TEMPLATES))

from serve_process import free_port  # noqa: E402
from test_template_ray_serve import PAIRS, make_model  # noqa: E402

pytestmark = pytest.mark.xdist_group("docker")
NEW_IMAGE = "template_rayserve_image:next"
NEW_PAIRS = {**PAIRS, "Hello world!": "Salut le monde !"}
TOKEN = ["--env=RAY_AUTH_MODE=token", f"--env=RAY_AUTH_TOKEN={'a' * 32}"]


class Cluster:
    """A head without replicas and workers with one CPU each, on a network of their own."""

    def __init__(self, tag, config, workers):
        self.name = f"template-serve-{uuid.uuid4().hex[:8]}"
        assert pods.docker("network", "create", f"--label={LABEL}", self.name).returncode == 0
        self.ids, self.workers, self.tag = [], {}, tag
        # KubeRay's own commands, but for the addresses; the config as serveConfigV2 holds it.
        self.head = self.start(
            "head",
            [f"--volume={config}:/serve_app/new.yaml:ro"],
            "start",
            "--head",
            "--num-cpus=0",
            "--block",
        )
        for number in range(workers):
            port = free_port()
            self.workers[port] = self.start(
                f"worker{number}",
                [f"--publish=127.0.0.1:{port}:8000"],
                "start",
                "--address=head:6379",
                "--num-cpus=1",
                "--block",
            )

    def start(self, name, options, *command):
        done = pods.docker(
            "run",
            "--detach",
            f"--label={LABEL}",
            f"--network={self.name}",
            f"--network-alias={name}",
            "--env=OMP_NUM_THREADS=1",
            "--shm-size=128m",
            "--read-only",
            "--tmpfs=/tmp",
            "--cap-drop=ALL",
            *TOKEN,
            *options,
            "--entrypoint=ray",
            self.tag,
            *command,
        )
        assert done.returncode == 0, done.stdout
        self.ids.append(done.stdout.split()[-1])
        return self.ids[-1]

    def deploy(self):
        """Run the documented deploy command in the head; wait until all workers answer."""
        end = time.monotonic() + 100
        while True:
            done = pods.docker(
                "exec",
                self.head,
                "python",
                "check_serve_config.py",
                "new.yaml",
                "--deploy",
                "http://127.0.0.1:8265",
                seconds=200,
            )
            if "Failed to connect to Ray" not in done.stdout or time.monotonic() > end:
                break
            time.sleep(1)
        assert done.returncode == 0, done.stdout
        for port in self.workers:
            wait_for(port)
        return self

    def end(self):
        if self.ids:
            pods.docker("stop", "--time=30", *self.ids, seconds=100)
            pods.docker("rm", "--force", "--volumes", *self.ids)
            pods.docker("network", "rm", self.name)
        self.ids = []


@pytest.fixture
def config(tmp_path):
    content = yaml.safe_load((TEMPLATES / "serve_config.yaml").read_text())
    content["applications"][0]["deployments"][0]["autoscaling_config"].update(
        {"min_replicas": 2, "max_replicas": 2}
    )
    (tmp_path / "new.yaml").write_text(yaml.safe_dump(content))
    return tmp_path / "new.yaml"


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


def test_loss_of_a_worker_then_a_new_version_and_back(image, new_image, config):  # noqa: F811
    clusters = [Cluster(image, config, workers=2)]
    try:
        first = clusters[0].deploy()
        healthz = "import urllib.request as u; print(u.urlopen('http://worker0:52365/api/local_raylet_healthz').read())"
        # The probe of rayservice.yaml.
        assert "success" in pods.docker("exec", first.head, "python", "-c", healthz).stdout

        # A node is lost: what Kubernetes sees by its readiness probe, the clients here see at once.
        with Load(*ports(first)) as load:
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
            with Load(*load.ports) as load:
                clusters.append(Cluster(version, config, workers=2))
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


def wait_for(port, seconds=60):
    """As a readiness probe does."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        line = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        try:
            line.request("GET", "/translate/health")
            if line.getresponse().status == 200:
                return
        except (OSError, http.client.HTTPException):
            pass
        finally:
            line.close()
        time.sleep(0.5)
    raise AssertionError(f"no worker at {port}")
