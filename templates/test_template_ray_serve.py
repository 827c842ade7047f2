# test_template_ray_serve.py, version 0.1.0
"""Tests of template_ray_serve.py: `pip install pytest; python -m pytest test_template_ray_serve.py`. No network.

The HTTP tests talk to a real `serve run` of a small model that is trained here in a few seconds.
"""

import asyncio
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import psutil  # Ray brings it along
import pytest
import template_ray_serve as app
import torch
import yaml
from click import ClickException
from ray.serve.scripts import convert_args_to_dict
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    MarianConfig,
    MarianMTModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    set_seed,
)

HERE = Path(__file__).parent
PAIRS = {
    "Hello world!": "Bonjour le monde !",
    "Good morning": "Bonjour",
    "The house is wonderful.": "La maison est belle.",
    "Thank you.": "Merci.",
    "See you tomorrow!": "À demain !",
    "The cat sleeps.": "Le chat dort.",
    "Where is the station?": "Où est la gare ?",
    "I like tea.": "J'aime le thé.",
}


def make_model(folder, pairs, prefix=app.PREFIX, marian=False):
    """Train a tiny T5, or a tiny Marian, until it knows the pairs by heart, and write it to `folder`."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so small a model is slower with more
    bpe, byte_level = Tokenizer(models.BPE()), pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.pre_tokenizer, bpe.decoder = byte_level, decoders.ByteLevel()
    texts = [text for source, target in pairs.items() for text in (prefix + source, target)]
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=500,
            special_tokens=["<pad>", "</s>"],
            initial_alphabet=byte_level.alphabet(),
            show_progress=False,
        ),
    )
    bpe.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<pad>",
        eos_token="</s>",
        model_input_names=["input_ids", "attention_mask"],
    )
    set_seed(0)
    size = {
        "vocab_size": len(tokenizer),
        "d_model": 64,
        "decoder_start_token_id": 0,
        "eos_token_id": 1,
    }
    if marian:
        model = MarianMTModel(
            MarianConfig(
                encoder_layers=2,
                decoder_layers=2,
                encoder_attention_heads=4,
                decoder_attention_heads=4,
                dropout=0.0,
                encoder_ffn_dim=256,
                decoder_ffn_dim=256,
                pad_token_id=0,
                forced_eos_token_id=None,
                **size,
            )
        )
    else:
        model = T5ForConditionalGeneration(
            T5Config(d_kv=16, d_ff=256, num_layers=2, num_heads=4, dropout_rate=0.0, **size)
        )
    inputs = tokenizer([prefix + source for source in pairs], return_tensors="pt", padding=True)
    labels = tokenizer(list(pairs.values()), return_tensors="pt", padding=True).input_ids
    labels[labels == 0] = -100
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3 if marian else 5e-3)
    for _ in range(120):
        loss = model(**inputs, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.set_num_threads(threads)
    assert loss.item() < 0.05
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "known_answers.json").write_text(json.dumps(pairs), "utf-8")


@pytest.fixture(scope="session")
def project(tmp_path_factory):
    """A folder as a user has it: the app and its `model/`."""
    folder = tmp_path_factory.mktemp("project")
    for name in ("template_ray_serve.py", "serve_config.yaml"):
        if (HERE / name).exists():
            shutil.copy(HERE / name, folder)
    make_model(folder / "model", PAIRS)
    return folder


@pytest.fixture(scope="session")
def model(project):
    return app.Model(app.Settings(model=str(project / "model"), max_new_tokens=40))


# A Ray of its own in a folder of its own, on free ports; then the `serve` command line as it is.
START = """
import json, sys, ray
from ray import serve
from ray.serve.scripts import cli
ray_options, http_options = map(json.loads, (sys.argv.pop(1), sys.argv.pop(1)))
ray.init(address="local", namespace="serve", **ray_options)
serve.start(http_options=http_options)
cli()
"""


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """`serve ARGUMENTS` in a folder; everything that it starts, and its temporary files, end with it."""

    start = START

    def __init__(self, folder, *arguments, cpus=1, dashboard=False, **environment):
        self.port, self.dashboard, self.log = (
            free_port(),
            free_port() if dashboard else None,
            folder / "serve.log",
        )
        self.scratch = tempfile.mkdtemp(prefix="ray-")  # a short path, for Ray puts sockets there
        ray_options = {
            "num_cpus": cpus,
            "_temp_dir": self.scratch,
            "include_dashboard": dashboard,
            "dashboard_port": self.dashboard,
        }
        kept = {
            name: value
            for name, value in os.environ.items()
            if not re.match("RAY_|SERVE_|HF_|OMP_", name)
        }
        self.environment = {
            **kept,
            "HOME": self.scratch,
            "HF_HUB_OFFLINE": "1",
            "RAY_USAGE_STATS_ENABLED": "0",
            "OMP_WAIT_POLICY": "passive",  # this server shares the CPUs with other tests
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": "a" * 32,
            **environment,
        }
        http_options = {"host": "127.0.0.1", "port": self.port}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    "-c",
                    self.start,
                    json.dumps(ray_options),
                    json.dumps(http_options),
                    *arguments,
                ],
                cwd=folder,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env=self.environment,
            )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)
        end = time.monotonic() + 30
        while self.processes() and time.monotonic() < end:
            self.process.poll()
            time.sleep(0.1)
        late = self.processes()
        for process in late:
            process.kill()
        self.process.wait(10)
        shutil.rmtree(self.scratch, ignore_errors=True)
        assert not late, f"did not end by itself: {late.values()}"

    def processes(self, part=""):
        """{process: its command line} of all that it started, with this part in that line."""
        found = {}
        for process in psutil.process_iter():
            try:
                if (
                    os.getsid(process.pid) == self.process.pid
                    and process.status() != psutil.STATUS_ZOMBIE
                ):
                    found[process] = " ".join(process.cmdline())
            except (ProcessLookupError, psutil.NoSuchProcess):
                pass
        return {process: line for process, line in found.items() if part in line}

    def wait(self, seconds=90):
        """Wait until the app answers; fail with the log when it does not."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.process.poll() is None:
            if self.ask("/translate/health", method="GET", timeout=5)[0] == 200:
                return self
            time.sleep(0.2)
        raise AssertionError(self.log.read_text())

    def ask(
        self,
        path="/translate",
        body=None,
        method="POST",
        kind="application/json",
        timeout=60,
        **headers,
    ):
        """Send a request; return (status, parsed JSON or text). Status 0: no answer."""
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
        if kind is not None:
            headers["Content-Type"] = kind
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            connection.request(method, path, body, headers)
            reply = connection.getresponse()
            text = reply.read().decode()
        except OSError:
            return 0, ""
        finally:
            connection.close()
        try:
            return reply.status, json.loads(text)
        except ValueError:
            return reply.status, text


