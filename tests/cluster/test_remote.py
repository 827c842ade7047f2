"""The flow on a cluster: compiled for a schedule, started by `run`, in the image of Dockerfile.

No cloud is needed. S3 and the secrets are moto's; tests/helpers/remote has the stand-ins
for Argo Workflows (argo.py), the Kubernetes API (jobs.py) and Outerbounds' own server (extension/).
What they start are Metaflow's own commands.
"""

import base64
import contextlib
import gzip
import hashlib
import http.server
import json
import logging
import os
import pickle
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request

import boto3
import psutil
import pytest
from flow_testing import with_toy, write_toy
from helpers.flows import epochs
from helpers.images import described, saved
from helpers.leaks import find
from helpers.loopback import build_options, served
from helpers.remote import argo, jobs, pods
from helpers.repository import ROOT, TEMPLATES
from helpers.s3 import EXTENSION, KEYS, READ_RUN
from moto.server import ThreadedMotoServer

logging.getLogger("werkzeug").setLevel("ERROR")
IMAGE = "template_flow_image:test"
CANARY = secrets.token_hex(20)  # a key that belongs in the environment of a step, nowhere else
LABEL = f"template-flow-test={CANARY[:8]}"
SHOW_KEY = 'print("key", hashlib.sha256(os.environ["WANDB_API_KEY"].encode()).hexdigest())'
KEY_SHOWN = f"key {hashlib.sha256(CANARY.encode()).hexdigest()}"
WITH_IMAGE = {"IMAGE = None": f"IMAGE = {IMAGE!r}"}
NVIDIA = '    @nvidia(gpu=GPUS, gpu_type="L40S")\n'
KUBERNETES = "    @kubernetes(image=IMAGE, gpu=GPUS or None, memory=16_000, disk=20_000)\n"
PYPI = '    @pypi(python="3.11", packages=requirements.packages)\n'
OWN_GPUS = {NVIDIA: ""}
EVALUATE = """    # Larger models: raise memory and disk, both in MB.
    @kubernetes(image=IMAGE, cpu=2"""
docker_test = pytest.mark.xdist_group("docker, flow")


def edited(folder, changes, toy=False):
    """Copy the flow into `folder`, replace some of its text as a user would; return its path."""
    text = (TEMPLATES / "template_flow.py").read_text("utf-8")
    if toy:
        text = with_toy(text)
    for old, new in changes.items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    (folder / "template_flow.py").write_text(text, "utf-8")
    shutil.copy(TEMPLATES / "requirements.outerbounds.txt", folder)
    return folder / "template_flow.py"


def profile(folder, **more):
    """The environment of somebody whose Metaflow is configured for a cluster."""
    home = folder / "metaflowconfig"
    home.mkdir(exist_ok=True)
    settings = {
        "METAFLOW_DEFAULT_DATASTORE": "s3",
        "METAFLOW_DATASTORE_SYSROOT_S3": "s3://flows/metaflow",
        "METAFLOW_DATATOOLS_S3ROOT": "s3://flows/data",
        "METAFLOW_KUBERNETES_NAMESPACE": "default",
        "OBP_PERIMETER": "tests",
        "OBP_AUTH_SERVER": "auth.invalid",
        "METAFLOW_SERVICE_AUTH_KEY": "none",
    }
    settings["OBP_INTEGRATIONS_URL"] = more.pop("integrations", "http://127.0.0.1:9")
    (home / "config_cluster.json").write_text(json.dumps(settings))
    return {
        "PATH": os.environ["PATH"],
        "HOME": str(folder),
        "METAFLOW_HOME": str(home),
        "METAFLOW_PROFILE": "cluster",
        "METAFLOW_USER": "test",
        "PYTHONPATH": str(EXTENSION),
        "STAND_IN_CLUSTER": "http://127.0.0.1:9",
        "METAFLOW_CLIENT_CACHE_PATH": str(folder / "cache"),
        **KEYS,
        **more,
    }


