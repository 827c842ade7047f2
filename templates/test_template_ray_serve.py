# test_template_ray_serve.py, version 0.1.0
"""Tests of template_ray_serve.py: `python -m pytest test_template_ray_serve.py`. No network; about a minute.

The HTTP tests talk to a real `serve run` of a small model that is trained here in a few seconds.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import yaml
from click import ClickException
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration, set_seed

import template_ray_serve as app

HERE = Path(__file__).parent
PAIRS = {
    "Hello world!": "Bonjour le monde !", "Good morning": "Bonjour", "The house is wonderful.": "La maison est belle.",
    "Thank you.": "Merci.", "See you tomorrow!": "À demain !", "The cat sleeps.": "Le chat dort.",
    "Where is the station?": "Où est la gare ?", "I like tea.": "J'aime le thé.",
}


def make_model(folder, pairs, prefix=app.PREFIX, steps=120):
    """Train a tiny T5 until it knows the pairs by heart, and write it to `folder`."""
    bpe, byte_level = Tokenizer(models.BPE()), pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.pre_tokenizer, bpe.decoder = byte_level, decoders.ByteLevel()
    texts = [text for source, target in pairs.items() for text in (prefix + source, target)]
    bpe.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<pad>", "</s>"], initial_alphabet=byte_level.alphabet(), show_progress=False))
    bpe.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", eos_token="</s>",
                                        model_input_names=["input_ids", "attention_mask"])
    set_seed(0)
    model = T5ForConditionalGeneration(T5Config(
        vocab_size=len(tokenizer), d_model=64, d_kv=16, d_ff=256, num_layers=2, num_heads=4, dropout_rate=0.0,
        decoder_start_token_id=0))
    inputs = tokenizer([prefix + source for source in pairs], return_tensors="pt", padding=True)
    labels = tokenizer(list(pairs.values()), return_tensors="pt", padding=True).input_ids
    labels[labels == 0] = -100
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(steps):
        loss = model(**inputs, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
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
    return app.Model(app.Settings(model=str(project / "model")))


class Server:
    """A command that serves on port 8000, with its output; a Ray of its own, which ends with it."""

    def __init__(self, folder, *command, **environment):
        kept = {name: value for name, value in os.environ.items() if not re.match("RAY_|SERVE_", name)}
        self.log = folder / "serve.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "ray.serve.scripts", *command], cwd=folder, stdout=log, stderr=log,
                start_new_session=True, env={**kept, "RAY_ADDRESS": "local", "HF_HUB_OFFLINE": "1", **environment})

    def wait(self, seconds=90):
        """Wait until the app answers; fail with the log when it cannot."""
        for _ in range(seconds * 2):
            if ask("/translate/health", method="GET")[0] == 200:
                return self
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.5)
        raise AssertionError(self.log.read_text())

    def stop(self):
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            raise


def ask(path="/translate", body=None, method="POST", kind="application/json", timeout=60):
    """Send a request; return (status, parsed JSON or text). 0 is no answer."""
    data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:8000{path}", data, {"Content-Type": kind}, method=method)
    try:
        with urllib.request.build_opener(NoRedirect).open(request, timeout=timeout) as reply:
            status, text = reply.status, reply.read().decode()
    except urllib.error.HTTPError as err:
        status, text = err.code, err.read().decode()
    except OSError:
        return 0, ""
    try:
        return status, json.loads(text)
    except ValueError:
        return status, text


class NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_):
        return None


@pytest.fixture(scope="module")
def server(project):
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", 8000)) != 0, "port 8000 is in use; stop what listens there"
    running = Server(project, "run", "template_ray_serve:translator_app", "--route-prefix", "/translate")
    try:
        yield running.wait()
    finally:
        running.stop()


pytestmark = pytest.mark.xdist_group("ray")  # they share port 8000


# The model, without a server


def test_every_known_pair_is_translated(model):
    answers = model([model.encode(text) for text in PAIRS])
    assert [text for text, cut in answers if not cut] == list(PAIRS.values())


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


@pytest.mark.parametrize("text, sentences", [
    ("Hello world! How are you?", ["Hello world!", "How are you?"]),
    ("One.\n\n  Two\r\nThree", ["One.", "Two", "Three"]),
    ("Mr. Smith is here, e.g. today. He said \"No.\" Then he left…", ["Mr. Smith is here, e.g. today.",
                                                                      "He said \"No.\"", "Then he left…"]),
    ("version 2.5 costs 3.50 euros. ok", ["version 2.5 costs 3.50 euros. ok"]),
    ("  no end  ", ["no end"]),
    ("", []),
])
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


@pytest.mark.parametrize("wrong, name", [
    ({"max_batch_size": 0}, "max_batch_size"), ({"max_bach_size": 8}, "max_bach_size"),
    ({"timeout_s": -1}, "timeout_s"), ({"max_batch_size": "eight"}, "max_batch_size"),
    ({"precision": "float16"}, "precision"),
])
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
    with pytest.raises(RuntimeError, match="the model answers 'Hello world!' with .*, not 'Bonjour le monde !'"):
        app.Model(app.Settings(model=str(tmp_path / "model")))


def test_another_model_with_another_prefix_by_arguments_only(tmp_path):
    make_model(tmp_path / "other", {"Guten Tag": "Buenos días", "Danke": "Gracias"}, prefix="")
    other = app.Model(app.Settings(model=str(tmp_path / "other"), prefix=""))
    assert other([other.encode("Guten Tag")]) == [("Buenos días", False)]


def test_no_model_and_no_hub_is_one_line_with_both_remedies(tmp_path, monkeypatch):
    with pytest.raises(RuntimeError) as missing:
        app.Model(app.Settings(model=str(tmp_path / "nowhere")))
    line = str(missing.value)
    assert "export_model.py" in line and "model=PATH" in line and "\n" not in line


# The server


def test_the_documented_request_answers_in_both_forms(server):
    for path in ("/translate", "/translate/"):
        assert ask(path, {"text": "Hello world!"}) == (200, {"translation": "Bonjour le monde !"})


def test_a_list_keeps_its_order_and_blank_texts_stay_blank(server):
    texts = ["Good morning", " ", "Thank you. See you tomorrow!\n\nThe cat sleeps.", ""]
    assert ask(body={"text": texts}) == (200, {
        "translation": ["Bonjour", "", "Merci. À demain !\n\nLe chat dort.", ""]})
    assert ask(body={"text": []}) == (200, {"translation": []})


def test_many_at_once_get_their_own_answers(server):
    texts = list(PAIRS) * 12
    with ThreadPoolExecutor(24) as pool:
        answers = list(pool.map(lambda text: ask(body={"text": text}), texts))
    assert answers == [(200, {"translation": PAIRS[text]}) for text in texts]


@pytest.mark.parametrize("body, kind, status", [
    (b"", "application/json", 422), (b"{", "application/json", 422), (b"[]", "application/json", 422),
    (b'{"txet": "secret-42"}', "application/json", 422), (b'{"text": {"a": "secret-42"}}', "application/json", 422),
    (b'{"text": NaN}', "application/json", 422), (b'{"text": "\\ud83d"}', "application/json", 422),
    (b"[" * 10_000 + b"]" * 10_000, "application/json", 422), (b"\xff\xfe", "application/json", 422),
    (b'{"text": "a", "secret-42": 1}', "application/json", 422), (b'{"text": "secret-42"}', "text/plain", 415),
    (b'{"text": "' + b"secret-42 " * 100_000 + b'"}', "application/json", 413),
    (b'{"text": "' + b"one two " * 12_000 + b'"}', "application/json", 413),
])
def test_bad_requests_get_a_short_answer_that_repeats_nothing(server, body, kind, status):
    got, answer = ask(body=body, kind=kind)
    assert (got, answer["error"]["code"]) == (status, status)
    assert set(answer) == {"error"} and set(answer["error"]) == {"code", "message"}
    assert "secret-42" not in json.dumps(answer)
    assert ask(body={"text": "Thank you."}) == (200, {"translation": "Merci."})


def test_a_request_over_the_token_limit_is_told_limit_and_size(server):
    message = ask(body={"text": "one two " * 12_000})[1]["error"]["message"]
    limit = app.Settings().max_request_tokens
    assert str(limit) in message and any(int(number) > limit for number in re.findall(r"\d+", message))


def test_unknown_paths_and_methods(server):
    assert ask("/translate/nowhere", method="GET")[0] == 404
    assert ask("/translate", method="PUT", body={})[0] == 405


def test_page_and_description_for_people(server):
    status, page = ask("/translate", method="GET")
    assert status == 200 and "<textarea" in page and "http" not in page.replace("<!doctype html>", "")
    example = ask("/translate/openapi.json", method="GET")[1]["paths"]["/"]["post"]["requestBody"]
    assert "Hello world!" in json.dumps(example)


def test_no_log_line_holds_a_text(server):
    ask(body={"text": "canary-7f3a in the text"})
    time.sleep(1)
    assert "canary-7f3a" not in server.log.read_text()


# The production configuration


@pytest.fixture
def config():
    path = HERE / "serve_config.yaml"
    if not path.exists():
        pytest.skip("serve_config.yaml is not beside this file")
    return yaml.safe_load(path.read_text())


def test_config_is_what_serve_build_writes_but_for_its_comments(config, project, tmp_path):
    from ray.serve.schema import ServeDeploySchema

    ServeDeploySchema.model_validate(config)
    subprocess.run([sys.executable, "-m", "ray.serve.scripts", "build", "template_ray_serve:translator_app", "-o",
                    str(tmp_path / "built.yaml")], cwd=project, check=True, timeout=100, capture_output=True)
    built = yaml.safe_load((tmp_path / "built.yaml").read_text())
    (ours,), (theirs,) = config["applications"], built["applications"]
    assert ours["import_path"] == theirs["import_path"] and ours["runtime_env"] == theirs["runtime_env"] == {}
    (ours,), (theirs,) = ours["deployments"], theirs["deployments"]
    assert ours["name"] == theirs["name"] == "Translator"
    assert theirs["max_ongoing_requests"] == ours["max_ongoing_requests"]
    assert theirs["ray_actor_options"] == ours["ray_actor_options"] == {"num_cpus": 1}


def test_config_has_nothing_blank_and_fits_the_app(config):
    def nulls(value, path=""):
        if isinstance(value, dict):
            return [each for key, one in value.items() for each in nulls(one, f"{path}.{key}")]
        if isinstance(value, list):
            return [each for one in value for each in nulls(one, path + "[]")]
        return [path] if value is None else []

    assert nulls(config) == [] and "grpc_options" not in config
    assert config["http_options"]["host"] == "0.0.0.0"
    (application,) = config["applications"]
    assert application["route_prefix"] == "/translate" and len(application["name"]) <= 40
    (deployment,) = application["deployments"]
    settings = app.Settings(**deployment["user_config"])
    assert deployment["max_ongoing_requests"] >= settings.max_batch_size
    assert config["http_options"]["request_timeout_s"] > settings.timeout_s
