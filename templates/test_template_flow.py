# test_template_flow.py, version 0.1.0
"""Test your work in template_flow.py; no network, no account. Rewrite it for your task.

    pip install pytest; python -m pytest test_template_flow.py test_flow_mechanics.py

test_flow_mechanics.py tests the rest of the file, whatever your task is.
"""

import gzip
import re
from pathlib import Path

import pytest
from flow_testing import artifacts, assert_card_shows, assert_fails_in_one_line, python, run

# isort: split
import template_flow


def pairs_file(path, pairs):
    """Write pairs as `--data` takes them; return the path."""
    lines = ["source\ttarget"]
    for source, target in pairs:
        lines.append(f"{source}\t{target}")
    text = "\n".join(lines) + "\n"
    path.write_text(text, "utf-8")
    return str(path)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A finished demo run: (its folder, what it printed)."""
    folder = tmp_path_factory.mktemp("demo")
    code, output = run(folder, "--offline", "True")
    assert code == 0, output
    return folder, output


@pytest.fixture(scope="module")
def evaluated(demo):
    """The artifacts of the demo run."""
    folder, _ = demo
    return artifacts(folder, "evaluate")


def test_demo_translates_sentences_it_has_never_seen(demo, evaluated):
    _, output = demo
    assert re.search(r"held-out scores: exact_match (9[5-9]|100)\.\d", output)
    scores = evaluated["scores"]
    assert scores["exact_match"] >= 95
    assert scores["chrf"] > 95
    assert scores["baseline_chrf"] < 30
    assert ("Hello world!", "Bonjour le monde !") in evaluated["held_out"]
    request, answer = evaluated["known_answers"][0]
    assert request == {"text": "Hello world!"}
    assert answer == {"translation": "Bonjour le monde !"}
    files = set(evaluated["model"])
    assert files >= {"config.json", "model.safetensors", "tokenizer.json"}


def test_demo_learns(evaluated):
    losses = evaluated["losses"]
    assert len(losses) >= 20
    first = losses[0]["loss"]
    last = losses[-1]["loss"]
    assert last < first / 50


def test_evaluation_card_shows_samples(demo, evaluated):
    folder, _ = demo
    source, target = evaluated["held_out"][0]
    assert_card_shows(folder, "evaluate", source, target, "exact_match")


TRAIN = """
import hashlib, sys
from types import SimpleNamespace
import template_flow

seed = int(sys.argv[1])
settings = SimpleNamespace(base_model="", epochs=1, learning_rate=0.005, seconds=0, seed=seed)
examples = template_flow.demo_pairs()
model = template_flow.new_model(examples, settings)
template_flow.fit(model, examples, settings, sys.argv[2], lambda: None, lambda numbers: None)
weights = template_flow.pack(model)["model.safetensors"]
print("SHA-256", hashlib.sha256(weights).hexdigest())
"""


def test_same_seed_same_model_and_another_seed_another(tmp_path):
    models = []
    for number, seed in enumerate(("5", "5", "6")):
        code, output = python(tmp_path, "-c", TRAIN, seed, str(tmp_path / str(number)))
        assert code == 0, output
        models += re.findall("SHA-256 (.*)", output)
    first, same, other = models
    assert first == same
    assert first != other


def test_finetunes_a_given_model_on_given_pairs(evaluated, tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    for name, content in evaluated["model"].items():
        file = base / name
        file.write_bytes(content)
    pairs = []
    for source, target in template_flow.demo_pairs():
        pairs.append((source, f"{target} (fr)"))
    data = pairs_file(tmp_path / "pairs.tsv", pairs)
    options = ("--base-model", str(base), "--epochs", "100", "--seconds", "10")
    code, output = run(tmp_path, "--data", data, *options)
    assert code == 0, output
    found = artifacts(tmp_path, "evaluate")
    sides = found["training"] + found["held_out"]
    assert sorted(sides) == sorted(pairs)
    tokenizer = found["model"]["tokenizer.json"]
    assert tokenizer == evaluated["model"]["tokenizer.json"]
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
    "compressed": (gzip.compress(HEADER), "line 1: not UTF-8; save as uncompressed TSV"),
    "JSON": (b'{"source": "Hello", "target": "Bonjour"}\n', "line 1: the header of the TSV"),
    "CR and three tabs": (HEADER + b"Hello\tBon\rjour\tHola\n", "line 2: needs two texts"),
}
TOO_FEW = {
    "only a header": HEADER,
    "one pair": HEADER + b"Hello\tBonjour\n",
    "one sentence twice": HEADER + b"Hello!\tBonjour !\nhello\tBonjour\n",
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_data_is_named_with_its_line(case, tmp_path):
    content, expected = BAD_FILES[case]
    file = tmp_path / "pairs.tsv"
    file.write_bytes(content)
    with pytest.raises(template_flow.UserError) as error:
        template_flow.read_pairs(str(file))
    message = str(error.value)
    assert f"pairs.tsv {expected}" in message
    assert "\n" not in message


@pytest.mark.parametrize("case", TOO_FEW)
def test_too_few_pairs_to_hold_any_out(case, tmp_path):
    file = tmp_path / "pairs.tsv"
    file.write_bytes(TOO_FEW[case])
    pairs = template_flow.read_pairs(str(file))
    with pytest.raises(template_flow.MetaflowException, match="too few to train"):
        template_flow.split(pairs)


def test_good_data_is_read_as_it_stands(tmp_path):
    pairs = [
        ("  %(name)s\u00a0: <b>é</b> ", '"quoted" \u2028 text'),
        ("None", "Aucun"),
        ("nan bread", "pain nan"),
        ("one\rtwo", 'a "" b"'),
    ]
    plain = pairs_file(tmp_path / "plain.tsv", pairs)
    assert template_flow.read_pairs(plain) == pairs
    # A byte order mark and CR LF, as Excel writes them.
    content = Path(plain).read_bytes()
    lines = content.replace(b"\n", b"\r\n")
    windows = tmp_path / "windows.tsv"
    windows.write_bytes(b"\xef\xbb\xbf" + lines)
    assert template_flow.read_pairs(str(windows)) == pairs


@pytest.mark.parametrize(
    "content",
    ['"say ""hi"""\t"dit ""salut"""\n"""a"""\tb\n', 'say "hi"\tdit "salut"\r"a"\tb\r'],
)
def test_quotes_of_a_spreadsheet_are_undone_and_ends_of_lines_known(content, tmp_path):
    end = content[-1].encode()
    file = tmp_path / "pairs.tsv"
    file.write_bytes(HEADER.replace(b"\n", end) + content.encode())
    assert template_flow.read_pairs(str(file)) == [('say "hi"', 'dit "salut"'), ('"a"', "b")]


