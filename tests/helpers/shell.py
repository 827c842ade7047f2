"""Run commands as somebody does who just opened a terminal."""

import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# Before a command line: a network namespace that has loopback and no route. Needs root.
WITHOUT_NETWORK = """unshare --net sh -c 'ip link set lo up && exec "$@"' sh """


def can_cut_network():
    return os.geteuid() == 0 and bool(shutil.which("unshare") and shutil.which("ip"))


def give_to_nobody(folder):
    """Give a folder to the user nobody; return what runs a command as that user.

    They may read everything, as the interpreter may lie in root's home.
    """
    user = pwd.getpwnam("nobody")
    for path in (folder, *folder.rglob("*")):
        os.chown(path, user.pw_uid, user.pw_gid)
    for parent in folder.parents:  # pytest closes its folders to others
        if parent.stat().st_uid == 0 and parent != Path("/"):
            parent.chmod(parent.stat().st_mode | 0o055)
    return (
        "setpriv",
        f"--reuid={user.pw_uid}",
        f"--regid={user.pw_gid}",
        "--clear-groups",
        "--inh-caps=+dac_read_search",
        "--ambient-caps=+dac_read_search",
    )


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
        "TMPDIR": tempfile.gettempdir(),
        "RAY_ADDRESS": "local",
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",  # docs/serve.md, for slow machines
        "OMP_NUM_THREADS": "1",
        "PYTHONFAULTHANDLER": "1",
    }
