# test_template_flow.py, version 0.1.0
"""Test your work in template_flow.py; no network, no account. Rewrite it for your task.

    pip install pytest; python -m pytest test_template_flow.py test_flow_mechanics.py

test_flow_mechanics.py tests the rest of the file, whatever your task is.
"""

import re
from pathlib import Path

import pytest
from test_flow_mechanics import FLOW, artifacts, cards, clean_environment, run

# isort: split
import template_flow

__all__ = ["FLOW", "artifacts", "cards", "clean_environment", "pairs_file", "run"]


def pairs_file(path, pairs):
    """Write pairs as `--data` takes them; return the path."""
    lines = ["source\ttarget"] + [f"{source}\t{target}" for source, target in pairs]
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return str(path)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A finished demo run: (its folder, what it printed)."""
    folder = tmp_path_factory.mktemp("demo")
    code, output = run(folder, "--offline", "True")
    assert code == 0, output
    return folder, output


def test_demo_translates_sentences_it_has_never_seen(demo):
    found = artifacts(demo[0], "evaluate")
    assert found["scores"]["exact_match"] >= 95
    assert found["scores"]["chrf"] > 95 > 30 > found["scores"]["baseline_chrf"]
    assert ("Hello world!", "Bonjour le monde !") in found["held_out"]
    assert ({"text": "Hello world!"}, {"translation": "Bonjour le monde !"}) == (
        found["known_answers"][0]
    )
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(found["model"])
    assert re.search(r"held-out scores: exact_match (9[5-9]|100)\.\d", demo[1])


def test_demo_learns(demo):
    losses = artifacts(demo[0], "train")["losses"]
    assert len(losses) >= 20 and losses[-1]["loss"] < losses[0]["loss"] / 50


def test_evaluation_card_shows_samples(demo):
    source, target = artifacts(demo[0], "evaluate")["held_out"][0]
    shown = cards(demo[0], "evaluate")
    assert any(all(text in card for text in (source, target, "exact_match")) for card in shown)


def test_same_seed_same_model_and_another_seed_another(tmp_path):
    models = []
    for seed in ("5", "5", "6"):
        # No model exceeds 100: it fails in `evaluate`, long after the model is there.
        code, output = run(tmp_path, "--epochs", "1", "--minimum", "100", "--seed", seed)
        assert code != 0 and "not good enough" in output and "Traceback" not in output, output
        models.append(artifacts(tmp_path, "train")["model"]["model.safetensors"])
    assert models[0] == models[1] != models[2]


def test_finetunes_a_given_model_on_given_pairs(demo, tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    for name, content in artifacts(demo[0], "train")["model"].items():
        (base / name).write_bytes(content)
    pairs = [(source, f"{target} (fr)") for source, target in template_flow.demo_pairs()]
    data = pairs_file(tmp_path / "pairs.tsv", pairs)
    options = ("--base-model", str(base), "--epochs", "100", "--seconds", "10")
    code, output = run(tmp_path, "--data", data, *options)
    assert code == 0, output
    found = artifacts(tmp_path, "evaluate")
    assert sorted(found["training"] + found["held_out"]) == sorted(pairs)
    assert found["model"]["tokenizer.json"] == (base / "tokenizer.json").read_bytes()
    assert found["scores"]["exact_match"] > 80  # 0 before


HEADER = b"source\ttarget\n"
BAD_FILES = {
    "empty": (b"", "line 1: the header"),
    "no header": (b"Hello\tBonjour\n", "line 1: the header"),
    "other names": (b"english\tfrench\nHello\tBonjour\n", "line 1: the header"),
    "commas": (b"source,target\nHello,Bonjour\n", "line 1: the header"),
    "one column": (HEADER + b"Hello\tBonjour\nGoodbye\n", "line 3: needs two texts"),
    "three columns": (HEADER + b"Hello\tBonjour\tHola\n", "line 2: needs two texts"),
    "blank line": (HEADER + b"\nHello\tBonjour\n", "line 2: needs two texts"),
    "empty text": (HEADER + b"Hello\t\n", "line 2: needs two texts"),
    "spaces": (HEADER + b"Hello\t \n", "line 2: needs two texts"),
    "NaN": (HEADER + b"Hello\tBonjour\nWelcome\tNaN\n", "line 3: needs two texts"),
    "Latin-1": (HEADER + b"Hello\tBonjour\nGoodbye\t\xc0 bient\xf4t\n", "line 3: not UTF-8"),
    "UTF-16": ("source\ttarget\nHello\tBonjour\n".encode("utf-16"), "line 1: not UTF-8"),
}
TOO_FEW = {
    "only a header": HEADER,
    "one pair": HEADER + b"Hello\tBonjour\n",
    "one sentence twice": HEADER + b"Hello!\tBonjour !\nhello\tBonjour\n",
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_data_is_named_with_its_line(case, tmp_path):
    content, expected = BAD_FILES[case]
    (tmp_path / "pairs.tsv").write_bytes(content)
    with pytest.raises(template_flow.UserError) as error:
        template_flow.read_pairs(str(tmp_path / "pairs.tsv"))
    assert f"pairs.tsv {expected}" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("case", TOO_FEW)
def test_too_few_pairs_to_hold_any_out(case, tmp_path):
    (tmp_path / "pairs.tsv").write_bytes(TOO_FEW[case])
    pairs = template_flow.read_pairs(str(tmp_path / "pairs.tsv"))
    with pytest.raises(template_flow.MetaflowException, match="too few to train"):
        template_flow.split(pairs)


def test_good_data_is_read_as_it_stands(tmp_path):
    pairs = [
        ("  %(name)s\u00a0: <b>é</b> ", '"quoted" \u2028 text'),
        ("None", "Aucun"),
        ("nan bread", "pain nan"),
    ]
    plain = pairs_file(tmp_path / "plain.tsv", pairs)
    assert template_flow.read_pairs(plain) == pairs
    windows = tmp_path / "windows.tsv"  # a byte order mark and CR LF, as Excel writes them
    windows.write_bytes(b"\xef\xbb\xbf" + Path(plain).read_bytes().replace(b"\n", b"\r\n"))
    assert template_flow.read_pairs(str(windows)) == pairs


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (("--data", "nowhere.tsv"), "nowhere.tsv: No such file or directory"),
        (("--data", "."), "Is a directory"),
        (("--epochs", "0"), "--epochs has to be 1 or more"),
        (("--epochs", "many"), "many is not a valid integer"),
        (("--seconds", "-1"), "--seconds"),
        (("--seed", "-1"), "--seed"),
        (("--offline", "maybe"), "maybe is not a valid boolean"),
        (("--base-model", "./nowhere", "--epochs", "1"), "no model at ./nowhere"),
    ],
)
def test_mistakes_get_one_line(arguments, expected, tmp_path):
    code, output = run(tmp_path, *arguments)
    assert code != 0 and expected in output and "Traceback" not in output, output


def test_the_same_sentence_is_never_on_both_sides():
    keys = {template_flow.key((text, "")) for text in ("Hello!", "hello", " HELLO ...", "Ｈello")}
    assert keys == {"hello"}
    assert template_flow.key(("!?", "")) == "!?"  # without a letter, the text itself
    pairs = template_flow.demo_pairs()
    training, held_out = template_flow.split(pairs)
    letters = [
        {re.sub(r"\W+", "", source.casefold()) for source, _ in side}
        for side in (training, held_out)
    ]
    assert not letters[0] & letters[1] and sorted(training + held_out) == sorted(pairs)
    assert 0.05 < len(held_out) / len(pairs) < 0.2
    assert set(template_flow.split(pairs[::2])[1]) <= set(held_out)


def test_known_answers_are_right_and_in_the_form_of_the_api():
    pairs = [(f"text {number}", f"texte {number}") for number in range(100)]
    outputs = [target if number % 2 else "wrong" for number, (_, target) in enumerate(pairs)]
    answers = template_flow.known_answers(pairs, outputs)
    assert 2 < len(answers) <= 5 and answers[0] == ({"text": "text 1"}, {"translation": "texte 1"})
    translations = dict(pairs)
    for request, answer in answers:
        assert answer == {"translation": translations[request["text"]]}
    assert template_flow.known_answers(pairs, ["wrong"] * 100) == []
