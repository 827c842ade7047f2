"""The image of the server, built by Docker, and containers of it."""

import http.client
import json
import os
import subprocess
import time

from helpers.loopback import build_options
from helpers.remote import pods
from serve_testing import free_port

IMAGE = "template_rayserve_image:test"
LABEL = f"template-serve-test={os.getpid()}"  # of what this process starts
FILES = (
    "Dockerfile-rayserve",
    ".dockerignore",
    "requirements-rayserve.txt",
    "template_ray_serve.py",
    "check_serve_config.py",
    "rayserve_entrypoint.py",
    "serve_config.yaml",
)
APP = "/serve_app/template_ray_serve.py"  # in the image
CANARY = "canary-" + "7f3a" * 8
SMALL = ("--env=OMP_NUM_THREADS=1",)
RUN = ("serve", "run", "serve_config.yaml")


def mounted(folder):
    """Options that put this folder's config in the place of the image's."""
    name = "serve_config.yaml"
    return [f"--mount=type=bind,source={folder / name},target=/serve_app/{name}"]


def build(folder, tag):
    """`docker build` as documented; (seconds, output)."""
    begin = time.monotonic()
    with build_options() as options:
        done = pods.docker(
            "build",
            *options,
            "-t",
            tag,
            "-f",
            str(folder / "Dockerfile-rayserve"),
            str(folder),
            seconds=900,
        )
    assert done.returncode == 0, done.stdout[-5000:]
    return time.monotonic() - begin, done.stdout


def described(image):
    """Return what Docker tells about an image and its layers."""
    inspected = pods.docker("image", "inspect", image).stdout
    return inspected + pods.docker("history", "--no-trunc", image).stdout


def saved(image):
    """Return the bytes of all layers of an image."""
    with subprocess.Popen(["docker", "save", image], stdout=subprocess.PIPE) as process:
        return b"".join(iter(lambda: process.stdout.read(1 << 24), b""))


def address(container):
    """Return the address of a container, by which this machine reaches it."""
    form = "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}"
    return pods.docker("inspect", container, f"--format={form}").stdout.strip()


class Container:
    """`docker run` of the image, removed at the end."""

    def __init__(self, *options, image=IMAGE, command=(), publish=True):
        self.port = free_port()
        ports = [f"--publish=127.0.0.1:{self.port}:8000"] if publish else []
        done = pods.docker(
            "run", "--detach", f"--label={LABEL}", *SMALL, *ports, *options, image, *command
        )
        assert done.returncode == 0, done.stdout
        self.id = done.stdout.split()[-1]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pods.docker("rm", "--force", "--volumes", self.id)

    def inside(self, *command, seconds=400):
        return pods.docker("exec", self.id, *command, seconds=seconds)

    def state(self, part):
        return pods.docker("inspect", self.id, f"--format={{{{.State.{part}}}}}").stdout.strip()

    def post(self, route, body, timeout=30):
        """Return (status, answer or None if it is not ours); status 0: no answer."""
        line = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        headers = {"Content-Type": "application/json"}
        try:
            line.request("POST", route, json.dumps(body), headers)
            reply = line.getresponse()
            ours = reply.getheader("Content-Type") == "application/json"
            return reply.status, json.loads(reply.read()) if ours else None
        except (OSError, http.client.HTTPException):
            return 0, None
        finally:
            line.close()

    def ask(self, text="Hello world!", timeout=30):
        """Send a text to the translator; return (status, answer)."""
        return self.post("/translate", {"text": text}, timeout)

    def ask_inside(self, text="Hello world!"):
        """The same from within, for a container without a network."""
        code = (
            "import json, sys, urllib.request as u; body = json.dumps({'text': sys.argv[1]}); "
            "request = u.Request('http://127.0.0.1:8000/translate', body.encode(), "
            "{'Content-Type': 'application/json'}); "
            "print(u.urlopen(request, timeout=30).read().decode())"
        )
        done = self.inside("python", "-c", code, text)
        return (200, json.loads(done.stdout)) if done.returncode == 0 else (0, done.stdout)

    def logs(self):
        return pods.docker("logs", self.id).stdout

    def wait(self, ask=None):
        """Wait until it translates."""
        assert self.first_answer(ask or self.ask) == {"translation": "Bonjour le monde !"}
        return self

    def first_answer(self, ask, seconds=400):
        """Wait until `ask()` gets status 200; return the answer."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.state("Running") == "true":
            status, answer = ask()
            if status == 200:
                return answer
            time.sleep(0.5)
        raise AssertionError(self.logs()[-5000:])
