"""What `make demo` runs: train, export, serve and ask the translator, in a temporary folder.

At a terminal the server then stays until Ctrl+C; without one, everything ends. What the commands
print goes to demo.log.
"""

import contextlib
import json
import os
import re
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import termios
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil  # Ray needs it too

ROOT = Path(__file__).parents[1]
LOG = ROOT / "demo.log"
URL = "http://127.0.0.1:8000/translate"
BODY = '{"text": "Hello world!"}'
RIGHT = {"translation": "Bonjour le monde !"}

TRAIN = "python template_flow.py run --offline True"
EXPORT = "python export_model.py"
SERVE = 'serve run template_ray_serve:translator_app --route-prefix "/translate"'
ASK = f"curl -d '{BODY}' -H \"Content-Type: application/json\" {URL}"
TOO_SLOW = "timed out during startup"  # Ray gives a node 30 s, however slow the machine is
MOST_TRIES = 5
CTRL_C = b"\x03"
STAYS = f"""
The server keeps running. Open {URL} in a browser,
or run that curl in a second terminal. Ctrl+C here stops the server and removes the model.
"""
# Settings of the reader's own Metaflow, which would lead the run elsewhere.
NOT_PASSED_ON = (
    "METAFLOW_PROFILE",
    "METAFLOW_DEFAULT_DATASTORE",
    "__REMOTE_CONFIG_HAS_BEEN_RESOLVED__",
)


def main() -> None:
    for signum in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, lambda *_: sys.exit(1))  # cleans up on the way out
    check_port()
    LOG.write_text("")
    # A short path: Ray puts sockets there, whose paths are limited.
    with tempfile.TemporaryDirectory(prefix="demo.", dir="/tmp") as name:  # noqa: S108
        folder = Path(name)
        for path in (ROOT / "templates").glob("[!.]*"):
            if path.is_file():
                shutil.copy(path, folder)
        say("all output: demo.log")
        say(f"1/4 train, about a minute: {TRAIN}")
        run(TRAIN, folder)
        say("    " + re.findall("held-out scores: .*", LOG.read_text("utf-8"))[-1])
        say(f"2/4 export: {EXPORT}")
        run(EXPORT, folder)
        say(f"3/4 serve: {SERVE}")
        with serving(folder) as server:
            say(f"4/4 ask: {ASK}")
            say("    " + ask())
            if is_at_terminal():
                say(STAYS)
                wait_for_ctrl_c(server)


def say(line: str) -> None:
    print(line, flush=True)


def fail(reason: str) -> None:
    sys.exit(f"make demo: {reason}")


def check_port() -> None:
    try:
        socket.create_server(("127.0.0.1", 8000)).close()
    except OSError:
        stop = "stop what listens there (another demo? .venv/bin/ray stop)"
        fail(f"port 8000 is in use; {stop}")


def environment(folder: Path) -> dict[str, str]:
    """Return what the commands get: nothing of the reader's settings, and all files in a folder."""
    kept = {name: value for name, value in os.environ.items() if name not in NOT_PASSED_ON}
    return kept | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "METAFLOW_HOME": str(folder),
        "METAFLOW_USER": "demo",  # Metaflow refuses root
        "RAY_ADDRESS": "local",
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",  # too short by default for a slow machine
        "RAY_TMPDIR": str(folder),
        # As fast for a model this small, and not slowed down by other programs.
        "OMP_NUM_THREADS": "1",
    }


def start(command: str, folder: Path, own_session: bool = False) -> subprocess.Popen:
    """Start a command as somebody types it, with its output in the log."""
    with LOG.open("a") as log:
        log.write(f"$ {command}\n")
        log.flush()
        return subprocess.Popen(
            shlex.split(command),
            cwd=folder,
            env=environment(folder),
            stdout=log,
            stderr=log,
            start_new_session=own_session,
        )


def run(command: str, folder: Path) -> None:
    """Run a command to its end; stop the demo if it fails."""
    with start(command, folder) as process:
        try:
            process.wait()
        finally:
            process.terminate()  # if this script is ended
    if process.returncode:
        fail(f"`{command}` failed; see demo.log: {last_line()}")


def last_line() -> str:
    return LOG.read_text("utf-8", "replace").strip().splitlines()[-1]


@contextlib.contextmanager
def serving(folder: Path):
    """Start the server and wait until it answers; at the end stop it, and all that it started."""
    server = start(SERVE, folder, own_session=True)  # which Ctrl+C does not reach
    try:
        tries = 1
        while not comes_up(server):
            if TOO_SLOW not in last_line() or tries == MOST_TRIES:
                fail(f"the server did not start; see demo.log: {last_line()}")
            stop(server)
            tries += 1
            server = start(SERVE, folder, own_session=True)
        yield server
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl+C changes nothing
        stop(server)


def comes_up(server: subprocess.Popen) -> bool:
    """Wait until the server answers; False if it ends before."""
    end = time.monotonic() + 600
    while server.poll() is None and time.monotonic() < end:
        if is_up():
            return True
        time.sleep(0.5)
    return False


def stop(server: subprocess.Popen) -> None:
    """End the server and all that it started."""
    server.terminate()
    _, late = psutil.wait_procs(started_by(server), timeout=60)
    for process in late:
        process.kill()
    psutil.wait_procs(late)
    server.wait()


def is_up() -> bool:
    try:
        return urllib.request.urlopen(f"{URL}/health", timeout=5).status == 200
    except OSError:
        return False


def started_by(server: subprocess.Popen) -> list[psutil.Process]:
    """Return the processes of the server's session: its own, and those of Ray."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(ProcessLookupError):
            if os.getsid(process.pid) == server.pid:
                found.append(process)
    return found


def ask() -> str:
    """Return the answer as the server sent it; stop the demo if it is wrong."""
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(URL, BODY.encode(), headers)
    try:
        answer = urllib.request.urlopen(request, timeout=60).read().decode()
    except urllib.error.HTTPError as error:
        answer = error.read().decode()
    if json.loads(answer) != RIGHT:
        fail(f"the answer is wrong: {answer}")
    return answer


def is_at_terminal() -> bool:
    """Return True if somebody can read this and press Ctrl+C."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return False
    return os.tcgetpgrp(0) == os.getpgrp()  # False in the background


def wait_for_ctrl_c(server: subprocess.Popen) -> None:
    """Return when Ctrl+C is pressed or the terminal is closed; fail if the server ends."""
    # Read as a key: the signal would reach make too, which would end with an error.
    before = termios.tcgetattr(0)
    settings = termios.tcgetattr(0)
    settings[3] &= ~(termios.ISIG | termios.ICANON | termios.ECHO)
    termios.tcsetattr(0, termios.TCSADRAIN, settings)
    try:
        while server.poll() is None:
            ready, _, _ = select.select([0], [], [], 1)
            key = os.read(0, 1) if ready else None
            if key == CTRL_C:
                say("stopping the server ...")
            if key in (CTRL_C, b""):
                return
        fail(f"the server has stopped; see demo.log: {last_line()}")
    finally:
        with contextlib.suppress(termios.error):  # it was closed
            termios.tcsetattr(0, termios.TCSADRAIN, before)


if __name__ == "__main__":
    try:
        main()
    except (KeyboardInterrupt, BrokenPipeError):  # Ctrl+C before that, or nobody reads what is said
        sys.exit(130)
