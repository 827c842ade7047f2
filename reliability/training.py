"""Break runs of the flow: killed, disk full, errors of S3, W&B gone, two runs, exports."""

import contextlib
import logging
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from unittest.mock import patch

import boto3
import psutil
from flow_testing import FLOW, artifacts, clean_environment
from helpers.repository import TEMPLATES
from helpers.s3 import EXTENSION, KEYS
from helpers.tracking import KEY
from helpers.wandb_server import StandIn
from moto.moto_server.werkzeug_app import (
    DomainDispatcherApplication,
    MotoRequestHandler,
    create_backend_app,
)
from werkzeug.serving import make_server

from reliability.measure import row


def flow(folder, *arguments, command="run", before=()):
    """Start the flow in a new process and a new session."""
    return subprocess.Popen(
        [sys.executable, str(FLOW), "--no-pylint", *before, command, *arguments],
        cwd=folder,
        text=True,
        env=clean_environment(folder),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def model_of(folder):
    return artifacts(folder, "train")["model"]["model.safetensors"]


EPOCHS = ("--epochs", "8")


def outcome(folder, right, begin, runs=1, lost=0):
    """A tuple as `since` gives it, of runs that began then; wrong is any other model."""
    return runs, lost, lost, int(model_of(folder) != right), time.monotonic() - begin


def resumed(folder, right, before=()):
    """Resume what was broken off; a tuple as `since` gives it."""
    begin = time.monotonic()
    again = flow(folder, command="resume", before=before)
    output = again.communicate(timeout=400)[0]
    if again.returncode:  # killed before there was anything to resume
        again = flow(folder, *EPOCHS, before=before)
        output = again.communicate(timeout=400)[0]
    assert again.returncode == 0, output
    return outcome(folder, right, begin)


def kill_task(folder, right, seconds):
    """kill -9 of the training task, some time between its start and its end."""
    running = flow(folder, *EPOCHS)
    time.sleep(random.uniform(1, seconds))
    for each in psutil.Process(running.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it has just ended
            if " train " in " ".join(each.cmdline()):
                each.kill()
    running.communicate(timeout=400)
    if running.returncode == 0:  # it had finished
        return 1, 0, 0, int(model_of(folder) != right), 0.0
    return resumed(folder, right)


def kill_flow(folder, right, seconds):
    """kill -9 the whole flow, at any time."""
    running = flow(folder, *EPOCHS)
    time.sleep(random.uniform(1, seconds))
    for each in [
        *psutil.Process(running.pid).children(recursive=True),
        psutil.Process(running.pid),
    ]:
        with contextlib.suppress(psutil.Error):
            each.kill()
    running.communicate(timeout=400)
    return resumed(folder, right)


def two_at_once(folder, right, seconds):
    """Two runs in one folder."""
    begin = time.monotonic()
    both = [flow(folder, *EPOCHS) for _ in range(2)]
    outputs = [each.communicate(timeout=400)[0] for each in both]
    lost = sum(each.returncode != 0 for each in both)
    assert lost or "Done!" in outputs[0]
    return outcome(folder, right, begin, runs=2, lost=lost)


def disk_full(folder, right, seconds):
    """The disk is full: a clear end, and once there is room, `resume` does the rest."""
    # The model, its checkpoints and the code take 20 MB or so.
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={random.randint(2, 8)}m", "tmpfs", folder], check=True
    )
    try:
        running = flow(folder, *EPOCHS)
        output = running.communicate(timeout=400)[0]
        assert running.returncode != 0 and "No space left on device" in output, output[-2000:]
        subprocess.run(["mount", "-o", "remount,size=200m", folder], check=True)
        return resumed(folder, right)
    finally:
        subprocess.run(["umount", folder], check=True)


def exporter(folder):
    """The command of an export that replaces a model, in a folder with a run of the right one."""
    if not (folder / "model").exists():
        assert flow(folder, *EPOCHS).wait(400) == 0
    shutil.copy(TEMPLATES / "export_model.py", folder)
    return [sys.executable, "export_model.py", "--replace"]


def export_interrupted(folder, right, seconds):
    """kill -9 an export that replaces a model: the old or the new model is there, complete."""
    command = exporter(folder)
    subprocess.run(
        command,
        cwd=folder,
        env=clean_environment(folder),
        check=True,
        capture_output=True,
        timeout=400,
    )
    begin = time.monotonic()
    running = subprocess.Popen(
        command, cwd=folder, env=clean_environment(folder), stdout=subprocess.DEVNULL
    )
    time.sleep(random.uniform(0.3, 2.5))
    running.kill()
    running.wait(400)
    whole = all(
        (folder / "model" / name).exists()
        for name in ("model.safetensors", "known_answers.json", "README.md")
    )
    wrong = not whole or (folder / "model/model.safetensors").read_bytes() != right
    return 1, 0, 0, int(wrong), time.monotonic() - begin


def export_during_a_run(folder, right, seconds):
    """Export during another run: the complete model of the finished run is exported."""
    command = exporter(folder)
    begin, running = time.monotonic(), flow(folder, *EPOCHS, "--seed", "2")
    time.sleep(random.uniform(1, seconds))
    export = subprocess.run(
        command, cwd=folder, env=clean_environment(folder), capture_output=True, timeout=100
    )
    done = running.poll() is not None  # then the newest run may be that one
    running.communicate(timeout=400)
    found = (folder / "model/model.safetensors").read_bytes()
    lost = int(export.returncode != 0 or running.returncode != 0)
    right_ones = [right, model_of(folder)] if done else [right]
    result = 2, lost, lost, int(found not in right_ones), time.monotonic() - begin
    assert flow(folder, *EPOCHS).wait(400) == 0  # the newest is the right one again
    return result


class BadS3:
    """S3 by moto, of whose answers one in ten is an error, as S3 gives them when it is too busy."""

    def __init__(self, app):
        self.app, self.failed = app, 0

    def __call__(self, environ, start):
        if random.random() > 0.1:
            return self.app(environ, start)
        self.failed += 1
        environ["wsgi.input"].read(
            int(environ.get("CONTENT_LENGTH") or 0)
        )  # else the connection breaks
        status, code = random.choice(
            [("503 Slow Down", b"SlowDown"), ("500 Internal Server Error", b"InternalError")]
        )
        start(status, [("Content-Type", "application/xml")])
        return [b"<Error><Code>%b</Code><Message>Try again.</Message></Error>" % code]


def s3_errors(folder, right, seconds):
    """A run whose artifacts go to S3, where one answer in ten is an error."""
    logging.getLogger("werkzeug").setLevel("ERROR")
    bad = BadS3(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, bad, threaded=True, request_handler=MotoRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    settings = {
        "METAFLOW_S3_ENDPOINT_URL": url,
        "METAFLOW_DATASTORE_SYSROOT_S3": "s3://flows/metaflow",
        "PYTHONPATH": str(EXTENSION),
        "STAND_IN_CLUSTER": "http://127.0.0.1:9",
        **KEYS,
    }
    try:
        with patch.dict(os.environ, settings):
            boto3.client("s3", endpoint_url=url).create_bucket(Bucket="flows")
            begin, to_s3 = time.monotonic(), ("--datastore", "s3")
            running = flow(folder, *EPOCHS, before=to_s3)
            running.communicate(timeout=400)
            if running.returncode:
                return resumed(folder, right, to_s3)
            assert bad.failed
            return outcome(folder, right, begin)
    finally:
        server.shutdown()


def wandb_dies(folder, right, seconds):
    """The W&B server stops or freezes right after the run starts: training continues."""
    begin = time.monotonic()
    with (
        StandIn(random.choice(["dies", "freezes"])) as server,
        patch.dict(
            os.environ,
            {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": KEY, "WANDB_PROJECT": "project"},
        ),
    ):
        running = flow(folder, *EPOCHS, "--offline", "False")
        output = running.communicate(timeout=400)[0]
        assert server.runs, output
    return outcome(folder, right, begin, lost=int(running.returncode != 0))


TRAIN = {
    "training killed, then resume": kill_task,
    "flow killed, then resume": kill_flow,
    "disk full, then resume": disk_full,
    "S3 errors": s3_errors,
    "W&B dies": wandb_dies,
    "two runs at once": two_at_once,
    "export killed": export_interrupted,
    "export during a run": export_during_a_run,
}


def train_faults(folder, names, times):
    if not (wanted := [name for name in TRAIN if name in names]):
        return
    folder.mkdir()
    (folder / "right").mkdir()
    begin = time.monotonic()
    undisturbed = flow(folder / "right", *EPOCHS)
    output = undisturbed.communicate(timeout=400)[0]
    assert undisturbed.returncode == 0, output
    right, seconds = model_of(folder / "right"), time.monotonic() - begin
    for name in wanted:
        results = []
        for number in range(times):
            # An export takes the model of a run before it.
            place = folder / (name if "export" in name else f"{list(TRAIN).index(name)}-{number}")
            place.mkdir(exist_ok=True)
            results.append(TRAIN[name](place, right, seconds))
        yield row(name, results)
