# test_template_ray_serve.py, version 0.1.0
"""Tests of what template_ray_serve.py serves, here a translator: rewrite them with your work.

    pip install pytest; python -m pytest test_template_ray_serve.py test_serve_mechanics.py

They need no network: a small model is trained here in a few seconds.
"""

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import template_ray_serve as app
import torch
from ray.serve.scripts import convert_args_to_dict
from serve_testing import Server, assert_linear
from tiny_translator import (
    MAX_NEW_TOKENS,
    MAX_TOKENS,
    PAIRS,
    PREFIX,
    make_model,
    new_marian,
    new_tokenizer,
)
from transformers import AutoModelForSeq2SeqLM

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def project(tmp_path_factory):
    """A folder as a user has it: the app and its `model/`."""
    folder = tmp_path_factory.mktemp("project")
    shutil.copy(HERE / "template_ray_serve.py", folder)
    make_model(folder / "model", PAIRS)
    return folder


@pytest.fixture(scope="session")
def model(project):
    return load(model=str(project / "model"))


def load(**settings):
    return app.load_model(app.Settings(**settings), threads=1)


def ask(model, text):
    """Return the answer of a model, without a server."""
    request = app.ModelRequest(text=text)
    inputs = model.plan(request)
    outputs = model(inputs) if inputs else []
    return model.answer(request, inputs, outputs)


# -- Translations ----------------------------------------------------------------------------------


def test_every_known_pair_is_translated(model):
    answer = ask(model, list(PAIRS))
    assert answer.translation == list(PAIRS.values())
    assert answer.cut_sentences == 0


@pytest.mark.parametrize("precision", ["bfloat16", "int8"])
def test_a_faster_precision_knows_the_pairs_too(project, precision):
    faster = load(model=str(project / "model"), precision=precision)
    assert ask(faster, list(PAIRS)).translation == list(PAIRS.values())


def test_importing_the_app_loads_nothing_large():
    """`serve run` and check_serve_config.py import the app too, and do not run the model."""
    script = "import sys, template_ray_serve; print({'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=HERE,
        timeout=400,
        text=True,
        capture_output=True,
    )
    assert done.stdout == "set()\n", done.stderr


def test_a_batch_answers_like_single_sentences_for_any_number_of_threads(model):
    texts = [*PAIRS, "Hello", "The cat", "tea?", "x" * 50]
    threads = torch.get_num_threads()
    answers = []
    try:
        for number in (1, 2, 4):
            torch.set_num_threads(number)
            answers.append([ask(model, text).translation for text in texts])
            answers.append(ask(model, texts).translation)
    finally:
        torch.set_num_threads(threads)
    for answer in answers:
        assert answer == answers[0]


def test_blank_texts_become_empty_and_what_is_between_sentences_stays(model):
    texts = ["Good morning", " ", "Thank you. See you tomorrow!\n\nThe cat sleeps.", "", " \n"]
    answers = ["Bonjour", "", "Merci. À demain !\n\nLe chat dort.", "", ""]
    assert ask(model, texts).translation == answers
    assert ask(model, []).translation == []
    assert ask(model, "  Thank you. \n").translation == "  Merci. \n"


def test_cut_sentences_are_reported(project):
    short = load_without_known_answers(project, max_new_tokens=1)
    answer = ask(short, ["Where is the station?", "Thank you. See you tomorrow!"])
    assert answer.cut_sentences == 3
    for translation in answer.translation:
        assert translation


def load_without_known_answers(project, **settings):
    """Load the model with settings that change its answers."""
    return app.Model(str(project / "model"), app.Settings(**settings), threads=1)


# -- Sentences -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, sentences",
    [
        ("Hello world! How are you?", ["Hello world!", "How are you?"]),
        ("One.\n\n  Two\r\nThree", ["One.", "Two", "Three"]),
        (
            'Mr. Smith is here, e.g. today. He said "No." Then he left…',
            ["Mr. Smith is here, e.g. today.", 'He said "No."', "Then he left…"],
        ),
        ("version 2.5 costs 3.50 euros. ok", ["version 2.5 costs 3.50 euros.", "ok"]),
        ("  no end  ", ["no end"]),
        ("A\u00a0. B\u3000.", ["A\u00a0. B\u3000."]),
        ("", []),
    ],
)
def test_text_is_cut_into_sentences(model, text, sentences):
    pieces = [piece.strip() for piece in model.pieces(text)]
    assert [piece for piece in pieces if piece] == sentences