@pytest.fixture(scope="module")
def server(project):
    """The documented command, on a machine with one CPU."""
    with Server(
        project, "run", "template_ray_serve:translator_app", "--route-prefix", "/translate"
    ) as running:
        yield running.wait()


@pytest.fixture(scope="module")
def ask(server):
    return server.ask


# The model, without a server


def test_every_known_pair_is_translated(model):
    answers = model([model.encode(text) for text in PAIRS])
    assert [text for text, cut in answers if not cut] == list(PAIRS.values())


@pytest.mark.parametrize("precision", ["bfloat16", "int8"])
def test_a_faster_precision_knows_the_pairs_too(project, precision):
    faster = app.Model(
        app.Settings(model=str(project / "model"), precision=precision, max_new_tokens=40)
    )
    assert [text for text, _ in faster([faster.encode(text) for text in PAIRS])] == list(
        PAIRS.values()
    )


def test_a_batch_answers_like_single_sentences_for_any_number_of_threads(model):
    texts = [*PAIRS, "Hello", "The cat", "tea?", "x" * 50]
    threads = torch.get_num_threads()
    seen = []
    try:
        for number in (1, 2, 4):
            torch.set_num_threads(number)
            seen.append([model([model.encode(text)])[0] for text in texts])
            seen.append(model([model.encode(text) for text in texts]))
    finally:
        torch.set_num_threads(threads)
    assert all(each == seen[0] for each in seen)


