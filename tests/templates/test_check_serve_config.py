"""check_serve_config.py finds what Ray lets pass, one line per problem, and deploys."""

import copy
import os
import shutil
import subprocess
import sys
import time

import pytest
import yaml
from helpers.repository import TEMPLATES
from serve_testing import Server, built, different
from tiny_translator import PAIRS, make_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checked")
    for name in ("template_ray_serve.py", "serve_config.yaml", "check_serve_config.py"):
        shutil.copy(TEMPLATES / name, folder)
    make_model(folder / "model", PAIRS)
    return folder


@pytest.fixture(scope="module")
def module(folder):
    """The check itself, imported from the copy so that it finds the app beside it."""
    sys.path.insert(0, str(folder))
    import check_serve_config

    yield check_serve_config
    sys.path.remove(str(folder))


@pytest.fixture(scope="module")
def check(module):
    return module.check


@pytest.fixture
def config():
    return yaml.safe_load((TEMPLATES / "serve_config.yaml").read_text())


def changed(config, path, value):
    """A copy of the config with one value changed, or taken out."""
    config = copy.deepcopy(config)
    *way, last = [int(key) if key.isdigit() else key for key in path.split(".")]
    place = config
    for key in way:
        place = place.setdefault(key, {}) if isinstance(place, dict) else place[key]
    if value is GONE:
        del place[last]
    else:
        place[last] = value
    return config


GONE = object()
APP, DEPLOYMENT = "applications.0", "applications.0.deployments.0"


def test_the_shipped_config_is_in_order(check, config):
    assert check(config) == []


def test_the_shipped_config_is_what_serve_build_writes_but_for_these(folder, config, tmp_path):
    deployment = f"{DEPLOYMENT}."
    router = f"{deployment}request_router_config."  # left out, as the app has it
    scaling = f"{deployment}autoscaling_config."
    assert different(config, built(folder, tmp_path / "built.yaml")) == {
        "grpc_options.port",
        "grpc_options.grpc_servicer_functions",
        "grpc_options.enable_reflection",
        "logging_config.encoding",
        "logging_config.logs_dir",
        "logging_config.additional_log_standard_attrs",
        "http_options.request_timeout_s",
        f"{APP}.name",
        f"{APP}.route_prefix",
        f"{APP}.import_path",
        f"{APP}.args.max_batch_size",
        f"{router}request_router_class",
        f"{router}initial_backoff_s",
        f"{router}max_backoff_s",
        f"{deployment}backpressure_config.retry_after_s",
        f"{deployment}max_surge_percent",
        f"{scaling}min_replicas",
        f"{scaling}max_replicas",
        f"{scaling}target_ongoing_requests",
        f"{deployment}graceful_shutdown_timeout_s",
    }
    assert config["http_options"]["host"] == "0.0.0.0"
    assert config["applications"][0]["route_prefix"] == "/translate"


@pytest.mark.parametrize(
    "path, value, told",
    [
        ("htp_options", {}, "does not know"),
        ("http_options.prot", 8001, "does not know"),
        ("http_options.host", GONE, "is missing"),
        ("http_options.host", None, "is blank"),
        ("http_options.request_timeout_s", "soon", "valid number"),
        ("logging_config.encodign", "JSON", "does not know"),
        (f"{APP}.rout_prefix", "/x", "does not know"),
        (f"{APP}.route_prefix", "translate", "has to start with /"),
        (f"{APP}.route_prefix", "/translate/", "must not end with /"),
        (f"{APP}.name", "a" * 41, "40 characters"),
        (f"{APP}.runtime_env", None, "is blank"),
        (f"{APP}.args", None, "is blank"),
        (f"{APP}.runtime_env.env_vars.DEBUG", False, "quote it"),
        (f"{APP}.runtime_env.env_vars.WORKERS", 2, "quote it"),
        (f"{APP}.runtime_env.env_vars.EMPTY", None, "quote it"),
        (f"{APP}.runtime_env.piip", ["x"], "does not know"),
        (f"{APP}.runtime_env.working_dir", ".", "remote URIs"),
        (f"{APP}.runtime_env.working_dir", "file:///app.ZIP", "Only .zip"),
        (f"{APP}.runtime_env", {"pip": ["a"], "conda": "b"}, "cannot be specified"),
        (f"{APP}.import_path", "template_ray_serve", "import path"),
        (f"{APP}.import_path", "template_ray_serv:build", "template_ray_serv"),
        (f"{APP}.import_path", "template_ray_serve:buidl", "buidl"),
        (f"{APP}.import_path", "template_ray_serve:translator_app", "Arguments can only be passed"),
        (f"{APP}.args.max_bach_size", 8, "max_bach_size"),
        (f"{APP}.args.max_batch_size", 0, "max_batch_size"),
        (f"{DEPLOYMENT}.max_ongoing_requests", 31, "never fill"),
        (f"{DEPLOYMENT}.name", "ModelServr", "ModelServer"),
        (f"{DEPLOYMENT}.user_config", {"max_batch_size": 8}, "has none"),
        (f"{DEPLOYMENT}.max_concurrent_queries", 8, "does not know"),
        (f"{DEPLOYMENT}.max_ongoing_requests", 0, "greater than 0"),
        (f"{DEPLOYMENT}.max_ongoing_requests", 16, "never fill"),
        (f"{DEPLOYMENT}.max_queued_requests", 0, "max_queued_requests"),
        (f"{DEPLOYMENT}.num_replicas", 2, "not allowed when autoscaling_config"),
        (f"{DEPLOYMENT}.autoscaling_config.min_replicas", 9, "replicas"),
        (
            f"{DEPLOYMENT}.autoscaling_config.target_num_ongoing_requests_per_replica",
            9,
            "does not know",
        ),
        (
            f"{DEPLOYMENT}.autoscaling_config.target_ongoing_requests",
            9999,
            "above max_ongoing_requests",
        ),
        (f"{DEPLOYMENT}.graceful_shutdown_timeout_s", 5, "less than request_timeout_s"),
        (f"{DEPLOYMENT}.backpressure_config.retry_after", 5, "does not know"),
        (f"{DEPLOYMENT}.ray_actor_options.num_cpu", 1, "does not know"),
        (f"{DEPLOYMENT}.ray_actor_options.runtime_env", {"env_vars": {"A": 1}}, "quote it"),
    ],
)
def test_a_fault_is_one_line_with_its_path(check, config, path, value, told):
    faults = check(changed(config, path, value))
    assert faults and all("\n" not in fault for fault in faults)
    assert any(
        told in fault and fault.startswith(".".join(path.split(".")[:2])) for fault in faults
    ), faults


