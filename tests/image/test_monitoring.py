"""A real Prometheus reads the metrics that docs, dashboard and alerts name from the image."""

import contextlib
import json
import os
import re
import shutil
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from helpers.app import with_code_in_call
from helpers.dashboard import draw
from helpers.images import APP, Container, address, mounted
from helpers.prometheus import Prometheus, firing
from helpers.remote import pods
from helpers.repository import ROOT, TEMPLATES
from tiny_translator import PAIRS

pytestmark = [
    pytest.mark.xdist_group("docker"),
    pytest.mark.slow,
    pytest.mark.skipif(not shutil.which("prometheus"), reason="no prometheus: install the package"),
]
DASHBOARD = json.loads((TEMPLATES / "dashboard.json").read_text("utf-8"))
NAMING = [
    TEMPLATES / "alerts.yaml",
    TEMPLATES / "dashboard.json",
    ROOT / "docs/operate.md",
]


# What the model does while these files are there.
FAULTY = """
while Path("/tmp/slow").exists():
    time.sleep(0.1)
if Path("/tmp/fail").exists():
    raise ValueError("on purpose")
self.model.generation_config.max_new_tokens = 2 if Path("/tmp/cut").exists() else 40
"""
KILL_REPLICA = """
import glob, os
for path in glob.glob("/proc/[0-9]*/cmdline"):
    if open(path, "rb").read().startswith(b"ray::ServeReplica"):
        os.kill(int(path.split("/")[2]), 9)
"""


@pytest.fixture(scope="module")
def running(image, tmp_path_factory):
    folder = tmp_path_factory.mktemp("faulty")
    app = folder / "app.py"
    app.write_text(with_code_in_call(FAULTY), "utf-8")
    config = (TEMPLATES / "serve_config.yaml").read_text("utf-8")
    # One replica: an update needs a free CPU for the next one.
    one_replica = config.replace("max_replicas: 4", "max_replicas: 1")
    (folder / "serve_config.yaml").write_text(one_replica, "utf-8")
    mount = f"--mount=type=bind,source={app},target={APP}"
    # Docker's own check would be counted as well.
    with Container("--no-healthcheck", mount, *mounted(folder)) as running:
        running.first_answer(lambda: healthy(running))
        yield running


@pytest.fixture(scope="module")
def prometheus(running):
    with Prometheus(f"{address(running.id)}:8080") as prometheus:
        yield prometheus


def metrics_in(text):
    """Return the names of the metrics in a text."""
    return set(re.findall(r"\bray_\w+", text))


def healthy(running):
    try:
        url = f"http://127.0.0.1:{running.port}/translate/health"
        return urllib.request.urlopen(url, timeout=5).status, None
    except OSError:
        return 0, None


def test_every_metric_has_a_series_before_the_first_request(running, prometheus):
    names = set()
    for path in NAMING:
        found = metrics_in(path.read_text("utf-8"))
        assert found, path
        names |= found
    assert len(names) > 20
    for name in sorted(names):
        prometheus.wait_for(name)
    ((_, requests),) = prometheus.query("sum(ray_translator_requests_total)")
    assert requests == 0


def test_a_counted_load_is_counted_right(running, prometheus):
    for text in PAIRS:
        assert running.ask(text) == (200, {"translation": PAIRS[text]})
    for wrong in ({"text": 1}, {"texts": "Hello"}, {}):
        assert running.post("/translate", wrong)[0] == 422
    right = {
        'ray_translator_requests_total{status="200"}': len(PAIRS),
        'ray_translator_requests_total{status="422"}': 3,
        "ray_translator_inputs_total": len(PAIRS),
        "ray_translator_texts_total": len(PAIRS),
        "ray_translator_batches_total": len(PAIRS),
        "ray_translator_characters_total": len("".join(PAIRS)),
        "ray_translator_cut_sentences_total": 0,
        'ray_translator_request_seconds_bucket_total{le="+Inf"}': len(PAIRS) + 3,
        "ray_translator_queue": 0,
    }
    for name, value in right.items():
        prometheus.wait_for(f"sum({name}) == {value}")
    for name in ("model_seconds", "output_tokens", "input_size", "tokens"):
        assert prometheus.query(f"sum(ray_translator_{name}_total) > 0"), name
    health = json.load(
        urllib.request.urlopen(f"http://127.0.0.1:{running.port}/translate/health", timeout=30)
    )
    ((labels, _),) = prometheus.query("ray_translator_served")
    assert {name: labels[name] for name in ("release", "code", "model")} == {
        name: health[name] for name in ("release", "code", "model")
    }


