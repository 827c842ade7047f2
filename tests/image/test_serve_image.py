"""templates/Dockerfile-rayserve with a real Docker daemon: its commands, and failures."""

import json
import re
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import yaml
from helpers.app import with_code_in_call
from helpers.images import (
    APP,
    CANARY,
    FILES,
    LABEL,
    RUN,
    Container,
    build,
    described,
    mounted,
    saved,
)
from helpers.leaks import find
from helpers.remote import pods
from tiny_translator import PAIRS

pytestmark = pytest.mark.xdist_group("docker")


def test_image_is_small_and_holds_no_secret_and_no_cache(image):
    size = int(pods.docker("image", "inspect", image, "--format", "{{.Size}}").stdout)
    print(f"{size / 1e9:.2f} GB")
    assert size < 1.5e9
    about = described(image)
    assert "org.opencontainers.image.title" in about and find(CANARY, about.encode()) == 0
    whole = saved(image)
    assert find(CANARY, whole) == 0 < find("RAY_USAGE_STATS_ENABLED=0", whole)
    looked = pods.docker(
        "run",
        "--rm",
        f"--label={LABEL}",
        "--user=0",
        "--entrypoint=sh",
        image,
        "-c",
        "ls -A /serve_app; echo ---; find / -xdev -type f -perm -2 ! -path '/proc/*'; echo ---; "
        "find /root /venv /var -name '*.deb' -o -name '*_Packages' -o -name pip; "
        "echo ---; find / -xdev -perm -4000 -newer /venv/pyvenv.cfg -type f",
    ).stdout
    app, writable, caches, setuid = looked.split("---")
    assert set(app.split()) == {"model", *FILES[3:]}
    assert not writable.split() and not caches.split() and not setuid.split(), looked


def test_the_lock_names_every_package_by_hash(image):
    lock = pods.docker(
        "run", "--rm", f"--label={LABEL}", image, "cat", "/venv/lock.txt"
    ).stdout.splitlines()
    assert all(
        re.fullmatch(r"[\w.\-]+==[\w.+]+ --hash=sha256:[0-9a-f]{64}", line) for line in lock
    ), lock
    inside = pods.docker(
        "run",
        "--rm",
        f"--label={LABEL}",
        image,
        "python",
        "-c",
        "import importlib.metadata as m\n"
        "for one in m.distributions(): print(one.name + '==' + one.version)",
    ).stdout.split()
    name = lambda each: re.sub(r"[-_.]+", "-", each.split()[0]).lower()  # noqa: E731
    assert sorted(map(name, lock)) == sorted(map(name, inside)) and len(lock) > 60


@pytest.mark.slow
def test_a_change_of_code_builds_only_the_last_layer(image, project):
    code = project / "template_ray_serve.py"
    before = code.read_text()
    try:
        code.write_text(before + "\n# changed\n")
        seconds, output = build(project, "template_rayserve_image:changed")
    finally:
        code.write_text(before)
        pods.docker("image", "rm", "template_rayserve_image:changed")
    print(f"built after a change in {seconds:.1f} s")
    assert len(re.findall("Using cache", output)) >= 18  # of 25 steps


WAYS = {
    "as documented, with the config mounted": ["config"],
    "with the config inside": [],
    "read-only, as another user, 64 MB of shared memory": [
        "--read-only",
        "--tmpfs=/tmp",
        "--user=123456:0",
        "--shm-size=64m",
        "--cap-drop=ALL",
        "--security-opt=no-new-privileges",
    ],
    "one CPU and 2 GB": ["--cpus=1", "--memory=2g"],
}


FIRST = "as documented, with the config mounted"


@pytest.mark.parametrize(
    "way", [pytest.param(way, marks=[] if way == FIRST else pytest.mark.slow) for way in WAYS]
)
def test_it_serves(image, project, way):
    options = [
        part
        for option in WAYS[way]
        for part in (mounted(project) if option == "config" else [option])
    ]
    with Container(*options, command=RUN if WAYS[way] == ["config"] else ()) as running:
        begin = time.monotonic()
        running.wait()
        print(f"{way}: translates after {time.monotonic() - begin:.0f} s")
        assert int(running.inside("id", "-u").stdout) != 0
        assert "Traceback" not in running.logs()
        for text, answer in PAIRS.items():
            assert running.ask(text) == (200, {"translation": answer})


