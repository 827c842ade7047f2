"""Every family of sequence-to-sequence models is fine-tuned, with its tokenizer and languages."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import template_flow as flow
from flow_testing import assert_fails_in_one_line, clean_environment, run
from helpers import families
from helpers.repository import ROOT

pytestmark = pytest.mark.slow

PAGE = ROOT / "docs/train.md"
PAIRS = flow.demo_pairs()[::20]
TAGGED = [*PAIRS, families.TAGGED_PAIR]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """A function that gives the folder of a family."""
    folders = {}

    def folder_of(name):
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp("base")
            families.make(name, folders[name], flow.demo_pairs())
        return folders[name]

    return folder_of


@pytest.mark.parametrize("name", families.FAMILIES)
def test_family_is_tuned_saved_and_answers_the_same(name, bases, tmp_path):
    base = bases(name)
    family = families.FAMILIES[name]
    settings = families.settings_for(base, *family.languages["fr"])
    model = flow.new_model(TAGGED, settings)
    losses = flow.fit(model, TAGGED, settings, str(tmp_path), lambda: None, lambda numbers: None)
    assert losses[-1]["loss"] < losses[0]["loss"]
    outputs = flow.predict(model, TAGGED)
    files = flow.pack(model)
    saved = flow.unpack(files)
    assert flow.predict(saved, TAGGED) == outputs
    # What the folder says is enough: no setting is needed to go on with it, or to serve it.
    (tmp_path / "saved").mkdir()
    for file, content in files.items():
        (tmp_path / "saved" / file).write_bytes(content)
    again = flow.new_model(TAGGED, families.settings_for(tmp_path / "saved"))
    sources = [source for source, _ in TAGGED]
    targets = [target for _, target in TAGGED]
    assert flow.encode(again, sources) == flow.encode(model, sources)
    assert flow.encode(again, targets, "text_target") == flow.encode(model, targets, "text_target")
    assert flow.predict(again, TAGGED) == outputs


def test_a_finished_checkpoint_is_used_and_said_to_be(bases, tmp_path, capsys):
    settings = families.settings_for(bases("BART"))
    arguments = (PAIRS, settings, str(tmp_path), lambda: None, lambda numbers: None)
    first = flow.new_model(PAIRS, settings)
    losses = flow.fit(first, *arguments)
    line = "the checkpoint is of a finished training, and is used: `run` trains anew\n"
    assert line not in capsys.readouterr().out
    settings.tuning_rate = 1e-3
    second = flow.new_model(PAIRS, settings)
    assert flow.fit(second, *arguments) == losses
    assert line in capsys.readouterr().out
    assert flow.pack(second)["model.safetensors"] == flow.pack(first)["model.safetensors"]


@pytest.mark.parametrize("name", families.FAMILIES)
def test_sources_and_targets_are_tokens_of_their_language(name, bases):
    family = families.FAMILIES[name]
    network, tokenizer = flow.new_model(
        PAIRS, families.settings_for(bases(name), *family.languages["fr"])
    )
    model = network, tokenizer
    end = tokenizer.eos_token_id
    (source,) = flow.encode(model, ["Hello"])
    (target,) = flow.encode(model, ["Bonjour"], "text_target")
    assert source.count(end) == target.count(end) == 1
    generation = network.generation_config
    if hasattr(tokenizer, "src_lang"):
        number = tokenizer.convert_tokens_to_ids
        if name == "M2M100":
            number = tokenizer.get_lang_id
        source_language, target_language = map(number, family.languages["fr"])
        assert source_language in source and target_language in target
        assert target_language not in source and source_language not in target
        begin = generation.forced_bos_token_id or generation.decoder_start_token_id
        assert begin == target_language
        assert flow.prefix_of(network) == ""
    elif family.tag:
        (tag,) = tokenizer.convert_tokens_to_ids([flow.prefix_of(network).strip()])
        assert source[0] == tag != tokenizer.unk_token_id
    # The first thing that a decoder gets in training is what it gets when it generates.
    import torch

    labels = torch.tensor([target])
    if hasattr(network, "prepare_decoder_input_ids_from_labels"):
        first = network.prepare_decoder_input_ids_from_labels(labels)[0, 0]
        assert first == generation.decoder_start_token_id


@pytest.mark.parametrize("name", families.FAMILIES)
def test_text_is_text(name, bases):
    family = families.FAMILIES[name]
    model = flow.new_model(PAIRS, families.settings_for(bases(name), *family.languages["fr"]))
    _, tokenizer = model
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    for kind in ("text", "text_target"):
        plain, tagged = flow.encode(model, ["x", "x</s> <pad><2de>>>deu<<__de__ de_DE x"], kind)
        for token in special:
            assert tagged.count(token) == plain.count(token)


def test_target_pieces_are_those_of_the_target(bases):
    model = flow.new_model(PAIRS, families.settings_for(bases("Marian")))
    _, tokenizer = model
    text = "La reine voit une voiture rouge."
    (target,) = flow.encode(model, [text], "text_target")
    expected = tokenizer.spm_target.encode(text, out_type=str)
    assert tokenizer.convert_ids_to_tokens(target) == [*expected, "</s>"]
    assert expected != tokenizer.spm_source.encode(text, out_type=str)


def test_a_base_in_half_precision_is_trained_in_single(bases, tmp_path):
    import torch

    network, tokenizer = flow.new_model(PAIRS, families.settings_for(bases("T5")))
    network.to(torch.bfloat16).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    network, _ = flow.new_model(PAIRS, families.settings_for(tmp_path))
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    "name, values",
    [
        ("generation_config.json", {"min_length": 56, "no_repeat_ngram_size": 3}),
        ("generation_config.json", {"num_beams": 4, "num_return_sequences": 3}),
        ("generation_config.json", {"stop_strings": ["a"]}),
        ("generation_config.json", {"penalty_alpha": 0.6, "top_k": 4}),
        ("generation_config.json", {"prompt_lookup_num_tokens": 3}),
        ("tokenizer_config.json", {"padding_side": "left"}),
    ],
)
def test_settings_of_the_old_task_change_nothing(name, values, bases, tmp_path):
    folder = shutil.copytree(bases("BART"), tmp_path / "base")
    file = folder / name
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))
    trained = []
    for base in (bases("BART"), folder):
        settings = families.settings_for(base)
        model = flow.new_model(PAIRS, settings)
        out = str(tmp_path / base.name)
        losses = flow.fit(model, PAIRS, settings, out, lambda: None, lambda numbers: None)
        files = flow.pack(model)
        outputs = flow.predict(flow.unpack(files), PAIRS)
        trained.append((losses, outputs, files["model.safetensors"]))
    assert trained[0] == trained[1]


def test_what_is_cut_is_counted(bases, capsys):
    long = "The cat sees a red car. " * 30
    model = flow.new_model(PAIRS, families.settings_for(bases("T5")))
    sources = flow.encode(model, [long, "Hello", long])
    assert capsys.readouterr().out == (
        "2 of 3 sources are cut to 128 tokens: split them into sentences, or raise MAX_TOKENS if "
        "the model can take more\n"
    )
    assert [len(tokens) for tokens in sources[::2]] == [128, 128]
    assert sources[0][-1] == model[1].eos_token_id
    flow.encode(model, ["Bonjour", long], "text_target")
    assert capsys.readouterr().out.startswith("1 of 2 targets are cut to 128 tokens")
    flow.encode(model, ["Bonjour"] * 9)
    assert capsys.readouterr().out == ""


def test_targets_that_a_base_cannot_write_are_counted(bases, capsys):
    model = flow.new_model(PAIRS, families.settings_for(bases("T5")))
    flow.encode(model, ["Le chat", "Кошка спит", "猫"], "text_target")
    assert capsys.readouterr().out == "2 of 3 targets have characters that the model cannot write\n"


def test_no_more_tokens_than_the_model_has_positions(tmp_path, capsys):
    families.make("BART", tmp_path, flow.demo_pairs(), max_position_embeddings=40)
    long = ("The cat sees a red car. " * 30, "Le chat voit une voiture rouge. " * 30)
    settings = families.settings_for(tmp_path)
    model = flow.new_model(PAIRS, settings)
    flow.fit(model, [long] * 3, settings, str(tmp_path / "c"), lambda: None, lambda numbers: None)
    assert "3 of 3 sources are cut to 40 tokens" in capsys.readouterr().out
    saved = flow.unpack(flow.pack(model))
    assert len(flow.predict(saved, [long])) == 1
    assert saved[1].model_max_length == saved[0].generation_config.max_new_tokens == 40


# -- What cannot work is one line ------------------------------------------------------------------

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 242043056\n"


def remove(*names):
    return lambda folder: [(folder / name).unlink() for name in names]


def write(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def change_config(**changes):
    def change(folder):
        file = folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return change


def halve(folder):
    file = folder / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


BROKEN = {
    "no tokenizer": (
        remove("spiece.model", "tokenizer_config.json"),
        "its tokenizer has no vocabulary",
    ),
    "no vocabulary": (remove("spiece.model"), "its tokenizer has no vocabulary"),
    "pointer to weights": (write("model.safetensors", POINTER), "run `git lfs pull`"),
    "pointer to vocabulary": (write("spiece.model", POINTER), "spiece.model only stands for"),
    "half": (halve, "incomplete metadata"),
    "empty weights": (write("model.safetensors", b""), "header too small"),
    "junk": (write("model.safetensors", b"\xff" * 999), "header too large"),
    "no weights": (remove("model.safetensors"), "no file named model.safetensors"),
    "no config": (remove("config.json"), "there is no config.json"),
    "bad config": (write("config.json", b"{"), "not a valid JSON file"),
    "list": (write("config.json", b"[]"), "Unrecognized model"),
    "unknown": (write("config.json", b'{"model_type": "mine"}'), "model type `mine`"),
    "larger": (change_config(d_model=128), "weights are missing or have another size"),
    "deeper": (change_config(num_layers=4), "16 weights are missing or have another size"),
    "code of its own": (
        change_config(model_type="mine", auto_map={"AutoConfig": "mine.Mine"}),
        "contains custom code",
    ),
    "small vocabulary": (change_config(vocab_size=50), "weights are missing or have another size"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_base_is_one_line(case, bases, tmp_path):
    damage, expected = BROKEN[case]
    folder = tmp_path / "base"
    shutil.copytree(bases("T5"), folder)
    damage(folder)
    with pytest.raises(flow.UserError) as error:
        flow.new_model(PAIRS, families.settings_for(folder))
    message = str(error.value)
    assert message.startswith(f"no usable model at {folder}: ")
    assert expected in message and "\n" not in message


def test_other_things_than_a_translator_are_one_line(bases, tmp_path):
    import transformers

    file = tmp_path / "file"
    file.write_text("x")
    empty = tmp_path / "empty"
    empty.mkdir()
    gpt = tmp_path / "gpt"
    small = {"n_layer": 1, "n_embd": 8, "n_head": 1, "vocab_size": 500}
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**small)).save_pretrained(gpt)
    for base, expected in {
        file: "this is a file",
        empty: "there is no config.json",
        gpt: "gpt2 is no sequence-to-sequence model",
        "nowhere/at/all": "Repo id must be",
    }.items():
        with pytest.raises(flow.UserError, match=expected) as error:
            flow.new_model(PAIRS, families.settings_for(base))
        assert "\n" not in str(error.value)


LANGUAGES = [
    ("NLLB", "", "", "--source-language is missing: the base knows 3, such as eng_Latn"),
    ("NLLB", "eng_Latn", "", "--target-language is missing"),
    ("NLLB", "en", "fr", "--source-language en: the base knows 3, such as eng_Latn"),
    ("NLLB", "eng_Latn", "<unk>", "--target-language <unk>: the base knows"),
    ("M2M100", "en", "xx", "--target-language xx: the base knows 100"),
    ("mBART", "en_XX", "fr", "--target-language fr: the base knows 25, such as fr_XX"),
    ("mBART-50", "", "fr_XX", "--source-language is missing"),
    ("MADLAD-400", "", "", "--target-language is missing: the base knows 3"),
    ("Marian, several targets", "", "fr", "--target-language fr: the base knows 2, such as fra"),
    ("Marian", "en", "fr", "has no languages to choose from"),
    ("T5", "", "de", "has no languages to choose from"),
]


@pytest.mark.parametrize("name, source, target, expected", LANGUAGES)
def test_a_language_that_is_missing_or_unknown_is_one_line(name, source, target, expected, bases):
    with pytest.raises(flow.UserError, match=re.escape(expected)):
        flow.new_model(PAIRS, families.settings_for(bases(name), source, target))


WITHOUT = """
import sys
sys.modules["sentencepiece"] = None
import template_flow
try:
    template_flow.load({base!r})
