# test_serve_mechanics.py, version 0.1.0
"""Tests of the mechanics of template_ray_serve.py, whatever it serves: keep this file as it is.

    pip install pytest; python -m pytest test_serve_mechanics.py

Your work is replaced here by a toy, so these tests need none of its packages, and no network. For
your work, see test_template_ray_serve.py.
"""

import ast
import asyncio
import contextlib
import html
import json
import os
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml
from click import ClickException
from serve_testing import (
    APP,
    HERE,
    ROUTE,
    Server,
    built,
    different,
    flat,
    imported,
    parts_of,
    used_by,
    write_model,
    write_toy,
)

CONFIG = HERE / "serve_config.yaml"


# -- The toy app -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    write_toy(folder)
    return folder


@pytest.fixture(scope="module")
def app(folder):
    return imported(folder)


@pytest.fixture(scope="module")
def server(folder):
    """The toy as it is started by hand."""
    command = ["run", "template_ray_serve:translator_app", "--route-prefix", ROUTE]
    with Server(folder, *command) as running:
        yield running.wait()


LIMITS = {
    "max_batch_size": 4,
    "max_queue": 6,
    "max_body_bytes": 1000,
    "body_timeout_s": 1,
    "timeout_s": 4,
}


@pytest.fixture(scope="module")
def small_server(tmp_path_factory):
    """The toy in a module of its own, with small limits."""
    folder = tmp_path_factory.mktemp("small")
    write_toy(folder, moved=True)
    arguments = [f"{name}={value}" for name, value in LIMITS.items()]
    command = ["run", "template_ray_serve:build", *arguments, "--route-prefix", ROUTE]
    with Server(folder, *command, dashboard=True) as running:
        yield running.wait()


# -- Requests and answers --------------------------------------------------------------------------


def ask(server, text, **options):
    """Send a text, or several; return (status, answer)."""
    return server.ask(body={"text": text}, **options)


def loud(text):
    """Return the right answer to a text."""
    return 200, {"loud": f"{text.upper()}!"}


def test_both_forms_of_the_url(server):
    for path in (ROUTE, ROUTE + "/"):
        assert server.ask(path, {"text": "hello"}) == loud("hello")


def test_a_list_keeps_its_order(server):
    assert ask(server, ["b", "a", "c"]) == (200, {"loud": ["B!", "A!", "C!"]})
    assert ask(server, []) == (200, {"loud": []})


def test_a_field_that_is_not_its_default_is_answered(server):
    text = "a text of more than 20 characters"
    assert ask(server, text) == (200, {"loud": text.upper() + "!", "long_texts": 1})


def test_many_at_once_get_their_own_answers(server):
    texts = [f"text {number}" for number in range(100)]
    with ThreadPoolExecutor(24) as pool:
        answers = list(pool.map(lambda text: ask(server, text), texts))
    assert answers == [loud(text) for text in texts]


JSON = "application/json"
MALFORMED = [
    b"",
    b"{",
    b"[]",
    b'{"txet": "secret-42"}',
    b'{"text": {"a": "secret-42"}}',
    b'{"text": {"secret-42": "a"}}',
    b'{"text": NaN}',
    b'{"text": "\\ud83d"}',
    b"[" * 10_000 + b"]" * 10_000,
    b"\xff\xfe",
    b'{"text": "a", "secret-42": 1}',
]
BAD_REQUESTS = [(422, JSON, body) for body in MALFORMED]
BAD_REQUESTS += [
    (415, "text/plain", b'{"text": "secret-42"}'),
    (413, JSON, b'{"text": "' + b"secret-42 " * 100_000 + b'"}'),
    (413, JSON, b'{"text": ["secret-42"' + b', "a"' * 100 + b"]}"),
]


@pytest.mark.parametrize("status, kind, body", BAD_REQUESTS)
def test_a_bad_request_gets_a_short_answer_that_repeats_nothing(server, status, kind, body):
    got, answer = server.ask(body=body, kind=kind)
    assert got == status
    assert set(answer) == {"error"}
    error = answer["error"]
    assert set(error) == {"code", "message"}
    assert error["code"] == status
    assert "secret-42" not in json.dumps(answer)
    assert len(answer["error"]["message"]) < 300
    assert ask(server, "hello") == loud("hello")


