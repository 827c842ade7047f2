"""Run commands as somebody does who just opened a terminal."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

# Before a command line: a network namespace that has loopback and no route. Needs root.
WITHOUT_NETWORK = """unshare --net sh -c 'ip link set lo up && exec "$@"' sh """


def can_cut_network():
    return os.geteuid() == 0 and bool(shutil.which("unshare") and shutil.which("ip"))


def execute(command, folder, environment, seconds=900):
    """Run a command line in a folder; return (exit code, everything it printed)."""
    with subprocess.Popen(
        ["bash", "-c", command],
        cwd=folder,
        env=environment,
        text=True,
        encoding="utf-8",
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    ) as process:
        try:
            output, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGABRT)  # Python then prints where it stands
            time.sleep(5)
            os.killpg(process.pid, signal.SIGKILL)  # what it has started holds the pipe open
            output, _ = process.communicate()
            raise AssertionError(f"{command}: not finished after {seconds} s:\n{output}") from None
    return process.returncode, output


def run(command, folder, environment, code=0, seconds=900):
    """Return what a command line prints; fail if it ends with another exit code."""
    ended, output = execute(command, folder, environment, seconds)
    assert ended == code, output
    return output


def clean(folder):
    """The environment of a new terminal, with the installed packages on the path."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {
        "PATH": path,
        "HOME": str(folder),
        "USER": "reader",
        "LANG": "C.UTF-8",
        "RAY_ADDRESS": "local",
        "OMP_NUM_THREADS": "1",
        "PYTHONFAULTHANDLER": "1",
    }
