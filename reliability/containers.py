"""Break containers: stopped, killed, out of memory, the head of a cluster lost."""

import shutil
import time

from helpers.app import make_app, with_code_in_call
from helpers.clusters import ContainerCluster
from helpers.images import APP, FILES, Container, build
from helpers.remote import pods
from helpers.repository import TEMPLATES

from reliability.measure import row, under_load


def told_to_stop(container, load):
    """SIGTERM: what has begun is answered. The clients end too: what comes later is for others."""
    pods.docker("kill", "--signal=SIGTERM", container.id)
    load.over.set()
    pods.docker("wait", container.id)
    pods.docker("start", container.id)


def killed(container, load):
    """Kill the whole container, including the head of Ray, and start it again."""
    pods.docker("kill", container.id)
    pods.docker("start", container.id)


IMAGE = "template_rayserve_image:faults"
# What somebody's model might do.
GREEDY = """
if Path("/tmp/greedy").exists():
    Path("/tmp/greedy").unlink()
    held = [b"x" * 100_000_000 for _ in range(40)]
    print("took 40 times 100 MB")
"""


def out_of_memory(container, load):
    """The replica takes more memory than the container may have: it is killed."""
    container.inside("touch", "/tmp/greedy")
    end = time.monotonic() + 400
    while container.inside("ls", "/tmp/greedy").returncode == 0 and time.monotonic() < end:
        time.sleep(0.2)
    time.sleep(5)
    assert "took 40 times" not in container.logs()


CONTAINER = {
    "container told to stop": told_to_stop,
    "container killed, started again": killed,
    "out of memory": out_of_memory,
}
HEAD_LOST = "head of a cluster killed"


def container_faults(folder, names, times):
    """The image, with one replica: who asks once loses what comes while it starts again."""
    wanted = [name for name in CONTAINER if name in names]
    if not wanted and HEAD_LOST not in names:
        return
    config = make_app(folder)
    for name in FILES:
        shutil.copy(TEMPLATES / name, folder)
    build(folder, IMAGE)
    (folder / "greedy.py").write_text(with_code_in_call(GREEDY), "utf-8")
    mount = f"--mount=type=bind,source={folder / 'greedy.py'},target={APP}"
    for name in wanted:
        results, options = [], [mount] if name == "out of memory" else []
        with Container("--memory=3g", "--memory-swap=3g", *options, image=IMAGE) as running:
            running.wait()
            for _ in range(times):
                with under_load(results, 2, running.port) as load:
                    CONTAINER[name](running, load)
                    running.wait()
                    time.sleep(2)
        yield row(name, results)
    if HEAD_LOST in names:
        results = []
        for _ in range(times):
            head_lost(config, results)
        yield row(HEAD_LOST, results)
    pods.docker("image", "rm", IMAGE)


def head_lost(config, results):
    """The head of a cluster of containers is killed; another one takes over, as with KubeRay."""
    clusters = []
    try:
        clusters.append(ContainerCluster(IMAGE, config, workers=2))
        clusters[0].deploy()
        with under_load(results, 2, *clusters[0].workers) as load:
            pods.docker("kill", clusters[0].head)
            clusters.append(ContainerCluster(IMAGE, config, workers=2))
            load.ports = list(clusters[1].deploy().workers)
            time.sleep(3)
            clusters[0].end()
            time.sleep(2)
    finally:
        for each in clusters:
            each.end()