def test_a_wrong_body_is_told_the_problem_and_the_example(server):
    status, answer = server.ask(body={"txet": "hello"})
    message = answer["error"]["message"]
    assert message.endswith('Send JSON like {"text": "<hello>"}.')
    assert "text: Field required" in message


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_any_encoding_of_json_is_read(server, encoding):
    body = '{"text": "hé"}'.encode(encoding)
    assert server.ask(body=body) == loud("hé")


def test_a_body_that_is_compressed_or_lost_is_told_so(server):
    status, answer = server.ask(body=b"abc", **{"Content-Encoding": "gzip"})
    assert (status, "Content-Encoding" in answer["error"]["message"]) == (415, True)
    upgrade = {"Connection": "Upgrade, HTTP2-Settings", "Upgrade": "h2c"}
    for _ in range(20):  # uvicorn itself refuses a body that arrives in a second packet
        status, answer = server.ask(body={"text": "hello"}, **upgrade)
        if isinstance(answer, dict):
            break
    assert isinstance(answer, dict), (status, answer)
    assert (status, "Upgrade" in answer["error"]["message"]) == (400, True)


def test_what_the_model_refuses_gets_its_status_and_reason(server):
    status, answer = ask(server, "refuse")
    assert status == 422
    assert answer == {"error": {"code": 422, "message": "A text that is refused."}}
    status, answer = ask(server, ["a"] * 101)
    assert (status, answer["error"]["message"]) == (413, "More than 100 texts.")


@pytest.mark.parametrize("text", ["fail to plan", "fail to run", "fail to answer"])
def test_a_failure_of_the_model_names_only_its_kind(server, text):
    status, answer = ask(server, text)
    message = "The model failed on this request: ValueError."
    assert (status, answer) == (500, {"error": {"code": 500, "message": message}})
    assert ask(server, "hello") == loud("hello")


def test_unknown_paths_and_methods(server):
    for path, method, status in (
        (ROUTE + "/nowhere", "GET", 404),
        (ROUTE, "PUT", 405),
    ):
        got, answer = server.ask(path, {}, method=method)
        assert (got, answer["error"]["code"]) == (status, status)


def test_the_page_holds_the_example_and_needs_no_other_host(server):
    for path in (ROUTE, ROUTE + "/"):
        status, page = server.ask(path, method="GET")
        assert status == 200
        assert html.escape("<hello>") in page
        assert "<hello>" not in page
        assert "src=" not in page and "href=" not in page and "://" not in page


def test_the_description_holds_the_example(server):
    status, described = server.ask(ROUTE + "/openapi.json", method="GET")
    content = described["paths"]["/"]["post"]["requestBody"]["content"]["application/json"]
    assert content["example"] == {"text": "<hello>"}
    assert "text" in content["schema"]["properties"]


def test_no_line_of_a_log_holds_a_text(server):
    for begin in ("", "fail to plan", "fail to run", "fail to answer"):
        ask(server, begin + " canary-7f3a")
    server.ask(body={"canary-7f3a": "canary-7f3a"})
    time.sleep(1)
    written = [path for path in Path(server.scratch).rglob("*") if "logs" in path.parts]
    logs = [server.log, *filter(Path.is_file, written)]
    assert len(logs) > 5
    assert not [path for path in logs if b"canary-7f3a" in path.read_bytes()]
    assert "ValueError at template_ray_serve.py:" in server.log.read_text()  # but where it failed


# -- Limits ----------------------------------------------------------------------------------------


def busy(server, seconds):
    """Ask for an answer that takes this long; on return, the model works on it."""
    waiting = server.log.with_name("waiting")
    waiting.unlink(missing_ok=True)
    pool = ThreadPoolExecutor(1)
    job = pool.submit(ask, server, f"wait {seconds}")
    pool.shutdown(wait=False)
    end = time.monotonic() + 400
    while not waiting.exists():
        assert time.monotonic() < end
        time.sleep(0.05)
    return job


