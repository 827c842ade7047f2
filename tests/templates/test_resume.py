"""A training that is killed continues from its last checkpoint and ends as if nothing happened.

Here the translator's own; test_flow_mechanics.py has the many ways to go on, with a toy.
"""

import os
import re
import signal
import subprocess
import sys

import pytest
from flow_testing import FLOW, artifacts, clean_environment, run
from helpers.flows import epochs

from reliability.training import s3_errors

TRAINING = ("run", "--epochs", "8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with one finished run, which nothing has interrupted."""
    folder = tmp_path_factory.mktemp("unbroken")
    code, output = run(folder, *TRAINING[1:])
    assert code == 0 and min(epochs(output)) < 1, output
    return folder


@pytest.fixture(scope="module")
def unbroken(folder):
    """The artifacts of that run."""
    return artifacts(folder, "train")


def killed(folder):
    """Run the flow and kill -9 the task of `train` after epoch 4; return (exit code, output)."""
    process = subprocess.Popen(
        [sys.executable, str(FLOW), "--no-pylint", *TRAINING],
        cwd=folder,
        text=True,
        encoding="utf-8",
        env=clean_environment(folder),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    output = ""
    victim = None
    try:
        for line in process.stdout:
            output += line
            # 2026-01-01 00:00:00.000 [12/train/3 (pid 45)] {'loss': '2.5', ..., 'epoch': '4.08'}
            task = re.search(r"train/\S+ \(pid (\d+)\)\] .*'epoch': '([\d.]+)'", line)
            if task and not victim and float(task[2]) > 4:
                victim = int(task[1])
                os.kill(victim, signal.SIGKILL)
        return process.wait(timeout=400), output
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def weights(folder):
    """Return the weights that the newest run in a folder ended with."""
    return artifacts(folder, "train")["model"]["model.safetensors"]


def test_resume_continues_from_the_last_checkpoint(tmp_path, unbroken):
    code, output = killed(tmp_path)
    assert code != 0 and max(epochs(output)) > 4, output
    code, output = run(tmp_path, command=("resume",))
    assert code == 0, output
    # No epoch before the checkpoint is trained again.
    assert 3 < min(epochs(output)) < 5 and max(epochs(output)) == 8
    assert weights(tmp_path) == unbroken["model"]["model.safetensors"]
    assert artifacts(tmp_path, "train")["losses"][-3:] == unbroken["losses"][-3:]


@pytest.mark.slow
def test_errors_of_s3_change_nothing(tmp_path, unbroken):
    _, _, _, wrong, _ = s3_errors(tmp_path, unbroken["model"]["model.safetensors"], 0)
    assert wrong == 0
