"""What the jobs share: a load during which something breaks, and a count of what was lost."""

import contextlib
import re
import subprocess
import sys
import time

from helpers.load import Load
from helpers.repository import TEMPLATES

LIKE_IMAGE = dict(
    re.findall(
        r"(RAY_(?:SERVE|ROTATION)\w+)=(\S+)", (TEMPLATES / "Dockerfile-rayserve").read_text()
    )
)


def since(load, at):
    """(in flight then, lost by who asks once, by who tries again, wrong, recovery in s)."""
    lost = [each for each in load.lost() if each.end > at]
    again = sum(each.again for each in lost)
    return (
        sum(each.begin < at < each.end for each in load.answers),
        len(lost) - again,
        again,
        len(load.wrong()),
        max([each.end - at for each in lost], default=0.0),
    )


@contextlib.contextmanager
def under_load(results, warm, *ports):
    """Eight clients, four of which try again; `since` of what follows `warm` joins the results."""
    with Load(*ports, clients=8, again=True) as load:
        time.sleep(warm)
        at = time.monotonic()
        yield load
    results.append(since(load, at))


def deploy(server, config):
    """Ask the running server for another config, by the documented command; its exit code."""
    done = subprocess.run(
        [
            sys.executable,
            "check_serve_config.py",
            config,
            "--deploy",
            f"http://127.0.0.1:{server.dashboard}",
            "--timeout",
            "300",
        ],
        cwd=server.folder,
        env=server.environment,
        capture_output=True,
        timeout=400,
    )
    return done.returncode


def settled(server, replicas, seconds=400):
    """Wait until all replicas are back and a request is answered."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if len(server.processes("ServeReplica")) == replicas and server.ask(
            body={"text": "Thank you."}, timeout=5
        ) == (200, {"translation": "Merci."}):
            return
        time.sleep(0.3)
    raise AssertionError(f"not itself again after {seconds} s:\n{server.log.read_text()[-3000:]}")


def row(name, results):
    """A line of the table out of the tuples that `since` gives."""
    flying, once, again, wrong, recovery = zip(*results)
    return (
        name,
        len(results),
        sum(flying),
        sum(once),
        sum(again),
        sum(wrong),
        f"{max(recovery):.1f}",
    )