def test_a_moved_section_serves_too(small_server):
    assert ask(small_server, "hello") == loud("hello")


def test_a_body_over_its_limit(small_server):
    status, answer = ask(small_server, "a" * 1000)
    assert (status, answer["error"]["message"]) == (413, "The body is larger than 1000 bytes.")


def test_a_body_that_does_not_end(small_server):
    headers = {"Content-Length": "100"}
    status, answer = small_server.ask(body=b'{"text": ', **headers)
    assert (status, answer["error"]["message"]) == (408, "No whole body within 1 s.")


def test_a_full_queue_refuses_at_once_and_takes_what_it_has_room_for(small_server):
    job = busy(small_server, 3)
    gate = threading.Barrier(20)

    def ask_with_the_others(_):
        gate.wait()
        status, _ = ask(small_server, "hello")
        return status, job.done()

    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(ask_with_the_others, range(20)))
    refused_late = [late for status, late in answers if status == 503]
    statuses = [status for status, _ in answers]
    assert statuses.count(200) == LIMITS["max_queue"]
    assert len(refused_late) == 20 - LIMITS["max_queue"]
    assert not any(refused_late)  # the model was still busy
    status, _ = job.result()
    assert status == 200


def test_a_list_that_never_fits_is_told_the_limit(small_server):
    status, answer = ask(small_server, ["hello"] * 7)
    message = "The request has 7 inputs; the limit is 6."
    assert (status, answer["error"]["message"]) == (413, message)


def test_a_timeout(small_server):
    begin = time.monotonic()
    status, answer = ask(small_server, "wait 9")
    seconds = time.monotonic() - begin
    assert status == 504
    assert "4 seconds" in answer["error"]["message"]
    assert 3 < seconds < 9
    assert loud("hello") == ask_until_answered(small_server, "hello")


def ask_until_answered(server, text):
    """Ask again while the model is busy with what nobody waits for any more."""
    answer = 504, None
    while answer[0] == 504:
        answer = ask(server, text)
    return answer


def test_health_and_page_while_the_model_is_busy(small_server):
    job = busy(small_server, 3)
    status, health = small_server.ask(ROUTE + "/health", method="GET")
    assert (status, set(health)) == (200, {"status", "release", "code", "model"})
    status, _ = small_server.ask(ROUTE, method="GET")
    assert status == 200
    assert not job.done()
    status, _ = job.result()
    assert status == 200


def test_a_name_of_several_words_makes_valid_metrics(tmp_path):
    write_toy(tmp_path)
    app = tmp_path / APP
    text = re.sub('^NAME = ".*"', 'NAME = "my classifier-2"', app.read_text("utf-8"), flags=re.M)
    app.write_text(text, "utf-8")
    assert imported(tmp_path).METRICS == "my_classifier_2"


def test_metrics_begin_with_the_name(app, small_server):
    ask(small_server, "hello")
    parts = ("batch_size", "batches", "inputs", "input_size", "long_texts")
    names = {f"ray_{app.METRICS}_{part}" for part in parts}
    end = time.monotonic() + 400
    missing = names
    while missing and time.monotonic() < end:
        time.sleep(1)
        text = small_server.metrics()
        missing = {name for name in names if f"\n{name}" not in text}
    assert not missing


# -- Settings, and what is checked at the start ----------------------------------------------------


@pytest.mark.parametrize(
    "wrong, name",
    [
        ({"max_batch_size": 0}, "max_batch_size"),
        ({"max_batch_size": "eight"}, "max_batch_size"),
        ({"max_bach_size": 8}, "max_bach_size"),
        ({"timeout_s": -1}, "timeout_s"),
    ],
)
def test_a_wrong_setting_is_named_in_one_line(app, wrong, name):
    with pytest.raises(ClickException) as error:
        app.Settings(**wrong)
    message = error.value.message
    assert message.startswith(f"{name}: ")
    assert "\n" not in message


