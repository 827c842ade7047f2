"""Run commands as somebody does who just opened a terminal."""

import os
import subprocess
import sys
from pathlib import Path


def run(command, folder, environment, code=0, seconds=400):
    """Return what a shell command prints; fail if it ends with another exit code."""
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env=environment,
        timeout=seconds,
        text=True,
        encoding="utf-8",
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert done.returncode == code, done.stdout
    return done.stdout


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
    }