def yaml_with(old, new):
    """The text of the shipped config with one change."""
    text = (TEMPLATES / "serve_config.yaml").read_text("utf-8")
    assert text.count(old) == 1
    return text.replace(old, new)


BATCH = "    max_batch_size: 32\n"
AGAIN = {"args": BATCH, "deployments": "  deployments: []\n", "applications": "applications: []\n"}


@pytest.mark.parametrize("key", AGAIN)
def test_a_key_that_appears_again_is_named(module, key):
    text = yaml_with(BATCH, BATCH * 2)
    path = f"{APP}.args.max_batch_size"
    if key != "args":
        text = yaml_with(BATCH, BATCH) + AGAIN[key]
        path = key if key == "applications" else f"{APP}.{key}"
    line = text[: text.rindex(AGAIN[key])].count("\n") + 1
    assert module.check_text(text) == [f"{path}: appears again in line {line}"]


def test_a_merged_key_may_be_replaced(module):
    text = yaml_with(BATCH, "    <<: {max_batch_size: 4, max_queue: 50}\n" + BATCH)
    assert module.check_text(text) == []


@pytest.mark.parametrize(
    "line, told",
    [
        ("max_batch_size: 020", "YAML reads 020 as 16: write 16, or quote it"),
        ("max_batch_size: yes", "YAML reads yes as true"),
        ("timeout_s: 1:30", "YAML reads 1:30 as 90"),
        ("target_language: no", "YAML reads no as false: write false, or quote it"),
    ],
)
def test_a_value_that_yaml_reads_as_another_is_named(module, line, told):
    (problem,) = module.check_text(yaml_with(BATCH, f"    {line}\n"))
    assert problem.startswith(f"{APP}.args.{line.split(':')[0]}: {told}")


@pytest.mark.parametrize(
    "old, new",
    [
        (BATCH, "    timeout_s: 5e1\n"),
        (BATCH, '    max_batch_size: "16"\n'),
        (BATCH, "    target_language: 'no'\n"),
        ("request_timeout_s: 60 ", "request_timeout_s: 6e1 "),
        ("port: 8000", 'port: "8000"'),
        ("target_ongoing_requests: 32", 'target_ongoing_requests: "32"'),
        ("max_ongoing_requests: 1100", 'max_ongoing_requests: "1100"'),
        ("graceful_shutdown_timeout_s: 60", "graceful_shutdown_timeout_s: 6e1"),
        ("num_cpus: 1 ", 'num_cpus: "1" '),
    ],
)
def test_a_number_may_be_written_as_text(module, old, new):
    assert module.check_text(yaml_with(old, new)) == []


@pytest.mark.parametrize(
    "line",
    ["zipfile.BadZipFile: File is not a zip file", "ray.exceptions.RayTaskError(ValueError): no"],
)
def test_the_last_error_of_a_traceback_is_shown(module, line):
    text = (
        f"first.Error: not this\nTraceback (most recent call last):\n  File ...\n{line}\n- more\n"
    )
    assert module.last_line(text) == line


def test_several_faults_are_several_lines(check, config):
    for path, value in (
        ("a.b", 1),
        (f"{APP}.runtime_env", None),
        (f"{DEPLOYMENT}.max_ongoing_requests", "x"),
    ):
        config = changed(config, path, value)
    assert sorted(fault.split(":")[0] for fault in check(config)) == [
        "a",
        f"{DEPLOYMENT}.max_ongoing_requests",
        f"{APP}.runtime_env",
    ]