def load(app, folder):
    """Load the model of a folder; return None, or the one line that says why there is none."""
    try:
        app.load_model(app.Settings(model=str(folder)), threads=1)
    except RuntimeError as error:
        assert "\n" not in str(error)
        return str(error)


def test_known_answers_are_checked(app, tmp_path):
    answers = [("hello", "HELLO!"), ("all", "ALL!")]
    write_model(tmp_path / "right", answers)
    assert load(app, tmp_path / "right") is None
    write_model(tmp_path / "wrong", answers, end="?")
    told = '(the model answers {"text":"hello"} with {"loud":"HELLO?"}, not {"loud":"HELLO!"})'
    assert told in load(app, tmp_path / "wrong")
    write_model(tmp_path / "last", [*answers, ("last", "LOST!")])
    assert 'not {"loud":"LOST!"}' in load(app, tmp_path / "last")


@pytest.mark.parametrize(
    "content, told",
    [
        ('{"hello": "HELLO!"}', "older release"),
        ("[", "Expecting value"),
        ('[{"request": {"txet": "a"}, "answer": {"loud": "A!"}}]', "ModelRequest"),
        ('[{"request": {"text": "a"}, "answer": {"quiet": "A!"}}]', "ModelResponse"),
    ],
)
def test_known_answers_of_another_form(app, tmp_path, content, told):
    write_model(tmp_path / "model")
    (tmp_path / "model/known_answers.json").write_text(content)
    assert told in load(app, tmp_path / "model")


def test_a_model_that_cannot_be_loaded_is_one_line_with_both_remedies(app, tmp_path):
    line = load(app, tmp_path / "nowhere")
    assert "end.txt" in line
    assert "export_model.py" in line
    assert "model=PATH" in line


def test_files_that_have_changed_since_the_deploy_are_refused(app, tmp_path, monkeypatch):
    write_model(tmp_path / "model")
    settings = app.Settings(model=str(tmp_path / "model"))
    deployed = app.identify(settings)
    assert app.check_deployed(settings, deployed) == deployed
    (tmp_path / "model/end.txt").write_text("?")
    with pytest.raises(RuntimeError, match="the model here is .*deploy again"):
        app.check_deployed(settings, deployed)
    monkeypatch.setenv("DEPLOYED_FILES", json.dumps(app.identify(settings)))
    app.check_deployed(settings, deployed)


def test_a_model_that_appears_later_is_refused_unless_its_name_was_deployed(
    app, tmp_path, monkeypatch
):
    monkeypatch.setattr(app, "MODEL_FOLDER", tmp_path / "model")
    named = app.Settings(model=str(tmp_path / "model"))
    before = app.identify(named)
    none = app.identify(app.Settings())
    write_model(tmp_path / "model")
    app.check_deployed(named, before)
    with pytest.raises(RuntimeError, match="but '' was deployed"):
        app.check_deployed(app.Settings(), none)


def test_without_known_answers_the_example_is_tried(app, tmp_path, monkeypatch):
    write_model(tmp_path / "model")
    assert load(app, tmp_path / "model") is None
    monkeypatch.setattr(app, "EXAMPLE", {"text": "fail to run"})
    assert "(fail to run)" in load(app, tmp_path / "model")


def test_the_example_is_the_first_known_answer(tmp_path):
    write_toy(tmp_path)
    write_model(tmp_path / "model", [("known", "KNOWN!"), ("other", "OTHER!")])
    app = imported(tmp_path)
    assert app.EXAMPLE == app.BODY["example"] == {"text": "known"}
    app.load_model(app.Settings(), threads=1)  # the folder `model/` beside the app
    (tmp_path / "model/known_answers.json").write_text("[")
    assert imported(tmp_path).EXAMPLE == {"text": "<hello>"}


def test_your_work_can_be_moved_to_a_module(tmp_path):
    yours = (HERE / APP).read_text("utf-8")
    head, imports, settings, work, mechanics = parts_of(yours)
    module = head + imports + work
    (tmp_path / "my_work.py").write_text(module, "utf-8")
    import_line = "from my_work import *\n"
    app = head + used_by(settings, imports) + settings + import_line + mechanics
    (tmp_path / APP).write_text(app, "utf-8")
    code = "import template_ray_serve as app; print(app.Model.__module__, app.BODY)"
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(HERE)},  # modules of yours stand there
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.stdout.startswith("my_work {'schema'"), done.stderr


