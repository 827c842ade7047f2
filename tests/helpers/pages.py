"""Commands and blocks of README.md and docs/: read them, and run them in a folder with copies."""

import contextlib
import fnmatch
import re
import shutil
import signal
import subprocess

from helpers.loopback import alone, build_options
from helpers.repository import ROOT, template_files
from helpers.shell import clean, run

from tools import demo

NOT_RUN = {  # pattern: why
    "pip install *": "the packages are installed before the tests, which need no network",
    "WANDB_API_KEY=... *": "needs an account; test_tracking.py runs it against a stand-in",
    "make setup": "is what the tests are run from",
    "make lint": "is what .ci/run runs",
    "make test": "is this",
    "make test-all": "is this",
    ".venv/bin/python -m pytest *": "is a part of this",
    "PICTURES=* *": "is a part of this too; the variable keeps the picture",
    "python template_flow.py run --data pairs.tsv *": "needs the hub; test_template_flow.py",
    "python template_flow.py argo-workflows create*": "needs Argo; test_remote.py runs its result",
    "serve run template_ray_serve:build model=*": "its path is made up; test_template_ray_serve.py",
    "RAY_AUTH_MODE=token python check_serve_config.py *": "test_check_serve_config.py does it",
    "kubectl *": "needs a cluster; test_rayservice.py runs kubectl without one",
}


def blocks_in(text, language):
    """Return the blocks in this language of a text in Markdown."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def commands_in(text):
    """Return [(command, lines of output that follow it), ...] of a text in Markdown."""
    found = []
    for block in blocks_in(text, "console"):
        for line in block.replace("\\\n", "").splitlines():  # a command may go on in the next line
            if line.startswith("$ "):
                found.append((line[2:], []))
            else:
                found[-1][1].append(line)
    return found


def commands(page=ROOT / "README.md"):
    """Return the commands of a page, and what they print."""
    return commands_in(page.read_text("utf-8"))


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


def start_server(command, folder, stack, environment):
    """Start a server of the translator and wait until it answers; the stack ends it."""
    log = folder / "serve.log"
    for tries_left in (4, 3, 2, 1, 0):
        server = subprocess.Popen(
            ["bash", "-c", f"exec {command} > serve.log 2>&1"],
            cwd=folder,
            env=environment,
            start_new_session=True,
        )
        stack.callback(server.wait, 60)
        stack.callback(server.send_signal, signal.SIGTERM)
        if demo.comes_up(server):
            return
        assert demo.TOO_SLOW in log.read_text() and tries_left, log.read_text()


def copy(folder):
    """The templates, as somebody copies them; the folder."""
    for path in template_files():
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
                start_server(command, folder, stack, environment)
                continue
            output = run(command, folder, environment).replace("\r\n", "\n")
            assert shows(output, expected), (command, expected, output)
    return done


def blocks(name, language):
    """Return the blocks of a page in docs/."""
    return blocks_in((ROOT / "docs" / name).read_text("utf-8"), language)