@pytest.mark.slow
def test_without_a_network_and_its_health(image):
    with Container(
        "--network=none", "--health-interval=1s", "--health-start-period=0s", publish=False
    ) as running:
        assert running.state("Health.Status") == "starting"
        running.wait(running.ask_inside)
        end = time.monotonic() + 400
        while running.state("Health.Status") != "healthy" and time.monotonic() < end:
            time.sleep(0.5)
        assert running.state("Health.Status") == "healthy"


BROKEN = """
if Path("/tmp/broken").exists():
    raise ValueError
"""


@pytest.mark.slow
def test_the_health_check_follows_the_config_and_fails_without_an_answer(image, project, tmp_path):
    config = yaml.safe_load((project / "serve_config.yaml").read_text())
    config["http_options"]["port"] = 8001
    config["applications"][0]["route_prefix"] = "/other"
    (tmp_path / "serve_config.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "broken.py").write_text(with_code_in_call(BROKEN), "utf-8")
    app = f"--mount=type=bind,source={tmp_path / 'broken.py'},target={APP}"
    described = json.loads(pods.docker("image", "inspect", image).stdout)
    kind, *health = described[0]["Config"]["Healthcheck"]["Test"]
    assert (kind, health) == (
        "CMD",
        ["python", "rayserve_entrypoint.py", "health", "serve_config.yaml"],
    )
    with Container(app, *mounted(tmp_path), publish=False) as running:
        assert running.inside(*health).returncode != 0  # it only starts
        end = time.monotonic() + 400
        while running.inside(*health).returncode and time.monotonic() < end:
            time.sleep(1)
        assert running.inside(*health).returncode == 0, running.logs()
        assert running.ask_inside()[0] == 0  # not at the port and route of the image's config
        running.inside("touch", "/tmp/broken")
        done = running.inside(*health)
        assert done.returncode != 0 and "500" in done.stdout
        running.inside("rm", "/tmp/broken")
        assert running.inside(*health).returncode == 0


def test_a_wrong_config_ends_it_with_the_reason(image, project, tmp_path):
    config = yaml.safe_load((project / "serve_config.yaml").read_text())
    config["applications"][0]["args"]["max_bach_size"] = 8
    (tmp_path / "serve_config.yaml").write_text(yaml.safe_dump(config))
    done = pods.docker("run", "--rm", f"--label={LABEL}", *mounted(tmp_path), image, *RUN)
    assert done.returncode == 1 and len(done.stdout.splitlines()) == 1, done.stdout
    assert "max_bach_size" in done.stdout


SLOW = """
if Path("/tmp/slow").exists():
    __import__("time").sleep(10)
"""


@pytest.mark.slow
def test_told_to_stop_it_answers_what_has_begun_and_nothing_more(image, project, tmp_path):
    (tmp_path / "slow.py").write_text(with_code_in_call(SLOW), "utf-8")
    mount = f"--mount=type=bind,source={tmp_path / 'slow.py'},target={APP}"
    with Container(mount) as running:
        running.wait()
        running.inside("touch", "/tmp/slow")
        with ThreadPoolExecutor(len(PAIRS)) as threads:
            begun = [threads.submit(running.ask, text) for text in PAIRS]
            time.sleep(2)
            begin = time.monotonic()
            pods.docker("kill", "--signal=SIGTERM", running.id)
            time.sleep(5)
            assert not any(job.done() for job in begun)
            late = running.ask(timeout=5)[0]
            answers = [job.result() for job in begun]
        assert pods.docker("wait", running.id).stdout.strip() == "0", running.logs()
        took = time.monotonic() - begin
        print(f"ended after {took:.0f} s; a request meanwhile got {late}")
        assert answers == [(200, {"translation": answer}) for answer in PAIRS.values()]
        assert late == 404 and running.ask(timeout=5)[0] == 0


@pytest.mark.slow
def test_told_to_stop_while_it_starts(image):
    for seconds in (0.5, 1.5, 3, 5, 8):  # the config's check, the imports, Ray, the model
        with Container() as running:
            time.sleep(seconds)
            assert pods.docker("stop", "--time=60", running.id).returncode == 0
            logs = running.logs()
            assert running.state("ExitCode") == "0" and "Traceback" not in logs, (seconds, logs)


@pytest.mark.slow
def test_a_full_disk_stops_no_answer_and_killed_it_starts_again(image):
    with Container("--tmpfs=/tmp:size=256m", "--read-only") as running:
        running.wait()
        running.inside("sh", "-c", "cat /dev/zero > /tmp/full")
        assert all(
            running.ask(text) == (200, {"translation": answer}) for text, answer in PAIRS.items()
        )
        assert pods.docker("kill", running.id).returncode == 0
        assert pods.docker("start", running.id).returncode == 0
        running.wait()