def test_your_names_are_not_those_of_the_mechanics():
    _, _, settings, work, mechanics = parts_of((HERE / APP).read_text("utf-8"))
    yours = defined_in(work) - {"EXAMPLE"}
    assert not yours & defined_in(settings + mechanics)


def defined_in(code):
    """Return the names that code defines at its top level."""
    names = set()
    for statement in ast.parse(code).body:
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(statement.name)
        if isinstance(statement, ast.Assign):
            names.update(target.id for target in statement.targets if hasattr(target, "id"))
    return names


# -- Batches ---------------------------------------------------------------------------------------


class Spy:
    """Answers each input, a list of numbers, with its sum; a 13 breaks the whole batch."""

    def __init__(self, missing=0):
        self.batches = []
        self.missing = missing

    def size(self, numbers):
        return len(numbers)

    def __call__(self, batch):
        self.batches.append(batch)
        time.sleep(0.05)
        if any(13 in numbers for numbers in batch):
            raise ValueError("a 13")
        sums = [sum(numbers) for numbers in batch]
        return sums[self.missing :]


def outputs_of(app, spy, inputs, cancelled=()):
    """Return what a Batcher makes of inputs that come while the model is busy with [0].

    Each is a request of its own.
    """

    async def submit_all():
        batcher = app.Batcher(spy, max_batch_size=4, thread=ThreadPoolExecutor(1))
        (first,) = batcher.submit([[0]])
        await asyncio.sleep(0.01)
        outputs = [batcher.submit([numbers])[0] for numbers in inputs]
        for number in cancelled:
            outputs[number].cancel()
        await first
        return await asyncio.gather(*outputs, return_exceptions=True)

    return asyncio.run(asyncio.wait_for(submit_all(), timeout=30))


def test_a_batch_holds_what_came_meanwhile_and_like_sizes(app):
    spy = Spy()
    sizes = [1, 50, 2, 51, 1, 52, 2, 53]
    inputs = [[1] * size for size in sizes]
    assert outputs_of(app, spy, inputs) == sizes
    batches = [sorted(map(len, batch)) for batch in spy.batches]
    assert batches[0] == [1]
    assert batches[1] == [1, 1, 2, 2]
    assert batches[2] == [50, 51, 52, 53]
    assert len(batches) == 3


def test_an_input_that_fails_harms_no_other(app):
    *good, bad = outputs_of(app, Spy(), [[1], [2], [3], [13]])
    assert good == [1, 2, 3]
    assert isinstance(bad, ValueError)


def test_a_wrong_number_of_outputs_answers_nobody_with_the_output_of_another(app):
    for output in outputs_of(app, Spy(missing=1), [[1], [2]]):
        assert isinstance(output, ValueError)
        assert str(output) == "0 outputs for 1 inputs"


def test_a_cancelled_input_never_reaches_the_model(app):
    spy = Spy()
    outputs = outputs_of(app, spy, [[1], [2]], cancelled=[0])
    assert isinstance(outputs[0], asyncio.CancelledError)
    assert outputs[1] == 2
    assert spy.batches == [[[0]], [[2]]]


class Gate:
    """A model whose every batch waits until it is let through; outputs are the batch's number."""

    def __init__(self):
        self.batches = []
        self.open = threading.Semaphore(0)

    def size(self, item):
        return len(item)

    def __call__(self, batch):
        self.batches.append(batch)
        assert self.open.acquire(timeout=60)
        return [len(self.batches)] * len(batch)


@contextlib.asynccontextmanager
async def gated(app, max_batch_size):
    """Give a Batcher that works on one batch already, and a function that ends one batch."""
    gate = Gate()
    batcher = app.Batcher(gate, max_batch_size, ThreadPoolExecutor(1))
    batcher.submit(["first"])

    async def begun(number):
        while len(gate.batches) < number:
            await asyncio.sleep(0.001)

    async def step():
        number = len(gate.batches)
        gate.open.release()
        await begun(number + 1)

    await begun(1)
    yield batcher, gate, step
    for output in list(batcher.waiting):
        output.cancel()
    gate.open.release()
    await batcher.worker


