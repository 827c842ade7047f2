"""A long run under mixed load: what may not grow."""

import threading
import time

import matplotlib
from helpers.app import log_files, make_app
from helpers.load import Load
from serve_testing import Server
from tiny_translator import PAIRS

from reliability.measure import LIKE_IMAGE
from reliability.page import PAGE

PARTS = ("ServeReplica", "ProxyActor", "ServeController", "raylet/raylet", "gcs_server")


def sample(server):
    """{(process, what): figure}: memory, open files, threads of each process, and all logs."""
    found = {}
    for part in PARTS:
        for process in server.processes(part):
            found[part, "memory in MB"] = process.memory_info().rss / 1e6
            found[part, "open files"] = process.num_fds()
            found[part, "threads"] = process.num_threads()
    found["all", "logs in MB"] = sum(path.stat().st_size for path in log_files(server)) / 1e6
    return found


def nonsense(server, over):
    """Requests that are none: bad JSON, too large, unknown paths, clients that leave."""
    number = 0
    while not over.wait(0.2):
        number += 1
        server.ask(body=b"{" * (number % 900))
        server.ask(body={"text": "a" * 300_000})
        server.ask(f"/translate/{number}", method="GET")
        server.ask(body={"text": list(PAIRS) * 20}, timeout=0.02)


def long_run(folder, names, minutes):
    """(figure, minutes, after a fifth, at the end, requests, wrong) under mixed load; a picture."""
    if "long run" not in names:
        return
    config, samples, over = make_app(folder, replicas=1), [], threading.Event()
    # Logs a twentieth of what the image allows, so that it is seen when they are full.
    limits = {**LIKE_IMAGE, "RAY_ROTATION_MAX_BYTES": "1000000"}
    with Server(folder, "run", config.name, cpus=2, **limits) as server:
        server.wait()
        other = threading.Thread(target=nonsense, args=[server, over])
        with Load(server.port, clients=4) as load:
            other.start()
            begin = time.monotonic()
            while time.monotonic() < begin + 60 * minutes:
                time.sleep(60 * minutes / 100)
                samples.append((time.monotonic() - begin, sample(server)))
            over.set()
            other.join(400)
    draw(samples)
    early, late = samples[len(samples) // 5][1], samples[-1][1]
    for part, what in late:
        figures = f"{early[part, what]:.0f}", f"{late[part, what]:.0f}"
        yield f"{part}, {what}", f"{minutes:g}", *figures, len(load.answers), len(load.wrong())


def draw(samples):
    matplotlib.use("svg")
    from matplotlib import pyplot

    kinds = ("memory in MB", "open files", "threads", "logs in MB")
    figure, axes = pyplot.subplots(2, 2, figsize=(9, 6), sharex=True, layout="constrained")
    for plot, kind in zip(axes.flat, kinds):
        for part in [part for part, what in samples[-1][1] if what == kind]:
            plot.plot(
                [at / 60 for at, _ in samples],
                [found.get((part, kind), 0) for _, found in samples],
                label=part,
            )
        plot.set(title=kind, ylim=(0, None))
        plot.legend(fontsize="x-small")
    for plot in axes[1]:
        plot.set_xlabel("minutes")
    figure.savefig(PAGE.with_suffix(".svg"))
