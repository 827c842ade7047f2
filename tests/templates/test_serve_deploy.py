"""What `check_serve_config.py --deploy` says is true: which model and which code are served."""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
import urllib.request
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml
from helpers.repository import TEMPLATES
from serve_testing import ROUTE, Server, write_model, write_toy

pytestmark = pytest.mark.slow
CONFIG = "config.yaml"
PATIENCE = 300  # seconds
# Of a company, as Docker sets them in each container: this one cannot be reached.
NAMES = ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY")
PROXIES = dict.fromkeys(NAMES, "http://127.0.0.1:9") | {"no_proxy": "", "NO_PROXY": ""}


def write_config(folder, **changes):
    """Write the shipped config for the toy; replicas need half a CPU. Changes are of the app."""
    config = yaml.safe_load((TEMPLATES / "serve_config.yaml").read_text("utf-8"))
    (application,) = config["applications"]
    application["route_prefix"] = ROUTE
    application |= changes
    (deployment,) = application["deployments"]
    deployment["ray_actor_options"]["num_cpus"] = 0.5
    deployment["autoscaling_config"] = {"min_replicas": 1, "max_replicas": 1}
    (folder / CONFIG).write_text(yaml.safe_dump(config))


AUTOSCALING = {  # from one replica to two and back within seconds, which by default take minutes
    "min_replicas": 1,
    "max_replicas": 2,
    "target_ongoing_requests": 1,
    "upscale_delay_s": 0.2,
    "downscale_delay_s": 1,
    "metrics_interval_s": 0.2,
    "look_back_period_s": 1,
}


def set_autoscaling(folder, **autoscaling):
    """Set how many replicas there are; nothing else is changed."""
    config = yaml.safe_load((folder / CONFIG).read_text())
    (deployment,) = config["applications"][0]["deployments"]
    deployment["autoscaling_config"] = autoscaling
    (folder / CONFIG).write_text(yaml.safe_dump(config))


def replace_model(folder, end):
    """Replace the model, as `export_model.py --replace` does."""
    new = folder / "new"
    write_model(new, [("hello", f"HELLO{end}")], end)
    model = folder / "model"
    if model.exists():
        model.rename(folder / "old")
        shutil.rmtree(folder / "old")
    new.rename(model)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("deployed")
    write_toy(folder)
    shutil.copy(TEMPLATES / "check_serve_config.py", folder)
    shutil.copy(TEMPLATES / "rayserve_entrypoint.py", folder)
    replace_model(folder, "!")
    write_config(folder)
    return folder


@pytest.fixture(scope="module")
def server(folder):
    with Server(folder, "run", CONFIG, cpus=2, dashboard=True, **PROXIES) as running:
        running.folder = folder
        yield running.wait()


def run_python(server, *command):
    return subprocess.run(
        [sys.executable, *command],
        cwd=server.folder,
        env={**os.environ, **server.environment},
        capture_output=True,
        text=True,
        timeout=2 * PATIENCE,
    )


def run(server, *arguments):
    address = f"http://127.0.0.1:{server.dashboard}"
    options = ("--deploy", address, "--timeout", str(PATIENCE), *arguments)
    return run_python(server, "check_serve_config.py", CONFIG, *options)


def deploy(server):
    """Deploy the files in the folder; return what the command prints."""
    done = run(server)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1
    assert done.stdout.startswith(f"{CONFIG}: valid, and running: translator, ")
    return done.stdout


def answers(server, number=40):
    """Return the distinct answers to one text, and what /health reports, from several clients."""
    with ThreadPoolExecutor(8) as pool:
        asked = pool.map(lambda _: server.ask(body={"text": "hello"}), range(number))
        found = {str(answer.get("loud", answer)) for _, answer in asked}
        told = pool.map(lambda _: server.ask(ROUTE + "/health", method="GET"), range(number))
        served = {(answer["code"], answer["model"]) for _, answer in told}
    return found, served


def applications(server):
    """Return what Ray reports about the applications."""
    url = f"http://127.0.0.1:{server.dashboard}/api/serve/applications/"
    token = server.environment["RAY_AUTH_TOKEN"]
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"})
    with urllib.request.urlopen(request, timeout=60) as reply:
        return json.load(reply)["applications"]


def replicas(server):
    """Return how many replicas of the app answer."""
    (deployment,) = applications(server)["translator"]["deployments"].values()
    return sum(replica["state"] == "RUNNING" for replica in deployment["replicas"])


def wait_until(server, is_true):
    """Wait until a condition is true; fail with what Ray reports."""
    end = time.monotonic() + PATIENCE
    while not is_true():
        assert time.monotonic() < end, applications(server)
        time.sleep(0.2)


@contextmanager
def busy(server):
    """Ask all the time from six clients, which must all be answered."""
    over = threading.Event()

    def client(_):
        statuses = set()
        while not over.is_set():
            status, _ = server.ask(body={"text": "wait 0.2"})
            statuses.add(status)
        return statuses

    with ThreadPoolExecutor(6) as pool:
        found = pool.map(client, range(6))
        try:
            yield
        finally:
            over.set()
        assert set().union(*found) == {200}


