"""Small servers on this machine that tests need, and the ports that two tests may want at once."""

import contextlib
import fcntl
import functools
import http.server
import os
import re
import subprocess
import sys
import tempfile
import threading
from pathlib import Path


class Files(http.server.SimpleHTTPRequestHandler):
    """The files of a folder."""

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def served(handler, address="127.0.0.1", port=0):
    """Serve on a free port; yield the server, which then knows its `url`."""
    with http.server.ThreadingHTTPServer((address, port), handler) as server:
        server.asked, server.url = [], f"http://{address}:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@contextlib.contextmanager
def alone(name):
    """Wait until no test in another process has this port, or whatever else there is one of."""
    folder = os.environ.get("PYTEST_DEBUG_TEMPROOT", tempfile.gettempdir())  # same in every run
    with open(Path(folder, f"templates-test-{name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def build_options():
    """What to add to `docker build` where pip has the CPU build of torch in a folder."""
    settings = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True
    ).stdout
    folders = re.findall(r"find-links='(/[^']+)'", settings)
    wheels = next((path for path in folders if list(Path(path).glob("torch-*+cpu-*.whl"))), None)
    if not wheels:
        yield []
        return
    # Always the same port: docker builds again when an argument differs.
    with alone(18733), served(functools.partial(Files, directory=wheels), port=18733) as server:
        yield ["--network=host", f"--build-arg=PIP_FIND_LINKS={server.url}"]
