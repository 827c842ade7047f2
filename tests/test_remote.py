"""The flow where it is made for: compiled for a schedule, started by `run`, in the image of templates/Dockerfile.

No cloud is needed. S3 and the secrets are moto's; tests/remote has the stand-ins for Argo Workflows (argo.py), for the
Kubernetes API (jobs.py) and for Outerbounds' own server (extension/). What they start are Metaflow's own commands.
"""

import base64
import contextlib
import functools
import gzip
import hashlib
import http.server
import json
import os
import pickle
import re
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import boto3
import pytest
from moto.server import ThreadedMotoServer
from remote import argo, jobs, pods

HERE, TEMPLATES = Path(__file__).parent, Path(__file__).parents[1] / "templates"
IMAGE = "template_flow_image:test"
KEYS = {"AWS_ACCESS_KEY_ID": "none", "AWS_SECRET_ACCESS_KEY": "none", "AWS_DEFAULT_REGION": "us-east-1"}
CANARY = secrets.token_hex(20)  # a key that has to be in the environment of a step, and nowhere else
LABEL = f"template-flow-test={CANARY[:8]}"
SHOW_KEY = 'print("key", hashlib.sha256(os.environ["WANDB_API_KEY"].encode()).hexdigest())'
KEY_SHOWN = f"key {hashlib.sha256(CANARY.encode()).hexdigest()}"
WITH_IMAGE = {"IMAGE = None": f"IMAGE = {IMAGE!r}"}
ON_CLUSTER = {'nvidia(gpu=1, gpu_type="L40S")': "kubernetes(image=IMAGE, gpu=1, memory=16_000, disk=20_000)"}
docker_test = pytest.mark.xdist_group("docker")


def edited(folder, changes):
    """A copy of the flow in `folder`, with some of its text replaced as a user would; the path of the flow."""
    text = (TEMPLATES / "template_flow.py").read_text("utf-8")
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
    settings = {"METAFLOW_DEFAULT_DATASTORE": "s3", "METAFLOW_DATASTORE_SYSROOT_S3": "s3://flows/metaflow",
                "METAFLOW_DATATOOLS_S3ROOT": "s3://flows/data", "METAFLOW_KUBERNETES_NAMESPACE": "default",
                "OBP_PERIMETER": "tests", "OBP_AUTH_SERVER": "auth.invalid", "METAFLOW_SERVICE_AUTH_KEY": "none"}
    (home / "config_cluster.json").write_text(json.dumps({"OBP_INTEGRATIONS_URL": "http://127.0.0.1:9", **settings}))
    return {"PATH": os.environ["PATH"], "HOME": str(folder), "METAFLOW_HOME": str(home), "METAFLOW_PROFILE": "cluster",
            "METAFLOW_USER": "test", "PYTHONPATH": str(HERE / "remote/extension"), "STAND_IN_CLUSTER": "http://127.0.0.1:9",
            "METAFLOW_CLIENT_CACHE_PATH": str(folder / "cache"), **KEYS, **more}


def metaflow(flow, *arguments, seconds=100, **environment):
    """Run a command of the flow; return (exit code, its output, what it said beside)."""
    process = subprocess.Popen([sys.executable, str(flow), *arguments], cwd=flow.parent, text=True, encoding="utf-8",
                               env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    try:
        output, said = process.communicate(timeout=seconds)
        return process.returncode, output, said
    finally:
        with contextlib.suppress(ProcessLookupError):  # `run` leaves its launcher when it is told to stop
            os.killpg(process.pid, signal.SIGKILL)


# Before any work


REFUSED = {
    "@nvidia on a schedule": (
        {"kubernetes(image=IMAGE, gpu=1, memory=16_000, disk=20_000) if SCHEDULED else ": ""},
        ("argo-workflows", "create", "--only-json"),
        "step train: @nvidia cannot be scheduled; use @kubernetes(gpu=1, memory=16_000)"),
    "@nvidia without the packages": (
        {'    @pypi(python="3.11", packages=requirements.packages)\n    @step\n    def train': "    @step\n    def train"},
        ("run",), "step train: @nvidia has what @pypi lists, add: ['accelerate', 'outerbounds',"),
    "an image under --environment=pypi": (
        WITH_IMAGE | ON_CLUSTER, ("--environment=pypi", "run"),
        "--environment=pypi hides the packages of the image; drop image= or --environment"),
    "an image under --environment conda": (
        WITH_IMAGE, ("--environment", "conda", "argo-workflows", "create", "--only-json"),
        "--environment=conda hides the packages of the image; drop image= or --environment"),
    "an image and @pypi": (
        {"image=IMAGE, cpu=2": f"image={IMAGE!r}, cpu=2"}, ("--environment=pypi", "show"),
        "--environment=pypi hides the packages of the image; drop image= or --environment"),
    "an image for @nvidia": (
        {"nvidia(gpu=1,": f"nvidia(image={IMAGE!r}, gpu=1,"}, ("run",),
        "Decorator 'nvidia' does not support the attribute 'image'."),
    "@nvidia and @kubernetes": (
        {"    @ON_GPU\n": "    @ON_GPU\n    @ON_CPU\n"}, ("--environment=fast-bakery", "show"),
        "Step train is marked for execution both on Kubernetes and Nvidia."),
    "@pypi without an environment": (
        {}, ("run",),
        "@pypi decorator requires --environment=conda or --environment=pypi or --environment=fast-bakery"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_is_refused_before_any_work(case, tmp_path):
    changes, arguments, expected = REFUSED[case]
    code, output, said = metaflow(edited(tmp_path, changes), "--no-pylint", *arguments, **profile(tmp_path))
    assert code != 0 and expected in " ".join((output + said).split()), output + said
    print(output + said)
    assert "Workflow starting" not in output + said


def test_decorators_stay_on_a_cluster_and_go_on_a_laptop(tmp_path):
    environment = profile(tmp_path, STAND_IN_NVIDIA="1", METAFLOW_DEFAULT_ENVIRONMENT="fast-bakery")
    code, output, said = metaflow(edited(tmp_path, {}), "show", **environment)
    assert code == 0, output + said
    print(said + output)