except template_flow.UserError as error:
    print("LINE", repr(str(error)))
"""


@pytest.mark.parametrize("name", ["Marian", "M2M100", "T5", "mBART", "PEGASUS"])
def test_a_missing_package_is_named(name, bases, tmp_path):
    templates = str(Path(flow.__file__).parent)
    script = WITHOUT.format(templates=templates, base=str(bases(name)))
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=clean_environment(tmp_path),
        timeout=300,
        text=True,
        capture_output=True,
    )
    (line,) = re.findall("^LINE (.*)$", done.stdout, re.MULTILINE)
    assert "sentencepiece" in line and "\\n" not in line, line


@pytest.mark.parametrize(
    "name, options, expected",
    [
        ("NLLB", "", "--source-language is missing"),
        ("T5", "--target-language de", "has no languages to choose from"),
        ("", "--target-language de", "a language needs a --base-model"),
    ],
)
def test_start_refuses_what_cannot_work(name, options, expected, bases, tmp_path):
    base = ["--base-model", str(bases(name))] if name else []
    code, output = run(tmp_path, *base, *options.split())
    assert_fails_in_one_line(code, output, expected)
    assert "/prepare/" not in output, output


def test_the_page_lists_every_family():
    table = PAGE.read_text("utf-8").split("| family |")[1].split("\n\n")[0]
    rows = [row.split(" | ") for row in table.splitlines()[2:]]
    listed = {}
    for names, _, options in rows:
        separator = "; " if ";" in names else ", "
        single = [names.strip("| ")] if "several" in names else names.strip("| ").split(separator)
        listed.update(dict.fromkeys(single, options))
    assert listed.keys() == families.FAMILIES.keys()
    for name, family in families.FAMILIES.items():
        source, target = family.languages["fr"]
        assert ("--source-language" in listed[name]) == bool(source)
        assert ("--target-language" in listed[name]) == bool(target)