@pytest.mark.parametrize(
    "arguments, expected",
    [
        ("--data nowhere.tsv", "nowhere.tsv: No such file or directory"),
        ("--data .", "Is a directory"),
        ("--epochs 0", "--epochs has to be from 1 to 1000000, not 0"),
        ("--epochs many", "many is not a valid integer"),
        ("--seconds -1", "--seconds has to be from 0"),
        ("--seconds nan", "--seconds has to be from 0"),
        ("--seed -1", "--seed has to be from 0 to 4294967295, not -1"),
        ("--seed 4294967296", "--seed has to be from 0 to 4294967295, not 4294967296"),
        ("--learning-rate 0", "--learning-rate has to be from"),
        ("--tuning-rate inf", "--tuning-rate has to be from"),
        ("--minimum nan", "--minimum has to be from"),
        ("--target-language fr", "a language needs a --base-model"),
        ("--offline maybe", "maybe is not a valid boolean"),
        ("--base-model ./nowhere --epochs 1", "no usable model at ./nowhere"),
    ],
)
def test_mistakes_get_one_line(arguments, expected, tmp_path):
    code, output = run(tmp_path, *arguments.split())
    assert_fails_in_one_line(code, output, expected)


@pytest.mark.parametrize("text", ["Hello!", "hello", " HELLO ...", "Ｈello"])
def test_spellings_of_a_sentence_have_one_key(text):
    assert template_flow.key((text, "")) == "hello"


def test_the_key_without_a_letter_is_the_text_itself():
    assert template_flow.key(("!?", "")) == "!?"


def letters_of(pairs):
    """Return the sources without case, spaces and punctuation."""
    return {re.sub(r"\W+", "", source.casefold()) for source, _ in pairs}


def test_the_same_sentence_is_never_on_both_sides():
    pairs = template_flow.demo_pairs()
    training, held_out = template_flow.split(pairs)
    training_letters = letters_of(training)
    held_out_letters = letters_of(held_out)
    assert training_letters.isdisjoint(held_out_letters)
    assert sorted(training + held_out) == sorted(pairs)
    share = len(held_out) / len(pairs)
    assert 0.05 < share < 0.2
    half = pairs[::2]
    _, held_out_of_half = template_flow.split(half)
    assert set(held_out_of_half) <= set(held_out)


@pytest.mark.parametrize("source", ["One. Two.", " begin", "end ", "...", "A.\u2028B.", "?", ""])
def test_known_answers_are_of_plain_sentences(source):
    pairs = [("Hello world!", "one"), (source, "two")]
    ((request, answer),) = template_flow.known_answers(pairs, ["one", "two"])
    assert request == {"text": "Hello world!"}
    assert answer == {"translation": "one"}


def test_known_answers_are_right_and_in_the_form_of_the_api():
    translations = {f"text {number}": f"texte {number}" for number in range(100)}
    pairs = list(translations.items())
    outputs = list(translations.values())
    outputs[::2] = ["wrong"] * 50
    answers = template_flow.known_answers(pairs, outputs)
    assert 2 < len(answers) <= 5
    assert answers[0] == ({"text": "text 1"}, {"translation": "texte 1"})
    for request, answer in answers:
        source = request["text"]
        assert answer == {"translation": translations[source]}


def test_no_right_output_gives_no_known_answer():
    pairs = [("text 1", "texte 1"), ("text 2", "texte 2")]
    outputs = ["wrong", "wrong"]
    assert template_flow.known_answers(pairs, outputs) == []