def metaflow(flow, *arguments, seconds=400, **environment):
    """Run a command of the flow; return (exit code, its output, what it said beside)."""
    process = subprocess.Popen(
        [sys.executable, str(flow), *arguments],
        cwd=flow.parent,
        text=True,
        encoding="utf-8",
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        output, said = process.communicate(timeout=seconds)
        return process.returncode, output, said
    finally:
        with contextlib.suppress(
            ProcessLookupError
        ):  # `run` leaves its launcher when it is told to stop
            os.killpg(process.pid, signal.SIGKILL)


# Before any work


REFUSED = {
    "@nvidia on a schedule": (
        {KUBERNETES: ""},
        ("argo-workflows", "create", "--only-json"),
        "step train: @nvidia cannot be scheduled; use @kubernetes(gpu=1, memory=16_000)",
    ),
    "@nvidia without the packages": (
        {KUBERNETES + PYPI: KUBERNETES},
        ("run",),
        "step train: @nvidia has what @pypi lists, add: ['accelerate', 'outerbounds',",
    ),
    "an image under --environment=pypi": (
        WITH_IMAGE | OWN_GPUS,
        ("--environment=pypi", "run"),
        "--environment=pypi hides the packages of the image; drop image= or --environment",
    ),
    "an image under --environment conda": (
        WITH_IMAGE,
        ("--environment", "conda", "argo-workflows", "create", "--only-json"),
        "--environment=conda hides the packages of the image; drop image= or --environment",
    ),
    "an image and @pypi": (
        {EVALUATE: EVALUATE.replace("IMAGE", repr(IMAGE))},
        ("--environment=pypi", "show"),
        "--environment=pypi hides the packages of the image; drop image= or --environment",
    ),
    "an image for @nvidia": (
        {"nvidia(gpu=GPUS,": f"nvidia(image={IMAGE!r}, gpu=GPUS,"},
        ("run",),
        "Decorator 'nvidia' does not support the attribute 'image'.",
    ),
    "@pypi without an environment": (
        {},
        ("run",),
        "@pypi decorator requires --environment=conda or --environment=pypi or",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_is_refused_before_any_work(case, tmp_path):
    changes, arguments, expected = REFUSED[case]
    code, output, said = metaflow(
        edited(tmp_path, changes), "--no-pylint", *arguments, **profile(tmp_path)
    )
    assert code != 0 and expected in " ".join((output + said).split()), output + said
    assert "Workflow starting" not in output + said


def decorators(output):
    """Return {step: its decorators} of what `show` prints."""
    found = re.findall(r"((?:@\w+\n)*)Step (\w+)\n", output)
    return {
        step: set(lines.replace("@", "").split()) - {"fast_bakery_internal"}
        for lines, step in found
    }


PLACES = {
    # name: (changes, environment, decorators of train, those of evaluate)
    "by hand": ({}, {}, {"pypi", "nvidia", "secrets", "retry"}, {"pypi", "kubernetes", "secrets"}),
    "scheduled": (
        {},
        {"ARGO_WORKFLOW_NAME": "templateflow"},
        {"pypi", "kubernetes", "secrets", "retry"},
        {"pypi", "kubernetes", "secrets"},
    ),
    "by hand without GPUs": (
        {"GPUS = 1": "GPUS = 0"},
        {},
        {"pypi", "kubernetes", "secrets", "retry"},
        {"pypi", "kubernetes", "secrets"},
    ),
    "by hand on your own GPUs": (
        OWN_GPUS,
        {},
        {"pypi", "kubernetes", "secrets", "retry"},
        {"pypi", "kubernetes", "secrets"},
    ),
    "by hand, with an image": (
        WITH_IMAGE,
        {},
        {"pypi", "nvidia", "secrets", "retry"},  # @nvidia takes no image
        {"kubernetes", "secrets"},
    ),
    "scheduled, with an image": (
        WITH_IMAGE,
        {"ARGO_WORKFLOW_NAME": "templateflow"},
        {"kubernetes", "secrets", "retry"},
        {"kubernetes", "secrets"},
    ),
    "on a laptop": (
        {},
        {"METAFLOW_DEFAULT_ENVIRONMENT": "local", "METAFLOW_DEFAULT_DATASTORE": "local"},
        set(),
        set(),
    ),
}


@pytest.mark.parametrize("place", PLACES)
def test_the_decorators_that_fit_the_place_stay(place, tmp_path):
    changes, settings, train, evaluate = PLACES[place]
    environment = profile(tmp_path, STAND_IN_NVIDIA="1", METAFLOW_DEFAULT_ENVIRONMENT="fast-bakery")
    flow = edited(tmp_path, changes)
    code, output, said = metaflow(flow, "show", **environment | settings)
    assert code == 0 and decorators(output + said) == {
        "start": set(),
        "prepare": {"kubernetes"} & evaluate,
        "train": {"card", "checkpoint"} | train,
        "evaluate": {"card"} | evaluate,
        "end": set(),
    }, output + said


# With a datastore


class Bakery(http.server.BaseHTTPRequestHandler):
    """Outerbounds' image bakery: takes packages, answers with the name of an image."""

    def log_message(self, *_):
        pass

    def do_POST(self):
        self.server.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(200)
        self.end_headers()
        answer = {"success": {"containerImage": IMAGE, "pythonPath": "python"}}
        self.wfile.write(json.dumps(answer).encode())


class Integrations(http.server.BaseHTTPRequestHandler):
    """Outerbounds' list of integrations: says in which store the secret is."""

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.rfile.read(int(self.headers["Content-Length"]))  # else the connection breaks
        self.send_response(200)
        self.end_headers()
        self.wfile.write(
            b'{"secret_resource_id": "wandb", "secret_backend_type": "aws-secrets-manager"}'
        )


@pytest.fixture(scope="module")
def bridge():
    """The address at which containers reach this machine."""
    if not shutil.which("docker") or pods.docker("version").returncode:
        pytest.skip("no docker daemon answers")
    name = pods.docker(
        "network",
        "inspect",
        "bridge",
        "--format",
        '{{index .Options "com.docker.network.bridge.name"}}',
    ).stdout.strip()
    addresses = [
        found.address
        for found in psutil.net_if_addrs().get(name, [])
        if found.family == socket.AF_INET
    ]
    if not addresses:
        pytest.skip("containers cannot reach this machine: docker runs elsewhere")
    yield addresses[0]
    pods.remove(LABEL)


class Cloud:
    """S3 and a store of secrets, both reached at one address from here and from containers."""

    def __init__(self, address, integrations):
        self.url = f"http://{address[0]}:{address[1]}"
        self.s3 = boto3.client("s3", endpoint_url=self.url, **self.keys())
        self.s3.create_bucket(Bucket="flows")
        store = boto3.client("secretsmanager", endpoint_url=self.url, **self.keys())
        store.create_secret(
            Name="wandb",
            SecretBinary=json.dumps(
                {"WANDB_API_KEY": base64.b64encode(CANARY.encode()).decode()}
            ).encode(),
        )
        self.settings = {"METAFLOW_S3_ENDPOINT_URL": self.url, "integrations": integrations}
        self.cluster = pods.Cluster(
            LABEL,
            {**KEYS, "AWS_ENDPOINT_URL_SECRETS_MANAGER": self.url, "OMP_NUM_THREADS": "1"},
            secrets={"wandb": {"WANDB_API_KEY": CANARY}},
            images={"python:3.11": "python:3.11-slim-bookworm"},
        )

    @staticmethod
    def keys():
        return dict(
            zip(("aws_access_key_id", "aws_secret_access_key", "region_name"), KEYS.values())
        )

    def contents(self):
        """Everything that is in S3, unpacked."""
        for page in self.s3.get_paginator("list_objects_v2").paginate(Bucket="flows"):
            for item in page.get("Contents", []):
                content = self.s3.get_object(Bucket="flows", Key=item["Key"])["Body"].read()
                yield gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content


@pytest.fixture(scope="module")
def cloud(bridge):
    moto = ThreadedMotoServer(bridge, 0, verbose=False)
    moto.start()
    with served(Integrations, bridge) as integrations:
        yield Cloud(moto.get_host_and_port(), integrations.url)
    moto.stop()


@pytest.fixture(scope="module")
def image(bridge, tmp_path_factory):
    """The image of templates/Dockerfile, from a folder in which a key lies about."""
    folder = tmp_path_factory.mktemp("context")
    for name in ("Dockerfile", ".dockerignore", "requirements.outerbounds.txt", "template_flow.py"):
        shutil.copy(TEMPLATES / name, folder)
    for name in (".env", "notes.txt", "template_ray_serve.py"):
        (folder / name).write_text(f"WANDB_API_KEY={CANARY}\n")
    with build_options() as options:
        built = pods.docker("build", *options, f"--tag={IMAGE}", str(folder), seconds=900)
    assert built.returncode == 0, built.stdout[-5000:]
    return IMAGE


@pytest.mark.slow
@docker_test
def test_image_runs_as_anybody_and_holds_no_secret(image, tmp_path):
    asked = pods.docker(
        "run", "--rm", f"--label={LABEL}", image, "sh", "-c", "id -u; ls -A /work /root; pip list"
    )
    assert asked.returncode == 0 and int(asked.stdout.split()[0]) >= 1000, asked.stdout
    size = int(pods.docker("image", "inspect", image, "--format", "{{.Size}}").stdout)
    assert "nvidia" not in asked.stdout and size < 2e9  # the CPU build of torch
    about = described(image)
    assert "org.opencontainers.image.title" in about and find(CANARY, about.encode()) == 0
    whole = saved(image)
    assert find(CANARY, whole) == 0 < find("METAFLOW_USER=flow", whole)
    toy = write_toy(tmp_path)
    tmp_path.chmod(0o755)
    for user, flow in (("54321:54321", TEMPLATES / "template_flow.py"), ("12345:0", toy)):
        done = pods.docker(
            "run",
            "--rm",
            f"--label={LABEL}",
            "--network=none",
            f"--user={user}",
            "--read-only",
            "--tmpfs=/work:mode=1777",
            "--tmpfs=/tmp",
            "--env=OMP_NUM_THREADS=1",
            f"--volume={flow}:/flow/template_flow.py:ro",
            image,
            "python",
            "/flow/template_flow.py",
            "--no-pylint",
            "run",
            "--offline",
            "True",
            "--epochs",
            "4",
            seconds=400,
        )
        assert done.returncode == 0 and "Done!" in done.stdout, done.stdout


def compiled(flow, environment, *options):
    """The WorkflowTemplate that `argo-workflows create` would send to the cluster."""
    code, output, said = metaflow(
        flow, "argo-workflows", "create", "--only-json", *options, **environment
    )
    assert code == 0, output[-3000:] + said[-3000:]
    return json.loads(output[output.index("{") :])  # the bakery tells of its progress before


def read(run, folder, environment, tasks=None):
    """Return, of a run, (successful, {step: {artifact: value}}, {step: [card]}, {step: log})."""
    command = [
        sys.executable,
        READ_RUN,
        f"TemplateFlow/{run}",
        json.dumps(tasks or {}),
    ]
    done = subprocess.run(
        command, cwd=folder, timeout=400, env=environment, stdout=subprocess.PIPE, check=True
    )
    return pickle.loads(done.stdout)


@pytest.mark.slow
@docker_test
def test_unedited_flow_on_outerbounds_gets_its_packages_from_pypi(cloud, tmp_path):
    with served(Bakery) as bakery:
        manifest = compiled(
            edited(tmp_path, {}),
            profile(
                tmp_path,
                METAFLOW_FAST_BAKERY_URL=bakery.url,
                METAFLOW_DEFAULT_ENVIRONMENT="fast-bakery",
                **cloud.settings,
            ),
        )
    pinned = set(
        re.findall(r"^[\w-]+==\S+", (TEMPLATES / "requirements.outerbounds.txt").read_text(), re.M)
    )
    baked = [
        set(asked["pipRequirements"]) for asked in bakery.asked if asked["pythonVersion"] == "3.11"
    ]
    assert len(pinned) > 7 and len(baked) == 2  # train and evaluate
    assert all(pinned <= packages for packages in baked)
    templates = {template["name"]: template for template in manifest["spec"]["templates"]}
    assert all(templates[step]["container"]["image"] == IMAGE for step in ("train", "evaluate"))
    assert "* *" not in json.dumps(manifest)  # no schedule unless asked for


@pytest.mark.slow
@docker_test
@pytest.mark.parametrize("gpus, limits", [(1, {"nvidia.com/gpu": "1"}), (0, {})])
def test_scheduled_training_asks_for_the_gpus_that_are_set(cloud, gpus, limits, tmp_path):
    flow = edited(tmp_path, WITH_IMAGE | {"GPUS = 1": f"GPUS = {gpus}"})
    manifest = compiled(flow, profile(tmp_path, **cloud.settings))
    templates = {template["name"]: template for template in manifest["spec"]["templates"]}
    resources = templates["train"]["container"]["resources"]
    assert resources.get("limits", {}) == limits
    assert resources["requests"]["memory"] == "16000M"


class Webhook(http.server.BaseHTTPRequestHandler):
    """Keeps what is sent to it."""

    def do_POST(self):
        self.server.asked.append(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.mark.slow
@docker_test
def test_a_scheduled_run_that_fails_tells_a_webhook(cloud, tmp_path):
    flow = edited(tmp_path, WITH_IMAGE)
    with served(Webhook) as webhook:
        url = f"{webhook.url}/T"
        options = ["--notify-on-error", "--notify-slack-webhook-url", url]
        manifest = compiled(flow, profile(tmp_path, **cloud.settings), *options)
        spec = manifest["spec"]
        requests = {
            template["name"]: template["http"]
            for template in spec["templates"]
            if "http" in template
        }
        # As Argo does at the end of a workflow: the hooks whose condition holds.
        failed = [
            requests[hook["template"]]
            for hook in spec["hooks"].values()
            if "workflow.status == 'Failed'" in hook.get("expression", "")
        ]
        for request in failed:
            body = request["body"].replace("{{workflow.name}}", "templateflow-x7")
            asked = urllib.request.Request(request["url"], body.encode(), method=request["method"])
            assert urllib.request.urlopen(asked, timeout=30).status == 200
    (message,) = map(json.loads, webhook.asked)
    assert "TemplateFlow" in json.dumps(message) and "templateflow-x7" in json.dumps(message)
    assert "failed" in json.dumps(message).lower()


@pytest.mark.slow
@docker_test
def test_scheduled_flow_trains_in_the_image_and_goes_on_after_a_kill(cloud, image, tmp_path):
    flow = edited(
        tmp_path,
        WITH_IMAGE
        | {
            "SECRETS: list[str] = []": 'SECRETS: list[str] = ["outerbounds.wandb"]',
            "CRON = None": 'CRON = "0 6 * * 1"',
            "default=not (SCHEDULED and SECRETS)": "default=True",  # no test asks W&B
            "        restore_checkpoint()\n": f"        restore_checkpoint()\n        {SHOW_KEY}\n",
        },
    )
    environment = profile(tmp_path, **cloud.settings)
    manifest = compiled(
        flow,
        environment,
        "--notify-on-error",
        "--notify-slack-webhook-url",
        "https://slack.invalid",
    )
    assert all(text in json.dumps(manifest) for text in ("0 6 * * 1", "https://slack.invalid"))
    assert find(CANARY, json.dumps(manifest).encode()) == 0
    done = argo.submit(
        manifest, cloud.cluster, "templateflow-x1", lambda line: re.search("'epoch': '6", line)
    )
    codes = {step: [code for code, _ in attempts] for step, (_, attempts) in done.items()}
    assert codes == {"start": [0], "prepare": [0], "train": [137, 0], "evaluate": [0], "end": [0]}
    killed, again = (log for _, log in done["train"][1])
    assert epochs(killed)[-1] > 6
    assert 4 < epochs(again)[0] < 8 and epochs(again)[-1] == 14  # on from the checkpoint
    assert KEY_SHOWN in again  # @secrets brought the key
    successful, artifacts, cards, logs = read(
        "argo-templateflow-x1",
        tmp_path,
        environment,
        {step: task for step, (task, _) in done.items()},
    )
    assert successful and artifacts["evaluate"]["scores"]["exact_match"] >= 95
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(
        artifacts["train"]["model"]
    )
    assert (
        len(artifacts["train"]["losses"]) >= 20
        and len(cards["train"]) == 2
        and len(cards["evaluate"]) == 1
    )
    assert "W&B mode: offline" in logs["train"]
    stored = list(cloud.contents())
    shown = [card.encode() for found in cards.values() for card in found]
    assert find(CANARY, *stored, *shown) == 0
    assert find(KEY_SHOWN, *stored) > 0  # the search looks into logs too


@pytest.mark.slow
@docker_test
def test_run_on_kubernetes(cloud, image, tmp_path):
    flow = edited(
        tmp_path,
        WITH_IMAGE
        | OWN_GPUS
        | {
            EVALUATE: f'{EVALUATE}, secrets=["wandb"]',
            "        model = unpack(": f"        {SHOW_KEY}\n        model = unpack(",
        },
        toy=True,
    )
    with jobs.api(cloud.cluster) as (address, started):
        environment = profile(tmp_path, STAND_IN_CLUSTER=address, **cloud.settings)
        code, output, said = metaflow(flow, "--no-pylint", "run", seconds=400, **environment)
    assert code == 0 and "Done!" in output + said, output[-3000:] + said[-3000:]
    assert (
        KEY_SHOWN in output + said and CANARY not in output + said
    )  # the Kubernetes secret brought the key
    assert (
        len(started) == 3
        and find(CANARY, *[json.dumps(job.object).encode() for job in started.values()]) == 0
    )
    asked = {job.container["name"]: job.container["resources"] for job in started.values()}
    small = {
        "limits": {},
        "requests": {"cpu": "2", "memory": "8000M", "ephemeral-storage": "10000M"},
    }
    assert asked == {
        "prepare": small,
        "evaluate": small,
        "train": {
            "limits": {"nvidia.com/gpu": "1"},
            "requests": {"cpu": "2", "memory": "16000M", "ephemeral-storage": "20000M"},
        },
    }
    successful, artifacts, cards, _ = read(
        re.search(r"run-id (\d+)", output + said)[1], tmp_path, environment
    )
    assert successful and "toy.json" in artifacts["train"]["model"]
    assert cards["train"] and cards["evaluate"]
    assert find(CANARY, *cloud.contents()) == 0


def test_lines_that_stop_a_run_are_the_real_ones():
    table = (
        (ROOT / "docs/train.md")
        .read_text("utf-8")
        .split("| the line that stops it |")[1]
        .split("\n\n")[0]
    )
    lines = re.findall(r"\| `([^`]+)` \|$", table, re.MULTILINE)
    said = [expected for _, _, expected in REFUSED.values()]
    assert len(lines) == 5
    for line in lines:
        assert any(line.split("[")[0].split("...")[0] in each for each in said), line