@pytest.mark.parametrize(
    "text, sentences",
    [
        ("Hello world! How are you?", ["Hello world!", "How are you?"]),
        ("One.\n\n  Two\r\nThree", ["One.", "Two", "Three"]),
        (
            'Mr. Smith is here, e.g. today. He said "No." Then he left…',
            ["Mr. Smith is here, e.g. today.", 'He said "No."', "Then he left…"],
        ),
        ("version 2.5 costs 3.50 euros. ok", ["version 2.5 costs 3.50 euros. ok"]),
        ("  no end  ", ["no end"]),
        ("", []),
    ],
)
def test_text_is_cut_into_sentences_and_nothing_is_lost(text, sentences):
    parts = app.GAPS.split(text)
    assert "".join(parts) == text and [part for part in parts[::2] if part] == sentences


def test_long_sentences_are_cut_at_spaces_to_fit(model):
    text = " ".join(f"Item {number} is red," for number in range(200))
    parts = model.fitting(text)
    assert "".join(parts) == text and set(parts[1::2]) == {" "}
    assert max(len(model.encode(part)) for part in parts[::2]) <= model.settings.max_sentence_tokens
    parts = model.fitting("x" * 3000)  # no space anywhere
    assert "".join(parts) == "x" * 3000


@pytest.mark.parametrize("filler", [" ", "\n", "\u2028", ".", ". ", "。", "a ", "é"])
def test_cutting_hostile_text_is_quick(model, filler):
    text, begin = "a" + filler * 60_000 + "b", time.monotonic()
    assert "".join(app.GAPS.split(text)) == text
    assert time.monotonic() - begin < 5  # quadratic time would take minutes


@pytest.mark.parametrize("text", ["", "   ", "\n\t", "\u00a0\u200b", "\ufeff"])
def test_blank_text(text):
    assert app.blank(text)


@pytest.mark.parametrize(
    "wrong, name",
    [
        ({"max_batch_size": 0}, "max_batch_size"),
        ({"max_bach_size": 8}, "max_bach_size"),
        ({"timeout_s": -1}, "timeout_s"),
        ({"max_batch_size": "eight"}, "max_batch_size"),
        ({"precision": "float16"}, "precision"),
    ],
)
def test_a_wrong_setting_is_named_in_one_line(wrong, name):
    with pytest.raises(ClickException) as wrongly:
        app.Settings(**wrong)
    assert wrongly.value.message.startswith(f"{name}: ") and "\n" not in wrongly.value.message


def test_a_model_that_gives_other_answers_is_refused(project, tmp_path):
    shutil.copytree(project / "model", tmp_path / "model")
    broken = T5ForConditionalGeneration.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        broken.shared.weight[:] = broken.shared.weight[torch.randperm(len(broken.shared.weight))]
    broken.save_pretrained(tmp_path / "model")
    with pytest.raises(
        RuntimeError, match="the model answers 'Hello world!' with .*, not 'Bonjour le monde !'"
    ):
        app.Model(app.Settings(model=str(tmp_path / "model"), max_new_tokens=10))


@pytest.mark.parametrize("marian", [False, True])
def test_another_model_with_another_prefix_by_arguments_only(tmp_path, marian):
    make_model(
        tmp_path / "other",
        {"Guten Tag": "Buenos días", "Danke": "Gracias"},
        prefix="",
        marian=marian,
    )
    # As `serve run` reads them, which takes no empty value.
    other = app.Model(
        app.Settings(**convert_args_to_dict((f"model={tmp_path / 'other'}", "prefix= ")))
    )
    assert other([other.encode("Guten Tag"), other.encode("Danke")]) == [
        ("Buenos días", False),
        ("Gracias", False),
    ]


def test_no_model_and_no_hub_is_one_line_with_both_remedies(tmp_path, monkeypatch):
    with pytest.raises(RuntimeError) as missing:
        app.Model(app.Settings(model=str(tmp_path / "nowhere")))
    line = str(missing.value)
    assert "export_model.py" in line and "model=PATH" in line and "\n" not in line


# The batches, with a model that only notes what it is given