def test_no_character_is_lost_or_moved(model):
    marks = [*"aBé1 .!?…:;()[]'\"«»“”„「」。！？\t\n\r\v\f\u00a0\u200b\u2028\u3000\x85\u0301\x00😀"]
    marks += ["Mr. ", "e.g. ", "U.S. ", "[1]", "\r\n", "  ", "...", '."', "http://a.b/c. "]
    chance = random.Random(0)
    for _ in range(3000):
        text = "".join(chance.choices(marks, k=chance.randrange(30)))
        assert "".join(model.pieces(text)) == text
        inputs = model.sentences(0, text)
        if inputs:
            around = [sentence.before + "-" + sentence.after for sentence in inputs]
            kept = iter(text)  # all that is around the sentences stands in the text in this order
            for character in "".join(around).replace("-", ""):
                assert character in kept
        else:
            assert not app.has_words(text)


def test_long_sentences_are_cut_at_spaces_to_fit(model):
    text = " ".join(f"Item {number} is red," for number in range(200))
    pieces = list(model.pieces(text))
    assert "".join(pieces) == text
    assert len(pieces) > 5
    for piece in pieces[:-1]:
        assert piece.endswith(" ")
    for piece in pieces:
        assert len(model.encode(piece)) <= model.max_sentence_tokens
    text = "x" * 3000  # no space anywhere
    assert "".join(model.pieces(text)) == text


