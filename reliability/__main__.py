"""Cause failures in the server and the flow, and count what is lost: `make faults`.

    PYTHONPATH=templates:tests python -m reliability [--times 10] [--seconds 300] [--only NAME ...]

Every answer is compared with the right one. Half of the clients take the first answer as it is, the
other half try again as docs/serve.md says. Everything runs on this machine, on loopback, and ends
with it. The results go into docs/reliability.md.
"""

import argparse
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

from reliability.arrivals import RATES, arrivals
from reliability.containers import CONTAINER, HEAD_LOST, container_faults
from reliability.long_run import long_run
from reliability.page import HEADS, write
from reliability.server import SERVE, serve_faults
from reliability.training import TRAIN, train_faults

NAMES = [*RATES, *SERVE, "node lost", *CONTAINER, HEAD_LOST, *TRAIN, "long run"]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--times", type=int, default=10, help="how often each fault is tried")
    parser.add_argument("--seconds", type=float, default=300, help="of each load")
    parser.add_argument("--minutes", type=float, default=30, help="of the long run")
    parser.add_argument("--only", nargs="*", default=NAMES, choices=NAMES, metavar="NAME")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("reliability: stopped"))
    os.environ["OMP_NUM_THREADS"] = "1"
    folder = Path(tempfile.mkdtemp(prefix="faults.", dir="/tmp"))  # short: Ray puts sockets there
    tables = {name: [] for name in HEADS}
    try:
        for table, part, how_much in (
            ("load", arrivals, arguments.seconds),
            ("faults", serve_faults, arguments.times),
            ("faults", container_faults, arguments.times),
            ("faults", train_faults, arguments.times),
            ("long run", long_run, arguments.minutes),
        ):
            for each in part(folder / part.__name__, arguments.only, how_much):
                print(*each, sep=", ", flush=True)
                tables[table].append(each)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        write(tables, NAMES)  # what is done is not lost if the rest fails


if __name__ == "__main__":
    main()