def test_two_applications_on_one_route(check, config):
    second = {**copy.deepcopy(config["applications"][0]), "name": "second"}
    config["applications"].append(second)
    assert any("/translate" in fault and "duplicate" in fault for fault in check(config))


@pytest.mark.parametrize(
    "content, told",
    [
        ("", "valid dictionary"),
        ("- a", "valid dictionary"),
        ("a: [", "expected"),
        ("a: *b", "alias"),
        (b"\xff", "decode"),
        (None, "No such file"),
    ],
)
def test_no_config_at_all(folder, content, told):
    path = folder / "odd.yaml"
    path.unlink(missing_ok=True)
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    done = run(folder, "odd.yaml")
    assert done.returncode == 1 and told in done.stderr and "Traceback" not in done.stderr, (
        done.stderr
    )
    assert all(line.startswith("odd.yaml: ") for line in done.stderr.splitlines()), done.stderr


def run(folder, *arguments, **environment):
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "SERVE_"))
    }
    return subprocess.run(
        [sys.executable, "check_serve_config.py", *arguments],
        cwd=folder,
        timeout=400,
        text=True,
        capture_output=True,
        env={**kept, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "a" * 32, **environment},
    )


@pytest.mark.slow
def test_deploying_waits_and_a_bad_update_leaves_the_old_version_serving(folder, config):
    def deploy(path=None, value=None, *more):
        (folder / "new.yaml").write_text(
            yaml.safe_dump(changed(config, path, value) if path else config)
        )
        address = f"http://127.0.0.1:{server.dashboard}"
        return run(folder, "new.yaml", "--deploy", address, "--timeout", "300", *more)

    with Server(
        folder, "run", "serve_config.yaml", cpus=2, dashboard=True, SERVE_SLOW_STARTUP_WARNING_S="5"
    ) as server:
        server.wait()

        def serves():
            return server.ask(body={"text": "Hello world!"}) == (
                200,
                {"translation": "Bonjour le monde !"},
            )

        begin = time.monotonic()
        done = deploy()
        usual = time.monotonic() - begin  # on this machine
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("new.yaml: valid, and running: translator, release "), done
        # Refused by the check, before anything is sent.
        done = deploy(f"{APP}.args.max_bach_size", 8)
        assert done.returncode == 1 and "max_bach_size" in done.stderr and serves()
        # Refused by the replica: the model is not there; the old replica goes on.
        done = deploy(f"{APP}.args.model", "/nowhere")
        assert done.returncode == 1 and "no usable model '/nowhere'" in done.stderr, done.stderr
        assert len(done.stderr.splitlines()) == 1 and serves()
        # More CPUs than there are.
        seconds = f"{20 + usual:.0f}"
        done = deploy(f"{DEPLOYMENT}.ray_actor_options.num_cpus", 99, "--timeout", seconds)
        assert done.returncode == 1 and f"not running after {seconds} s" in done.stderr, done.stderr
        assert '"CPU": 99' in done.stderr and "available" in done.stderr, done.stderr
        assert serves()
        # Sent past the check, as `serve deploy` would: Ray refuses it, and the old replica goes on.
        bad = yaml.safe_dump(changed(config, f"{APP}.args.max_bach_size", 8))
        from_ray = subprocess.run(
            [sys.executable, "-c", SEND, str(server.dashboard), bad],
            env=server.environment,
            capture_output=True,
            text=True,
            timeout=400,
        )
        assert (
            "DEPLOY_FAILED" in from_ray.stdout and "max_bach_size: Extra inputs" in from_ray.stdout
        ), from_ray
        assert serves()
        # And it takes the next good one.
        done = deploy(f"{APP}.args.max_batch_size", 8)
        assert done.returncode == 0 and serves(), done.stderr
        # Without the token, and without a server.
        done = run(
            folder,
            "new.yaml",
            "--deploy",
            f"http://127.0.0.1:{server.dashboard}",
            RAY_AUTH_MODE="disabled",
        )
        assert (
            done.returncode == 1 and "token" in done.stderr and len(done.stderr.splitlines()) == 1
        ), done.stderr
    done = run(folder, "new.yaml", "--deploy", f"http://127.0.0.1:{server.dashboard}")
    assert (
        done.returncode == 1 and "onnect" in done.stderr and len(done.stderr.splitlines()) == 1
    ), done.stderr


SEND = """
import sys, time, yaml
from ray.dashboard.modules.serve.sdk import ServeSubmissionClient
client = ServeSubmissionClient(f"http://127.0.0.1:{sys.argv[1]}")
client.deploy_applications(yaml.safe_load(sys.argv[2]))
for _ in range(60):
    application = client.get_serve_details()["applications"]["translator"]
    if application["status"] == "DEPLOY_FAILED":
        break
    time.sleep(0.5)
print(application["status"], application["message"])
"""
