"""What listens in the server's container; without the token, nobody runs anything there."""

import json
import secrets

import pytest
from helpers.images import LABEL, Container
from helpers.remote import pods
from tiny_translator import PAIRS

pytestmark = [pytest.mark.xdist_group("docker"), pytest.mark.slow]

LISTENING = """
import glob, json
found = {}
for name in ("tcp", "tcp6"):
    for line in open(f"/proc/net/{name}").readlines()[1:]:
        address, port = line.split()[1].split(":")
        if line.split()[3] == "0A":
            found[int(port, 16)] = address != "0100007F"
commands = [open(path).read().split(chr(0)) for path in glob.glob("/proc/[0-9]*/cmdline")]
gcs = [part for command in commands for part in command if part.startswith("--gcs-address")]
print(json.dumps([found, gcs]))
"""

INTRUDER = """
import http.client, json, sys
host, ports = sys.argv[1], json.loads(sys.argv[2])
requests = [
    ("POST", "/api/jobs/"),
    ("POST", "/api/job_agent/jobs/"),
    ("PUT", "/api/serve/applications/"),
    ("GET", "/api/v0/logs"),
    ("GET", "/logs/../../etc/passwd"),
    ("POST", "/api/actors/kill"),
]
body = json.dumps({"entrypoint": "touch /tmp/owned", "applications": []})
for port in ports:
    for method, path in requests:
        try:
            line = http.client.HTTPConnection(host, port, timeout=3)
            line.request(method, path, body, {"Content-Type": "application/json"})
            reply = line.getresponse()
            print(port, path, "figures" if reply.read(6) == b"# HELP" else reply.status)
        except (OSError, http.client.HTTPException):
            print(port, path, 0)
"""

DRIVER = """
import sys, ray
try:
    ray.init(address=sys.argv[1], logging_level="ERROR")
    print("connected", ray.get(ray.remote(lambda: 1).remote(), timeout=5))
except BaseException as err:
    print("refused", type(err).__name__, str(err)[:200].replace(chr(10), " "))
"""


def other(image, *options, code, arguments):  # noqa: F811
    """What a Python script prints in another container of the same network."""
    options = [f"--label={LABEL}", "--entrypoint=python", *options]
    return pods.docker("run", "--rm", *options, image, "-c", code, *arguments).stdout


def test_no_port_lets_another_container_run_anything(image):  # noqa: F811
    token = secrets.token_hex(20)
    with Container(f"--env=RAY_AUTH_TOKEN={token}") as running:
        running.wait()
        ports, gcs = json.loads(running.inside("python", "-c", LISTENING).stdout)
        reachable = sorted(int(port) for port, outside in ports.items() if outside)
        print(
            f"{len(ports)} ports, {len(reachable)} of them reachable from the network: {reachable}"
        )
        assert 8000 in reachable and ports["8265"] is False
        address = pods.docker(
            "inspect", running.id, "--format={{.NetworkSettings.IPAddress}}"
        ).stdout.strip()
        answers = other(image, code=INTRUDER, arguments=[address, json.dumps(reachable)]).split(
            "\n"
        )[:-1]
        statuses = {line.rsplit(" ", 1)[1] for line in answers}
        print(statuses)
        assert len(answers) == 6 * len(reachable) and statuses <= {
            "0",
            "figures",
            "401",
            "403",
            "404",
            "405",
        }, answers
        assert "401" in statuses
        (port,) = {part.rpartition(":")[2] for part in gcs}
        said = other(
            image, f"--env=RAY_AUTH_TOKEN={'b' * 32}", code=DRIVER, arguments=[f"{address}:{port}"]
        )
        assert "connected" not in said and "refused" in said, said
        assert "owned" not in running.inside("ls", "/tmp").stdout
        assert running.ask() == (200, {"translation": PAIRS["Hello world!"]})
        assert token not in running.logs()
        found = running.inside(
            "grep", "--recursive", "--files-with-matches", token, "/tmp", "/serve_app"
        )
        assert (found.returncode, found.stdout) == (1, "")  # not in what Ray has written
