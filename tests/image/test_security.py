"""What listens in the server's container; without the token, nobody runs anything there."""

import json
import secrets

import pytest
from helpers.images import LABEL, Container, address
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


@pytest.fixture(scope="module")
def token():
    return secrets.token_hex(20)


@pytest.fixture(scope="module")
def running(image, token):
    with Container(f"--env=RAY_AUTH_TOKEN={token}", "--publish=127.0.0.1::8265") as running:
        yield running.wait()


def other(image, *options, code, arguments):
    """What a Python script prints in another container of the same network."""
    options = [f"--label={LABEL}", "--entrypoint=python", *options]
    return pods.docker("run", "--rm", *options, image, "-c", code, *arguments).stdout


def test_no_port_lets_another_container_run_anything(image, running, token):
    ports, gcs = json.loads(running.inside("python", "-c", LISTENING).stdout)
    reachable = sorted(int(port) for port, outside in ports.items() if outside)
    print(f"{len(ports)} ports, {len(reachable)} of them reachable from the network: {reachable}")
    assert 8000 in reachable and ports["8265"] is False
    said = other(image, code=INTRUDER, arguments=[address(running.id), json.dumps(reachable)])
    answers = said.split("\n")[:-1]
    statuses = {line.rsplit(" ", 1)[1] for line in answers}
    print(statuses)
    assert len(answers) == 6 * len(reachable), answers
    assert statuses <= {"0", "figures", "401", "403", "404", "405"}, answers
    assert "401" in statuses
    (port,) = {part.rpartition(":")[2] for part in gcs}
    wrong = f"--env=RAY_AUTH_TOKEN={'b' * 32}"
    said = other(image, wrong, code=DRIVER, arguments=[f"{address(running.id)}:{port}"])
    assert "connected" not in said and "refused" in said, said
    assert "owned" not in running.inside("ls", "/tmp").stdout
    assert running.ask() == (200, {"translation": PAIRS["Hello world!"]})
    assert token not in running.logs()
    written = ["/tmp", "/serve_app"]  # also by Ray
    found = running.inside("grep", "--recursive", "--files-with-matches", token, *written)
    assert (found.returncode, found.stdout) == (1, "")


SUBMIT = """
import sys, urllib.error, urllib.request
headers = {"Content-Type": "application/json"}
address = f"http://{sys.argv[1]}:8265/api/jobs/"
request = urllib.request.Request(address, b'{"entrypoint": "id"}', headers)
try:
    print(urllib.request.urlopen(request, timeout=5).status)
except urllib.error.HTTPError as error:
    print(error.code)
except OSError:
    print("refused")
"""


def test_nobody_else_reaches_the_dashboard(image, running):
    """Port 8265 runs code for whoever reaches it: it listens inside only, and wants a token."""
    assert other(image, code=SUBMIT, arguments=[address(running.id)]).strip() == "refused"
    assert running.inside("python", "-c", SUBMIT, "127.0.0.1").stdout.strip() in ("401", "403")