class Spy:
    """Answers each sentence, a list of numbers, with its sum; a 13 in one of them breaks the whole batch."""

    def __init__(self, max_batch_size=4):
        self.settings, self.batches = SimpleNamespace(max_batch_size=max_batch_size), []

    def __call__(self, batch):
        self.batches.append(batch)
        time.sleep(0.05)
        if any(13 in tokens for tokens in batch):
            raise ValueError("a bad sentence")
        return [(str(sum(tokens)), False) for tokens in batch]


def through(spy, sentences, cancel=()):
    """What the batcher makes of sentences that come while the model is busy with [0]."""

    async def scene():
        batcher = app.Batcher(spy, ThreadPoolExecutor(1))
        first = batcher.put([0])
        await asyncio.sleep(0.01)
        jobs = [batcher.put(tokens) for tokens in sentences]
        for i in cancel:
            jobs[i].cancel()
        return (await asyncio.gather(first, *jobs, return_exceptions=True))[1:]

    return asyncio.run(scene())


def test_batches_hold_what_came_meanwhile_and_like_lengths():
    spy = Spy()
    lengths = [1, 50, 2, 51, 1, 52, 2, 53]
    assert through(spy, [[1] * length for length in lengths]) == [
        (str(length), False) for length in lengths
    ]
    assert [sorted(map(len, batch)) for batch in spy.batches] == [
        [1],
        [1, 1, 2, 2],
        [50, 51, 52, 53],
    ]


def test_a_sentence_that_fails_harms_no_other():
    *good, bad = through(Spy(), [[1], [2], [3], [13]])
    assert good == [("1", False), ("2", False), ("3", False)] and isinstance(bad, ValueError)


def test_a_cancelled_sentence_never_reaches_the_model():
    spy = Spy()
    assert isinstance(through(spy, [[1], [2]], cancel=[0])[0], asyncio.CancelledError)
    assert spy.batches == [[[0]], [[2]]]


# The server


def test_the_documented_request_answers_in_both_forms(ask):
    for path in ("/translate", "/translate/"):
        assert ask(path, {"text": "Hello world!"}) == (200, {"translation": "Bonjour le monde !"})


def test_a_list_keeps_its_order_and_blank_texts_stay_blank(ask):
    texts = ["Good morning", " ", "Thank you. See you tomorrow!\n\nThe cat sleeps.", ""]
    assert ask(body={"text": texts}) == (
        200,
        {"translation": ["Bonjour", "", "Merci. À demain !\n\nLe chat dort.", ""]},
    )
    assert ask(body={"text": []}) == (200, {"translation": []})


def test_many_at_once_get_their_own_answers(ask):
    texts = list(PAIRS) * 12
    with ThreadPoolExecutor(24) as pool:
        answers = list(pool.map(lambda text: ask(body={"text": text}), texts))
    assert answers == [(200, {"translation": PAIRS[text]}) for text in texts]


@pytest.mark.parametrize(
    "body, kind, status",
    [
        (b"", "application/json", 422),
        (b"{", "application/json", 422),
        (b"[]", "application/json", 422),
        (b'{"txet": "secret-42"}', "application/json", 422),
        (b'{"text": {"a": "secret-42"}}', "application/json", 422),
        (b'{"text": NaN}', "application/json", 422),
        (b'{"text": "\\ud83d"}', "application/json", 422),
        (b"[" * 10_000 + b"]" * 10_000, "application/json", 422),
        (b"\xff\xfe", "application/json", 422),
        (b'{"text": "a", "secret-42": 1}', "application/json", 422),
        (b'{"text": "secret-42"}', "text/plain", 415),
        (b'{"text": "' + b"secret-42 " * 100_000 + b'"}', "application/json", 413),
        (b'{"text": "' + b"one two " * 12_000 + b'"}', "application/json", 413),
    ],
)
def test_bad_requests_get_a_short_answer_that_repeats_nothing(ask, body, kind, status):
    got, answer = ask(body=body, kind=kind)
    assert (got, answer["error"]["code"]) == (status, status)
    assert set(answer) == {"error"} and set(answer["error"]) == {"code", "message"}
    assert "secret-42" not in json.dumps(answer)
    assert ask(body={"text": "Thank you."}) == (200, {"translation": "Merci."})


