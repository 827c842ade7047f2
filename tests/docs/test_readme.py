"""Every command in README.md is run as it stands, and prints what README.md says."""

import contextlib
import os
import re
import socket
import time
from pathlib import Path

import httpx
import psutil
import pytest
from helpers.loopback import alone
from helpers.pages import commands, shows
from helpers.repository import ROOT, template_files
from helpers.shell import clean, run
from helpers.terminal import at_terminal, read_until

from tools import demo


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


@pytest.mark.xdist_group("port 8000")
def test_make_demo_without_a_terminal(tmp_path):
    expected, _ = lines_of_demo()
    with alone(8000):
        as_root = {**clean(tmp_path), "USER": "root"}  # as in a container
        output = run("make demo < /dev/null", ROOT, as_root, seconds=900)
    assert shows(output, expected), output
    assert len(output.splitlines()) == len("\n".join(expected).strip().splitlines()), output
    assert "Done!" in (ROOT / "demo.log").read_text()
    assert not left_by_demo()


@pytest.mark.slow
@pytest.mark.xdist_group("port 8000")
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


@pytest.mark.slow
@pytest.mark.xdist_group("port 8000")
def test_make_demo_ends_with_its_terminal(tmp_path):
    # When a terminal closes, its shell ends, and then the foreground job.
    with alone(8000):
        with at_terminal("bash -c 'make demo; :'", ROOT, clean(tmp_path)) as (_, terminal):
            read_until("1/4 train", terminal)
        end = time.monotonic() + 300
        while left_by_demo():
            assert time.monotonic() < end, left_by_demo()
            time.sleep(0.5)


SLOW_AT_FIRST = """
import http.server, pathlib, sys

class Healthy(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

again = pathlib.Path("tried")
if not again.exists():
    again.touch()
    sys.exit("Exception: The current node timed out during startup.")
http.server.HTTPServer(("127.0.0.1", 8000), Healthy).serve_forever()
"""


@pytest.mark.xdist_group("port 8000")
def test_the_demo_starts_a_server_again_for_which_the_machine_was_too_slow(tmp_path, monkeypatch):
    (tmp_path / "server.py").write_text(SLOW_AT_FIRST)
    monkeypatch.setattr(demo, "SERVE", "python server.py")
    monkeypatch.setattr(demo, "LOG", tmp_path / "demo.log")
    monkeypatch.setattr(demo.signal, "signal", lambda *_: None)  # this process keeps its own
    with alone(8000):
        with demo.serving(tmp_path) as server:
            assert server.poll() is None
        assert server.poll() is not None
    assert demo.LOG.read_text().count("$ python server.py\n") == 2


def test_files_that_the_readme_names_are_there():
    tree = (ROOT / "README.md").read_text("utf-8").split("## What is here")[1].split("```")[1]
    names, files = (
        r"[\w-]*\.[\w.-]+\w|Dockerfile[\w-]*",
        tree.split("templates/ ")[1].split("\ndocs/ ")[0],
    )
    described = set(re.findall(names, files))
    assert {path.name for path in template_files()} == described