def run_async(function):
    asyncio.run(asyncio.wait_for(function(), timeout=60))


@pytest.mark.parametrize("lists", [1, 4, 16, 64])
@pytest.mark.parametrize("max_batch_size", [1, 8, 32])
def test_a_text_waits_for_two_batches_at_any_number_of_lists(app, lists, max_batch_size):
    async def ask():
        async with gated(app, max_batch_size) as (batcher, gate, step):
            for _ in range(lists):
                batcher.submit(["list"] * 900)
            await step()
            for _ in range(5):
                now = len(gate.batches)
                (text,) = batcher.submit(["text"])
                for _ in range(3):
                    await step()
                assert text.result() - now <= 2

    run_async(ask)


def test_no_list_waits_forever_for_texts(app):
    async def ask():
        async with gated(app, 8) as (batcher, gate, step):
            outputs = batcher.submit(["list"] * 20)
            for _ in range(12):
                for _ in range(8):
                    batcher.submit(["text"])
                await step()
            assert all(output.done() for output in outputs)

    run_async(ask)


def test_what_goes_before_a_request_are_requests_that_are_not_larger(app):
    async def ask():
        async with gated(app, 8) as (batcher, *_):
            for number in (1, 1, 3, 900):
                batcher.submit(["text"] * number)
            ahead = {number: batcher.ahead_of(["text"] * number) for number in (1, 2, 8, 900)}
            assert ahead == {1: 2, 2: 5, 8: 5, 900: 905}

    run_async(ask)


# -- serve_config.yaml -----------------------------------------------------------------------------


@pytest.fixture
def config():
    if not CONFIG.exists():
        pytest.skip("serve_config.yaml is not beside this file")
    return yaml.safe_load(CONFIG.read_text("utf-8"))


# What is changed on purpose, and what you are free to set; a name with a dot stands for all in it.
CHANGED = (
    "proxy_location",
    "http_options.",
    "grpc_options.",
    "logging_config.",
    "applications.0.name",
    "applications.0.route_prefix",
    "applications.0.import_path",
    "applications.0.args.",
    "applications.0.runtime_env.",
)
CHANGED_OF_DEPLOYMENT = (
    "max_",
    "request_router_config.",
    "backpressure_config.",
    "autoscaling_config.",
    "num_replicas",
    "graceful_shutdown_",
    "health_check_",
    "ray_actor_options.",
)


def test_the_config_is_what_serve_build_writes_but_for_its_changes(config, folder, tmp_path):
    prefix = "applications.0.deployments.0."
    deployment = tuple(prefix + name for name in CHANGED_OF_DEPLOYMENT)
    paths = different(config, built(folder, tmp_path / "built.yaml"))
    assert paths
    assert not [path for path in paths if not path.startswith(CHANGED + deployment)]


def test_the_config_names_the_deployment_that_the_app_has(config, app):
    names = [deployment["name"] for deployment in config["applications"][0]["deployments"]]
    assert names == [app.ModelServer.name], "serve_config.yaml and the app name other deployments"


def test_the_config_has_nothing_blank_and_its_limits_fit_together(config, folder):
    from ray.serve.schema import ServeDeploySchema

    ServeDeploySchema.model_validate(config)
    assert None not in flat(config).values()
    (application,) = config["applications"]
    (deployment,) = application["deployments"]
    assert len(application["name"]) <= 40
    app = imported(folder)
    settings = app.Settings.model_validate(application["args"], strict=True)
    assert deployment["max_ongoing_requests"] >= settings.max_queue + 2 * settings.max_batch_size
    longest = settings.timeout_s + settings.body_timeout_s
    assert config["http_options"]["request_timeout_s"] >= longest
    assert deployment["graceful_shutdown_timeout_s"] >= config["http_options"]["request_timeout_s"]