def test_a_request_over_the_token_limit_is_told_limit_and_size(ask):
    message = ask(body={"text": "one two " * 12_000})[1]["error"]["message"]
    limit = app.Settings().max_request_tokens
    assert str(limit) in message and any(
        int(number) > limit for number in re.findall(r"\d+", message)
    )


def test_unknown_paths_and_methods(ask):
    assert ask("/translate/nowhere", method="GET")[0] == 404
    assert ask("/translate", method="PUT", body={})[0] == 405


def test_page_and_description_for_people(ask):
    status, page = ask("/translate", method="GET")
    assert (
        status == 200 and "<textarea" in page and "http" not in page.replace("<!doctype html>", "")
    )
    example = ask("/translate/openapi.json", method="GET")[1]["paths"]["/"]["post"]["requestBody"]
    assert "Hello world!" in json.dumps(example)


def test_no_log_line_holds_a_text(server):
    server.ask(body={"text": "canary-7f3a in the text"})
    time.sleep(1)
    logs = [
        server.log,
        *(
            path
            for path in Path(server.scratch).rglob("*")
            if "logs" in path.parts and path.is_file()
        ),
    ]
    assert len(logs) > 5 and not [path for path in logs if b"canary-7f3a" in path.read_bytes()]


# The production configuration


@pytest.fixture
def config():
    path = HERE / "serve_config.yaml"
    if not path.exists():
        pytest.skip("serve_config.yaml is not beside this file")
    return yaml.safe_load(path.read_text())


def flat(value, path=""):
    """{path: value} of everything in nested dictionaries and lists."""
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    inner = {
        name: each
        for key, one in items
        for name, each in flat(one, f"{path}.{key}".lstrip(".")).items()
    }
    return inner or {path: value}


def test_config_is_what_serve_build_writes_but_for_its_commented_changes(config, project, tmp_path):
    subprocess.run(
        [
            sys.executable,
            "-m",
            "ray.serve.scripts",
            "build",
            "template_ray_serve:translator_app",
            "-o",
            str(tmp_path / "built.yaml"),
        ],
        cwd=project,
        check=True,
        timeout=100,
        capture_output=True,
    )
    ours, theirs = flat(config), flat(yaml.safe_load((tmp_path / "built.yaml").read_text()))
    changed = {
        path for path in ours.keys() | theirs.keys() if ours.get(path, "") != theirs.get(path, "")
    }
    deployment = "applications.0.deployments.0."
    assert changed == {
        "grpc_options.port",
        "grpc_options.grpc_servicer_functions",
        "grpc_options.enable_reflection",
        "logging_config.encoding",
        "logging_config.logs_dir",
        "logging_config.additional_log_standard_attrs",
        "http_options.request_timeout_s",
        "applications.0.name",
        "applications.0.route_prefix",
        "applications.0.import_path",
        "applications.0.args.max_batch_size",
        *(
            deployment + "request_router_config." + key
            for key in ("request_router_class", "initial_backoff_s", "max_backoff_s")
        ),  # as the app has them
        deployment + "backpressure_config.retry_after_s",
        deployment + "max_surge_percent",
        deployment + "autoscaling_config.min_replicas",
        deployment + "autoscaling_config.max_replicas",
        deployment + "autoscaling_config.target_ongoing_requests",
        deployment + "graceful_shutdown_timeout_s",
    }


def test_config_names_the_deployment_that_the_app_has(config):
    names = [deployment["name"] for deployment in config["applications"][0]["deployments"]]
    assert names == [app.Translator.name], (
        "serve_config.yaml and template_ray_serve.py name different deployments"
    )


def test_config_has_nothing_blank_and_fits_the_app(config):
    from ray.serve.schema import ServeDeploySchema

    ServeDeploySchema.model_validate(config)
    assert None not in flat(config).values()
    assert config["http_options"]["host"] == "0.0.0.0"
    (application,) = config["applications"]
    assert application["route_prefix"] == "/translate" and len(application["name"]) <= 40
    (deployment,) = application["deployments"]
    settings = app.Settings.model_validate(application["args"], strict=True)
    assert deployment["max_ongoing_requests"] >= settings.max_queue + 2 * settings.max_batch_size
    assert (
        config["http_options"]["request_timeout_s"] >= settings.timeout_s + settings.body_timeout_s
    )
