"""A Ray cluster of containers of the image, started as KubeRay does."""

import http.client
import time
import uuid

from helpers.images import LABEL
from helpers.remote import pods
from serve_testing import free_port

TOKEN = ["--env=RAY_AUTH_MODE=token", f"--env=RAY_AUTH_TOKEN={'a' * 32}"]


class ContainerCluster:
    """A head without replicas and workers with one CPU each, on a separate network."""

    def __init__(self, tag, config, workers, *options):
        self.name = f"template-serve-{uuid.uuid4().hex[:8]}"
        assert pods.docker("network", "create", f"--label={LABEL}", self.name).returncode == 0
        self.ids, self.workers, self.tag, self.options = [], {}, tag, options
        # KubeRay's own commands, but for the addresses; the config as serveConfigV2 holds it.
        self.head = self.start(
            "head",
            [f"--volume={config}:/serve_app/new.yaml:ro"],
            "start",
            "--head",
            "--num-cpus=0",
            "--metrics-export-port=8080",
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
                "--metrics-export-port=8080",
                "--block",
            )

    def start(self, name, options, *command):
        done = pods.docker(
            "run",
            "--detach",
            "--restart=on-failure:5",  # as Kubernetes does; Ray gives a node 30 s to start
            f"--label={LABEL}",
            f"--network={self.name}",
            f"--network-alias={name}",
            "--env=OMP_NUM_THREADS=1",
            "--shm-size=128m",
            "--read-only",
            "--tmpfs=/tmp",
            "--cap-drop=ALL",
            *TOKEN,
            *self.options,
            *options,
            "--entrypoint=ray",
            self.tag,
            *command,
        )
        assert done.returncode == 0, done.stdout
        self.ids.append(done.stdout.split()[-1])
        return self.ids[-1]

    def ready(self):
        """Return the ports of the workers that take requests, by the probe of rayservice.yaml."""
        return [port for port in list(self.workers) if answers(port, "/-/healthz")]

    def deploy(self, wait=True):
        """Run the documented deploy command in the head; wait until all workers answer."""
        end = time.monotonic() + 400
        while True:
            done = pods.docker(
                "exec",
                self.head,
                "python",
                "check_serve_config.py",
                "new.yaml",
                "--deploy",
                "http://127.0.0.1:8265",
                seconds=400,
            )
            if "Failed to connect to Ray" not in done.stdout or time.monotonic() > end:
                break
            time.sleep(1)
        assert done.returncode == 0, done.stdout
        for port in self.workers if wait else ():
            wait_for(port)
        return self

    def end(self):
        if self.ids:
            pods.docker("stop", "--time=30", *self.ids, seconds=400)
            pods.docker("rm", "--force", "--volumes", *self.ids)
            pods.docker("network", "rm", self.name)
        self.ids = []


def wait_for(port, seconds=400):
    """Wait until a worker answers for the app."""
    end = time.monotonic() + seconds
    while not answers(port, "/translate/health"):
        assert time.monotonic() < end, f"no worker at {port}"
        time.sleep(0.5)


def answers(port, path):
    """Return True if a request for `path` gets status 200."""
    line = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        line.request("GET", path)
        return line.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        line.close()