def test_the_dashboard_shows_something_in_every_panel_and_no_alert_fires(
    running, prometheus, tmp_path
):
    texts = list(PAIRS)
    end = time.monotonic() + 40
    with ThreadPoolExecutor(8) as pool:
        while time.monotonic() < end:
            clients = 1 + int(time.monotonic() / 10) % 2 * 7  # one, and eight, in turns
            answers = list(pool.map(running.ask, texts * clients))
            assert {status for status, _ in answers} == {200}
    titles = [panel["title"] for panel in DASHBOARD["panels"]]
    assert len(titles) == len(set(titles)) > 10
    for panel in DASHBOARD["panels"]:
        for target in panel["targets"]:
            found = prometheus.wait_for(target["expr"])
            labels = re.findall(r"{{(\w+)}}", target.get("legendFormat", ""))
            assert all(label in series for label in labels for series, _ in found), panel["title"]
            print(panel["title"], target.get("legendFormat"), found[0][1])
    assert prometheus.alerts() == {}
    picture = Path(os.environ.get("PICTURES") or tmp_path, "dashboard.png")
    draw(prometheus, picture, seconds=60)
    assert picture.stat().st_size > 20_000


# -- Alerts: each fault, in turn -------------------------------------------------------------------


def wait_for_alert(prometheus, name, action=lambda: None, seconds=200):
    """Repeat an action until the condition of an alert holds: it is pending, or fires."""
    end = time.monotonic() + seconds
    while name not in prometheus.alerts():
        assert time.monotonic() < end, (name, prometheus.alerts())
        action()
        time.sleep(0.2)


@contextlib.contextmanager
def fault(running, name):
    running.inside("touch", f"/tmp/{name}")
    try:
        yield
    finally:
        running.inside("rm", f"/tmp/{name}")


def deploy(running, change):
    """Deploy the config with a change, without waiting for the end."""
    script = (
        f"sed '{change}' serve_config.yaml > /tmp/new.yaml && "
        "python check_serve_config.py /tmp/new.yaml --deploy http://127.0.0.1:8265"
    )
    assert pods.docker("exec", "--detach", running.id, "sh", "-c", script).returncode == 0


def test_cut_translations(running, prometheus):
    with fault(running, "cut"):
        wait_for_alert(prometheus, "Cut", running.ask)


def test_texts_of_another_length(running, prometheus):
    wait_for_alert(prometheus, "OtherTexts", lambda: running.ask("." * 3000))


def test_a_model_that_fails(running, prometheus):
    with fault(running, "fail"):
        assert running.ask()[0] == 500
        wait_for_alert(prometheus, "Failing", running.ask)


def test_requests_that_take_long_and_others_that_find_no_place(running, prometheus):
    many = {"text": ["Hello world!"] * 400}
    with ThreadPoolExecutor(100) as pool:
        with fault(running, "slow"):
            for _ in range(2):
                pool.submit(running.post, "/translate", many, 200)
            for _ in range(98):  # more than one in a hundred of the requests before
                pool.submit(running.ask, timeout=200)
            wait_for_alert(prometheus, "Refusing", lambda: running.post("/translate", many))
            time.sleep(11)
    wait_for_alert(prometheus, "Slow")


def test_replicas_that_start_again_and_again(running, prometheus):
    replicas = "count(count_over_time(ray_serve_deployment_replica_starts_total[30m]))"
    ((_, seen),) = prometheus.wait_for(replicas)
    for _ in range(4):
        assert running.inside("python", "-c", KILL_REPLICA).returncode == 0
        running.first_answer(running.ask)
        seen += 1
        prometheus.wait_for(f"{replicas} >= {seen}")
    wait_for_alert(prometheus, "Restarting")


def test_a_deploy_that_fails_and_one_that_has_no_room(running, prometheus):
    deploy(running, "s/max_batch_size: 32/model: nothing/")
    wait_for_alert(prometheus, "DeployFailed")
    running.first_answer(running.ask)
    deploy(running, "s/num_cpus: 1/num_cpus: 1000/")
    wait_for_alert(prometheus, "DeployHangs")
    running.first_answer(running.ask)


def test_two_versions_side_by_side(running, prometheus):
    running.inside("sh", "-c", "cp -r model /tmp/other; touch /tmp/other/new")
    deploy(running, "s#max_batch_size: 32#model: /tmp/other#")
    wait_for_alert(prometheus, "SeveralVersions")
    running.first_answer(running.ask)


