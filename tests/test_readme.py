"""Every command in README.md is run as it stands, and prints what README.md says."""

import contextlib
import fcntl
import fnmatch
import os
import pty
import re
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import termios
import time
from pathlib import Path

import httpx
import psutil
import pytest
from loopback import alone, build_options

ROOT = Path(__file__).parents[1]
NOT_RUN = {  # pattern: why
    "pip install *": "the packages are installed before the tests, which need no network",
    "WANDB_API_KEY=... *": "needs an account; test_tracking.py runs it against a stand-in",
    "make setup": "is what the tests are run from",
    "make lint": "is what .ci/run runs",
    "make test": "is this",
    ".venv/bin/python -m pytest *": "is a part of this",
    "PICTURES=* *": "is a part of this too; the variable keeps the picture",
    "python template_flow.py run --data pairs.tsv *": "needs the hub; test_template_flow.py",
    "python template_flow.py argo-workflows create": "needs Argo; test_remote.py runs its result",
    "serve run template_ray_serve:build model=*": "its path is made up; test_template_ray_serve.py",
    "RAY_AUTH_MODE=token python check_serve_config.py *": "test_check_serve_config.py does it",
    "kubectl *": "needs a cluster; test_rayservice.py runs kubectl without one",
    "git -C $TEMPLATES show *": "test_update.py runs the line that outdated.py prints",
    "git merge-file *": "the same",
}


def commands(page=ROOT / "README.md"):
    """[(command, lines of output that follow it), ...] in the order of a page."""
    found = []
    for block in re.findall(
        r"^```console\n(.*?)^```", page.read_text("utf-8"), re.DOTALL | re.MULTILINE
    ):
        for line in block.replace("\\\n", "").splitlines():  # a command may go on in the next line
            if line.startswith("$ "):
                found.append((line[2:], []))
            else:
                found[-1][1].append(line)
    return found


def not_run(command):
    return any(fnmatch.fnmatch(command, pattern) for pattern in NOT_RUN)


def shows(output, expected):
    """True if the expected lines come in this order; `...` is anything, a score is any score."""
    at = 0
    for line in expected:
        pattern = re.sub(r"\d+\\\.\d+", r"[\\d.]+", re.escape(line).replace(r"\.\.\.", ".*"))
        found = re.compile(pattern).search(output, at)
        if not found:
            return False
        at = found.end()
    return True


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


def wait_for(url, server, log):
    for _ in range(180):
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(url, timeout=5).status_code == 200:
                return
        assert server.poll() is None, log.read_text()
        time.sleep(0.5)
    raise AssertionError(log.read_text())