@pytest.mark.parametrize("filler", [" ", "\n", "\u2028", ".", ". ", "。", "a ", "é", "«", "Mr. "])
def test_cutting_hostile_text_is_quick(model, filler):
    assert_linear(model.pieces, filler * (10_000 // len(filler)))


@pytest.mark.parametrize("text", ["", "   ", "\n\t", "\u00a0\u200b", "\ufeff"])
def test_blank_text(text):
    assert app.is_blank(text)


def test_what_has_no_letter_or_digit_stays_as_it_is(model):
    texts = ["Thank you. !! \n* * *\nThe cat sleeps.", "😀 …", "?"]
    answers = ["Merci. !! \n* * *\nLe chat dort.", "😀 …", "?"]
    assert ask(model, texts).translation == answers


def test_special_tokens_are_special_in_the_prefix_and_plain_in_a_text(project):
    model = load_without_known_answers(project, prefix="go </s>: ")
    tokens = model.encode("a</s>b")
    end = model.tokenizer.eos_token_id
    assert [number for number, token in enumerate(tokens) if token == end] == [
        len(model.begin) - 1,
        len(tokens) - 1,
    ]
    assert model.tokenizer.decode(tokens) == "go </s>: a</s>b</s>"


def test_a_request_over_the_token_limit_is_told_limit_and_size(model):
    with pytest.raises(app.Refuse) as refusal:
        model.plan(app.ModelRequest(text="one two " * 12_000))
    size = len(model.encode("one two " * 12_000))
    assert refusal.value.status == 413
    assert str(refusal.value) == f"The request has {size} tokens; the limit is 10000."


# -- Models ----------------------------------------------------------------------------------------


def test_prefix_limits_and_language_come_from_the_model_folder(project, tmp_path):
    folder = shutil.copytree(project / "model", tmp_path / "model")
    model = load(model=str(folder))
    assert (model.prefix, model.language) == (PREFIX, "en")
    assert limits(model) == (MAX_TOKENS, MAX_NEW_TOKENS)
    change(folder / "config.json", task_specific_params={"translation_pl_to_fr": {"prefix": "x "}})
    change(folder / "tokenizer_config.json", model_max_length=64)
    change(folder / "generation_config.json", max_new_tokens=7)
    model = app.Model(str(folder), app.Settings(), threads=1)
    assert (model.prefix, model.language) == ("x ", "pl")
    assert limits(model) == (64, 7)
    languages = {"source_language": "deu_Latn", "target_language": "ja"}
    settings = app.Settings(prefix="y ", max_sentence_tokens=32, max_new_tokens=8, **languages)
    model = app.Model(str(folder), settings, threads=1)
    assert (model.prefix, model.language, model.spaces) == ("y ", "de", False)
    assert limits(model) == (32, 8)


def limits(model):
    return model.max_sentence_tokens, model.model.generation_config.max_new_tokens


def test_a_limit_above_what_the_model_can_take_is_refused(tmp_path):
    tokenizer = new_tokenizer(["Hello"])
    model = new_marian(vocab_size=len(tokenizer), d_model=64, max_position_embeddings=64)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    for name in ("max_sentence_tokens", "max_new_tokens"):
        with pytest.raises(RuntimeError, match=f"{name}: the model takes at most 64"):
            load(model=str(tmp_path), **{name: 65})


def test_a_language_that_the_model_does_not_know_is_refused(project):
    with pytest.raises(RuntimeError, match="target_language: the model does not know 'de'; .* fr"):
        load(model=str(project / "model"), target_language="de_DE")


def change(file, **values):
    """Change values in a JSON file."""
    content = json.loads(file.read_text("utf-8"))
    file.write_text(json.dumps(content | values), "utf-8")


def test_a_prefix_that_leaves_no_room_is_refused(project):
    with pytest.raises(RuntimeError, match="prefix: takes more than half"):
        load(model=str(project / "model"), prefix="a b c d " * 40)


@pytest.mark.parametrize("marian, prefix", [(False, "German to Spanish: "), (True, " ")])
def test_another_model_with_another_prefix_by_arguments_only(tmp_path, marian, prefix):
    pairs = {"Guten Tag": "Buenos días", "Danke": "Gracias"}
    make_model(tmp_path / "other", pairs, prefix=prefix.lstrip(), marian=marian)
    unused = {"translation_de_to_es": {"prefix": "not this one: "}}
    change(tmp_path / "other/config.json", task_specific_params=unused)
    # As `serve run` reads them, which takes no empty value.
    arguments = convert_args_to_dict((f"model={tmp_path / 'other'}", f"prefix={prefix}"))
    other = load(**arguments)
    assert ask(other, list(pairs)).translation == list(pairs.values())


def test_a_model_that_gives_other_answers_is_refused(project, tmp_path):
    folder = shutil.copytree(project / "model", tmp_path / "model")
    broken = AutoModelForSeq2SeqLM.from_pretrained(folder)
    with torch.no_grad():
        order = torch.randperm(len(broken.shared.weight))
        broken.shared.weight[:] = broken.shared.weight[order]
    broken.save_pretrained(folder)
    asked = r'the model answers \{"text":"Hello world!"\} with \{"translation":".*"'
    with pytest.raises(RuntimeError, match=asked + r'.*, not \{"translation":"Bonjour le monde !"'):
        load(model=str(folder))


def test_no_model_and_no_hub_is_one_line_with_both_remedies(tmp_path, monkeypatch):
    monkeypatch.setattr(app, "MODEL_FOLDER", tmp_path / "model")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for settings in ({}, {"model": str(tmp_path / "nowhere")}):
        with pytest.raises(RuntimeError) as missing:
            load(**settings)
        line = str(missing.value)
        assert "export_model.py" in line
        assert "model=PATH" in line
        assert "\n" not in line


# -- The module and the server ---------------------------------------------------------------------


def test_your_work_needs_neither_ray_nor_fastapi(tmp_path):
    text = (HERE / "template_ray_serve.py").read_text("utf-8")
    imports = text.split("# YOUR CODE: imports\n")[1].split("# -- 1.")[0]
    work = text.split("# YOUR CODE: begin\n")[1].split("# YOUR CODE: end\n")[0]
    more = "from typing import Any\nfrom pydantic import BaseModel, ConfigDict, Field\n"
    (tmp_path / "my_work.py").write_text(more + imports + work, "utf-8")
    code = "import sys; sys.modules |= {'ray': None, 'fastapi': None}; import my_work"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=400)


@pytest.fixture(scope="module")
def server(project):
    """The documented command, on a machine with one CPU."""
    command = ["run", "template_ray_serve:translator_app", "--route-prefix", "/translate"]
    with Server(project, *command) as running:
        yield running.wait()


def test_the_documented_request(server):
    answer = server.ask("/translate", {"text": "Hello world!"})
    assert answer == (200, {"translation": "Bonjour le monde !"})
    texts = list(PAIRS)
    assert server.ask(body={"text": texts}) == (200, {"translation": list(PAIRS.values())})