def release():
    """Return the release that the first line of the app names."""
    lines = (TEMPLATES / "template_ray_serve.py").read_text("utf-8").splitlines()
    return lines[0].split()[-1]


def test_health_names_what_is_served(server):
    status, health = server.ask(ROUTE + "/health", method="GET")
    assert status == 200
    assert health.pop("status") == "ok"
    assert set(health) == {"release", "code", "model"}
    assert health["release"] == release()
    assert all(health.values())
    status, body = server.ask(ROUTE + "/health", method="HEAD")
    assert (status, body) == (200, "")


def test_a_replaced_model_and_a_changed_app_answer_after_the_deploy(server):
    folder = server.folder
    deploy(server)
    assert "unchanged" in deploy(server)
    _, ((code, model),) = answers(server)

    replace_model(folder, "?")
    assert "unchanged" not in deploy(server)
    found, ((same_code, new_model),) = answers(server)
    assert found == {"HELLO?"}
    assert (same_code, new_model != model) == (code, True)

    app = folder / "template_ray_serve.py"
    app.write_text(app.read_text("utf-8").replace("text.upper()", "text.title()"), "utf-8")
    replace_model(folder, "?")  # the same content
    (folder / "model/known_answers.json").unlink()
    said = deploy(server)
    found, ((new_code, new_model),) = answers(server)
    assert found == {"Hello?"}
    assert new_code != code
    assert f"translator, release {release()}, code {new_code}, model {new_model}\n" in said
    assert "unchanged" in deploy(server)

    write_toy(folder)  # as it was
    replace_model(folder, "!")
    deploy(server)
    assert answers(server) == ({"HELLO!"}, {(code, model)})


def test_a_replica_that_starts_later_serves_no_other_files(server):
    folder = server.folder
    deploy(server)
    set_autoscaling(folder, **AUTOSCALING)
    deploy(server)
    before = answers(server)
    with busy(server):
        wait_until(server, lambda: replicas(server) == 2)
        assert answers(server) == before
    wait_until(server, lambda: replicas(server) == 1)

    replace_model(folder, "?")
    with busy(server):
        wait_until(server, lambda: "was deployed: deploy again" in str(applications(server)))
        assert answers(server) == before
    assert answers(server) == before

    # Ray may count a failed start of an old replica as one of the new version: then a second try.
    if run(server).returncode:
        deploy(server)
    found, served = answers(server)
    assert found == {"HELLO?"}
    assert len(served) == 1
    assert served != before[1]
    set_autoscaling(folder, min_replicas=1, max_replicas=1)
    replace_model(folder, "!")
    deploy(server)
    assert answers(server) == before


def test_health_and_drain_ask_no_proxy(server):
    """The last test of this server: it removes the applications."""
    config = {"http_options": {"port": server.port}, "applications": [{"route_prefix": ROUTE}]}
    (server.folder / "health.yaml").write_text(yaml.safe_dump(config))
    done = run_python(server, "rayserve_entrypoint.py", "health", "health.yaml")
    assert done.returncode == 0, done.stderr
    address = f"http://127.0.0.1:{server.dashboard}"
    drain = f"import rayserve_entrypoint as e; e.DASHBOARD = {address!r}; e.drain()"
    done = run_python(server, "-c", drain)
    assert done.returncode == 0, done.stderr
    assert applications(server) == {}


def test_an_archive_is_loaded_once_for_each_address(tmp_path):
    """Ray keeps what it has downloaded from an address; the command says so."""

    def write_archive(name, end):
        scratch = tmp_path / f"of {name} {end}"
        scratch.mkdir()
        write_toy(scratch)
        write_model(scratch / "model", [("hello", f"HELLO{end}")], end)
        archive = tmp_path / name
        archive.unlink(missing_ok=True)
        with zipfile.ZipFile(archive, "w") as writer:
            for path in sorted(scratch.rglob("*")):
                writer.write(path, Path("app", path.relative_to(scratch)))
        return {"working_dir": f"file://{archive}"}

    folder = tmp_path / "empty"  # Ray imports first from the folder in which Serve was started
    folder.mkdir()
    shutil.copy(TEMPLATES / "check_serve_config.py", folder)
    write_config(folder, runtime_env=write_archive("first.zip", "1"))
    with Server(folder, "run", CONFIG, cpus=2, dashboard=True) as server:
        server.folder = folder
        server.wait()
        first = answers(server)
        assert first[0] == {"HELLO1"}
        write_archive("first.zip", "2")
        said = deploy(server)
        assert "unchanged: the same replicas still run" in said
        assert "first.zip (Ray loads an address only once)" in said
        assert answers(server) == first
        write_config(folder, runtime_env=write_archive("second.zip", "2"))
        assert "unchanged" not in deploy(server)
        found, served = answers(server)
        assert found == {"HELLO2"}
        assert served != first[1]