@contextlib.contextmanager
def at_terminal(command, folder, environment):
    """Run a command at a terminal of its own; yield the process and the terminal's other end."""
    ours, its = pty.openpty()
    process = subprocess.Popen(
        shlex.split(command),
        cwd=folder,
        env=environment,
        stdin=its,
        stdout=its,
        stderr=its,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(its)
    try:
        yield process, ours
    finally:
        os.close(ours)  # ends what still runs there, with SIGHUP
        process.wait(200)


def read_until(text, terminal, seconds=900):
    """Return what a terminal shows, until it shows a text; without one, until it is closed."""
    shown = b""
    end = time.monotonic() + seconds
    while text is None or text.encode() not in shown:
        ready, _, _ = select.select([terminal], [], [], max(0, end - time.monotonic()))
        assert ready, shown.decode()
        try:
            part = os.read(terminal, 4096)
        except OSError:  # on Linux, that is how a terminal ends
            part = b""
        if not part:
            break
        shown += part
    return shown.decode().replace("\r\n", "\n")


def left_by_demo():
    """Return what a demo must not leave: folders, and processes that had one as their own."""
    left = list(Path("/tmp").glob("demo.*"))
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("RAY_TMPDIR", "").startswith("/tmp/demo."):
                left.append(process)
    return left


def lines_of_demo():
    """Return what README.md shows of `make demo`: without a terminal, and at one."""
    ((_, expected),) = [found for found in commands() if found[0] == "make demo"]
    stays = next(number for number, line in enumerate(expected) if "keeps running" in line)
    return expected[:stays], expected


@pytest.mark.xdist_group("ray")
def test_make_demo_without_a_terminal(tmp_path):
    expected, _ = lines_of_demo()
    with alone(8000):
        output = run("make demo < /dev/null", ROOT, clean(tmp_path), seconds=900)
    assert shows(output, expected), output
    assert len(output.splitlines()) == len("\n".join(expected).strip().splitlines()), output
    assert "Done!" in (ROOT / "demo.log").read_text()
    assert not left_by_demo()


@pytest.mark.xdist_group("ray")
def test_make_demo_at_a_terminal(tmp_path):
    _, expected = lines_of_demo()
    with alone(8000), at_terminal("make demo", ROOT, clean(tmp_path)) as (process, terminal):
        output = read_until(expected[-1], terminal)
        assert shows(output, expected), output
        (curl,) = re.findall("ask: (curl .*)", output)
        assert run(curl, tmp_path, clean(tmp_path)).endswith('{"translation":"Bonjour le monde !"}')
        (page,) = re.findall(r"Open (http\S+)", output)
        assert "<title>Translator</title>" in httpx.get(page, timeout=60).text
        assert process.poll() is None
        os.write(terminal, b"\x03")  # Ctrl+C
        end = read_until(None, terminal, seconds=300)
        assert process.wait(100) == 0, end
        assert "stopping the server" in end and "Error" not in end and "***" not in end
        assert not left_by_demo()
        socket.create_server(("127.0.0.1", 8000)).close()


@pytest.mark.xdist_group("ray")
def test_make_demo_ends_with_its_terminal(tmp_path):
    with alone(8000):
        with at_terminal("make demo", ROOT, clean(tmp_path)) as (_, terminal):
            read_until("1/4 train", terminal)
        end = time.monotonic() + 300
        while left_by_demo():
            assert time.monotonic() < end, left_by_demo()
            time.sleep(0.5)


def copy(folder):
    """The templates, as somebody copies them; the folder."""
    for path in (path for path in (ROOT / "templates").iterdir() if path.is_file()):
        shutil.copy(path, folder)
    return folder


def run_all(pairs, folder):
    """Run commands in a folder in turn, and compare what they print; return how many were run."""
    environment, done = {**clean(folder), "RAY_TMPDIR": "/tmp"}, 0
    with contextlib.ExitStack() as stack:
        for command, expected in pairs:
            if not_run(command):
                continue
            done += 1
            if command.startswith("docker build "):
                options, (tag,) = (
                    " ".join(stack.enter_context(build_options())),
                    re.findall(r"-t (\S+)", command),
                )
                command = command.replace("docker build ", f"docker build {options} ")
                stack.callback(
                    subprocess.run, ["docker", "image", "rm", tag], stdout=subprocess.DEVNULL
                )
            if command.startswith(("serve run", "docker run --mount")):
                stack.enter_context(alone(8000))
                server = subprocess.Popen(
                    ["bash", "-c", f"exec {command} > serve.log 2>&1"],
                    cwd=folder,
                    env=environment,
                    start_new_session=True,
                )
                stack.callback(server.wait, 60)
                stack.callback(server.send_signal, signal.SIGTERM)
                wait_for("http://127.0.0.1:8000/translate/health", server, folder / "serve.log")
                continue
            output = run(command, folder, environment).replace("\r\n", "\n")
            assert shows(output, expected), (command, expected, output)
    return done


def test_pictures_of_the_readme_are_there():
    text = (ROOT / "README.md").read_text("utf-8")
    pictures = re.findall(r'!\[[^]]*\]\(([^)]+)\)|src(?:set)?="([^"]+)"', text)
    assert len(pictures) == 5
    for names in pictures:
        assert (ROOT / "".join(names)).stat().st_size > 1000, names


def test_files_that_the_readme_names_are_there():
    tree = (ROOT / "README.md").read_text("utf-8").split("## What is here")[1].split("```")[1]
    names, files = (
        r"[\w-]*\.[\w.-]+\w|Dockerfile[\w-]*",
        tree.split("templates/ ")[1].split("\ndocs/ ")[0],
    )
    described = set(re.findall(names, files))
    kept = {
        path for path in (ROOT / "templates").iterdir() if path.is_file() and path.name != ".env"
    }
    assert {path.name for path in kept} == described