def test_nobody_answers(running, prometheus):
    pods.docker("kill", running.id)
    wait_for_alert(prometheus, "NoReplica")


# -- Alerts: how long a condition has to hold ------------------------------------------------------

NORMAL = {  # series of an hour: start, and what is added each minute
    'ray_translator_requests_total{status="200"}': "0+600x60",
    'ray_translator_requests_total{status="500"}': "0+1x60",
    'ray_translator_requests_total{status="503"}': "0+1x60",
    'ray_translator_requests_total{status="504"}': "0+1x60",
    'ray_translator_request_seconds_bucket_total{le="5"}': "0+600x60",
    'ray_translator_request_seconds_bucket_total{le="20"}': "0+603x60",
    'ray_translator_request_seconds_bucket_total{le="+Inf"}': "0+603x60",
    "ray_translator_inputs_total": "0+1200x60",
    "ray_translator_cut_sentences_total": "0+1x60",
    "ray_translator_texts_total": "0+600x60",
    "ray_translator_characters_total": "0+30000x60",
    "ray_translator_tokens_total": "0+8000x60",
    "ray_translator_unknown_tokens_total": "0+10x60",
    'ray_translator_expected{counter="characters"}': "40x60",
    'ray_translator_expected{counter="tokens"}': "10x60",
    'ray_translator_expected{counter="unknown_tokens"}': "0x60",
    'ray_translator_served{release="1", code="a", model="b", replica="1"}': "1x60",
    'ray_translator_served{release="1", code="a", model="b", replica="2"}': "1x60",
    "ray_serve_deployment_replica_healthy": "2x60",
    'ray_serve_deployment_replica_starts_total{replica="1"}': "1x60",
    'ray_serve_deployment_replica_starts_total{replica="2"}': "1x60",
    "ray_serve_autoscaling_target_replicas": "2x60",
    'ray_serve_application_status{application="translator"}': "6x60",
    'ray_node_mem_available{instance="node"}': "400x60",
    'ray_node_mem_total{instance="node"}': "1000x60",
}
FAULTS = {  # alert: (the series of the fault, minutes until it fires)
    "NoReplica": ({"ray_serve_deployment_replica_healthy": "0x60"}, 2),
    "Failing": ({'ray_translator_requests_total{status="500"}': "0+9x60"}, 5),
    "Refusing": ({'ray_translator_requests_total{status="503"}': "0+9x60"}, 5),
    "Slow": ({'ray_translator_request_seconds_bucket_total{le="5"}': "0+500x60"}, 10),
    "Cut": ({"ray_translator_cut_sentences_total": "0+30x60"}, 10),
    "OtherTexts": ({"ray_translator_characters_total": "0+90000x60"}, 30),
    "NearlyOutOfMemory": ({'ray_node_mem_available{instance="node"}': "50x60"}, 5),
    "Restarting": (
        {
            f'ray_serve_deployment_replica_starts_total{{replica="{number}"}}': f"_x{number} 1x60"
            for number in range(9, 27, 3)
        },
        15,
    ),
    "DeployFailed": ({'ray_serve_application_status{application="translator"}': "1x60"}, 2),
    "DeployHangs": ({'ray_serve_application_status{application="translator"}': "5x60"}, 15),
    "SeveralVersions": (
        {
            'ray_translator_served{release="1", code="a", model="b", replica="2"}': "_x60",
            'ray_translator_served{release="1", code="a", model="c", replica="2"}': "1x60",
        },
        15,
    ),
}


def test_no_alert_fires_in_an_hour_of_normal_load(tmp_path):
    assert firing(tmp_path, NORMAL, range(60)) == set()


def test_every_alert_fires_after_its_time_and_no_other_does(tmp_path):
    names = re.findall(r"alert: (\w+)", (TEMPLATES / "alerts.yaml").read_text("utf-8"))
    assert sorted(names) == sorted(FAULTS)
    for name, (series, minutes) in FAULTS.items():
        found = firing(tmp_path, NORMAL | series, range(60))
        assert {alert for alert, _ in found} == {name}
        first = min(int(re.match(r"\d+", time)[0]) for _, time in found)
        print(name, "fires after", first, "minutes")
        assert minutes <= first <= minutes + 6


def test_the_page_says_what_to_do_for_every_alert():
    page = (ROOT / "docs/operate.md").read_text("utf-8")
    assert re.findall(r"^\| (\w+) \| [^|]+ \| [^|]+ \|$", page, re.MULTILINE)[1:] == list(FAULTS)
