"""The app with every family of sequence-to-sequence models: the table in docs/languages.md.

Each model is tiny, and learns a few pairs by heart, in the languages that its family can tell
apart. Its tokenizer is of the family's own class, with pieces that are trained here.
"""

import json
import os
import shutil
import subprocess
import sys

import pytest
import template_ray_serve as app
import torch
import transformers
from helpers import families, recipes
from helpers.repository import ROOT

pytestmark = pytest.mark.slow

PAGE = ROOT / "docs/languages.md"
SOURCES = ["The cat sleeps.", "Good morning!", "I like tea and milk.", "Where is the station?"]
TARGETS = {
    "fr": ["Le chat dort.", "Bonjour !", "J'aime le thé et le lait.", "Où est la gare ?"],
    "de": ["Die Katze schläft.", "Guten Morgen!", "Ich mag Tee und Milch.", "Wo ist der Bahnhof?"],
}
TASKS = {
    "fr": "translate English to French: ",
    "de": "translate English to German: ",
}


def texts():
    """Return what every vocabulary is trained on."""
    found = [*SOURCES, *TARGETS["fr"], *TARGETS["de"]]
    return [*found, *map(str.swapcase, found), "0 1 2 3 4 5 6 7 8 9 < > / _ : ( ) translate to"]


def languages_of(name):
    """Return {language: (what goes before each source, the settings that choose it)}."""
    if name == "T5":
        return {code: (prefix, {"target_language": code}) for code, prefix in TASKS.items()}
    family = families.FAMILIES[name]
    found = {}
    for code, (source, target) in family.languages.items():
        prefix = f"{family.tag.format(target)} " if family.tag else ""
        settings = {"source_language": source, "target_language": target}
        found[code] = prefix, {key: value for key, value in settings.items() if value}
    return found


LANGUAGES = {name: languages_of(name) for name in families.FAMILIES}
WITH_CODES = ("mBART", "mBART-50", "M2M100", "NLLB")
WITH_TAGS = ("MADLAD-400", "Marian, several targets")
WITHOUT_LIMIT = ("T5", "T5 1.1", "mT5", "MADLAD-400")


def lessons(tokenizer, languages):
    """Return a batch for each language: what the network has to learn by heart."""
    batches = []
    for code, (prefix, settings) in languages.items():
        if "source_language" in settings:
            tokenizer.src_lang = settings["source_language"]
            tokenizer.tgt_lang = settings["target_language"]
        sources = [prefix + source for source in SOURCES]
        batch = tokenizer(sources, text_target=TARGETS[code], padding=True, return_tensors="pt")
        batch.pop("token_type_ids", None)
        padding = batch["labels"] == tokenizer.pad_token_id
        batch["labels"] = batch["labels"].masked_fill(padding, -100)
        batches.append(batch)
    return batches


def train(network, batches):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so small a model is slower with more
    parameters = [item for item in network.parameters() if item.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=3e-3)
    steps = 0
    rest = 30  # slow steps, once the loss is small
    while rest:
        loss = sum(loss_of(network, batch) for batch in batches)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if rest < 30 or loss.item() < 0.01:
            optimizer.param_groups[0]["lr"] = 3e-4
            rest -= 1
        steps += 1
        assert steps < 1000, loss.item()
    torch.set_num_threads(threads)
    assert loss.item() < 0.05


def loss_of(network, batch):
    """Return the loss without the language token, which the app forces."""
    logits = network(**batch).logits
    labels = batch["labels"].clone()
    first = labels[0, 0]
    if bool((labels[:, 0] == first).all()):
        labels[:, 0] = -100
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


def make_family(name, folder):
    family = families.FAMILIES[name]
    folder.mkdir()
    family.write_vocabulary(folder, texts(), texts())
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    limit = {} if name in WITHOUT_LIMIT else {"max_position_embeddings": 64}
    network = families.new_network(name, tokenizer, **limit)
    train(network, lessons(tokenizer, LANGUAGES[name]))
    if name == "T5":
        network.config.task_specific_params = {
            f"translation_en_to_{code}": {"prefix": prefix} for code, prefix in TASKS.items()
        }
    # As many models of the hub have it: each of these made generate() warn in each call.
    generation = network.generation_config
    generation.max_length = 512
    generation.num_beams = 5
    generation.length_penalty = 0.8
    network.save_pretrained(folder)


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """A mapping that makes the folder of a family when it is first asked for."""
    root = tmp_path_factory.mktemp("families")

    class Folders(dict):
        def __missing__(self, name):
            self[name] = root / name.replace(" ", "-")
            make_family(name, self[name])
            return self[name]

    return Folders()


def load(folder, **settings):
    return app.load_model(app.Settings(model=str(folder), **settings), threads=1)


def load_first(folders, name, **settings):
    """Return the model of a family in the first of its languages."""
    _, own = next(iter(LANGUAGES[name].values()))
    return load(folders[name], **own, **settings)


def ask(model, text):
    request = app.ModelRequest(text=text)
    inputs = model.plan(request)
    return model.answer(request, inputs, model(inputs))


def refused(folder, **settings):
    """Return the one line with which a model is refused."""
    with pytest.raises(RuntimeError) as refusal:
        load(folder, **settings)
    line = str(refusal.value)
    assert "\n" not in line
    return line


def change(file, **values):
    content = json.loads(file.read_text("utf-8"))
    file.write_text(json.dumps(content | values), "utf-8")


# -- What every family does ------------------------------------------------------------------------


@pytest.mark.parametrize("name", LANGUAGES)
@pytest.mark.parametrize("beams", [1, 4])
def test_a_batch_answers_like_single_texts_in_each_language(folders, name, beams):
    for code, (_, settings) in LANGUAGES[name].items():
        model = load(folders[name], num_beams=beams, max_new_tokens=24, **settings)
        answer = ask(model, SOURCES)
        assert answer.translation == TARGETS[code]
        assert answer.cut_sentences == 0
        texts = [*SOURCES, "The tea sleeps.", "Where is the cat and the milk?", "I", "x" * 9]
        alone = [ask(model, text) for text in texts]
        together = ask(model, texts)
        assert together.translation == [answer.translation for answer in alone]
        assert together.cut_sentences == sum(answer.cut_sentences for answer in alone)


@pytest.mark.parametrize("name", LANGUAGES)
@pytest.mark.parametrize("beams", [1, 4])
def test_a_cut_translation_is_reported(folders, name, beams):
    model = load_first(folders, name, max_new_tokens=2, num_beams=beams)
    assert ask(model, SOURCES).cut_sentences == len(SOURCES)
    assert ask(model, SOURCES[0]).cut_sentences == 1


@pytest.mark.parametrize("name", LANGUAGES)
def test_text_never_becomes_a_special_token(folders, name):
    model = load_first(folders, name)
    tokenizer = model.tokenizer
    special = {*tokenizer.all_special_ids, *app.codes_of(tokenizer).values()}
    tags = app.tags_of(tokenizer).values()
    special.update(tokenizer.convert_tokens_to_ids(list(tags)))
    special.discard(tokenizer.unk_token_id)
    marks = [*tokenizer.all_special_tokens, *app.codes_of(tokenizer), *tags]
    begin, end = len(model.begin), len(model.end)
    for mark in marks:
        for text in (mark, f"The cat{mark}sleeps.", f"{mark} {mark}", f" {mark} tea"):
            tokens = model.encode(text)
            assert tokens[:begin] == model.begin and tokens[len(tokens) - end :] == model.end
            assert special.isdisjoint(tokens[begin : len(tokens) - end]), text


@pytest.mark.parametrize("name", LANGUAGES)
def test_special_tokens_of_a_prefix_stay_special(folders, name):
    _, settings = next(iter(LANGUAGES[name].values()))
    mark = load(folders[name], **settings).tokenizer.eos_token
    model = load(folders[name], **settings, prefix=f"{mark} tea: ")
    plain = load(folders[name], **settings, prefix="tea: ")
    end = model.tokenizer.eos_token_id
    tokens = model.encode("milk")
    assert tokens.count(end) == 1 + plain.encode("milk").count(end)
    assert tokens[len(model.begin) :][-4:] == plain.encode("milk")[-4:]


@pytest.mark.parametrize("name", LANGUAGES)
def test_limits_are_within_the_positions(folders, name, tmp_path):
    folder = shutil.copytree(folders[name], tmp_path / "model")
    _, settings = next(iter(LANGUAGES[name].values()))
    text = "I like tea and milk and " * 150 + "tea"
    if name not in WITHOUT_LIMIT:
        for key in ("max_sentence_tokens", "max_new_tokens"):
            assert f"{key}: the model takes at most 64" in refused(folder, **settings, **{key: 65})
    else:
        load(folder, **settings, max_sentence_tokens=4096)
    change(folder / "generation_config.json", min_length=64)  # as long as it may be
    model = load(folder, **settings, max_new_tokens=64, max_sentence_tokens=64)
    inputs = model.plan(app.ModelRequest(text=text))
    assert 30 < max(len(sentence.tokens) for sentence in inputs) <= 64
    assert ask(model, text).translation
    model = load(folder, **settings)  # the defaults fit too
    assert ask(model, SOURCES[0]).translation


LEAKED = {
    "several answers": ("generation_config.json", {"num_beams": 4, "num_return_sequences": 3}),
    "groups": ("generation_config.json", {"num_beam_groups": 5, "diversity_penalty": 0.5}),
    "a stop string": ("generation_config.json", {"stop_strings": ["e"]}),
    "contrastive search": ("generation_config.json", {"penalty_alpha": 0.6, "top_k": 4}),
    "prompt lookup": ("generation_config.json", {"prompt_lookup_num_tokens": 3}),
    "truncation": (
        "tokenizer.json",
        {
            "truncation": {
                "direction": "Right",
                "max_length": 4,
                "strategy": "LongestFirst",
                "stride": 0,
            }
        },
    ),
    "padding": (
        "tokenizer.json",
        {
            "padding": {
                "strategy": {"Fixed": 32},
                "direction": "Right",
                "pad_to_multiple_of": None,
                "pad_id": 1,
                "pad_type_id": 0,
                "pad_token": "<pad>",
            }
        },
    ),
    "padding on the left": ("tokenizer_config.json", {"padding_side": "left"}),
    "spaces": ("tokenizer_config.json", {"clean_up_tokenization_spaces": True}),
}


@pytest.mark.parametrize("case", LEAKED)
def test_settings_meant_for_other_programs_change_no_answer(case, folders, tmp_path):
    name, values = LEAKED[case]
    folder = shutil.copytree(folders["BART"], tmp_path / "model")
    load(folder).tokenizer.save_pretrained(folder)  # tokenizer.json too
    change(folder / name, **values)
    plain, model = load(folders["BART"]), load(folder)
    texts = [*SOURCES, "I like tea and milk and " * 3, *SOURCES]  # much to pad
    request = app.ModelRequest(text=texts)
    assert model.plan(request) == plain.plan(request)
    assert ask(model, texts) == ask(plain, texts)
    assert ask(model, texts).translation[-4:] == TARGETS["fr"]
    assert ask(model, SOURCES[0]).translation == TARGETS["fr"][0]


@pytest.mark.parametrize("beams", [1, 4])
def test_each_of_several_end_tokens_ends_a_translation(beams, folders, tmp_path):
    folder = shutil.copytree(folders["BART"], tmp_path / "model")
    tokenizer = load(folder).tokenizer
    *_, last, end = tokenizer("Bonjour !")["input_ids"]
    change(folder / "generation_config.json", eos_token_id=[end, last])
    answer = ask(load(folder, num_beams=beams), SOURCES)
    assert (answer.translation, answer.cut_sentences) == (TARGETS["fr"], 0)
    assert ask(load(folder, num_beams=beams, max_new_tokens=2), SOURCES).cut_sentences == 4


# -- Languages -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*WITH_CODES, *WITH_TAGS])
def test_a_language_that_is_missing_or_unknown_is_told_in_one_line(folders, name):
    languages = [settings for _, settings in LANGUAGES[name].values()]
    for key in languages[0]:
        settings = dict(languages[0])
        settings[key] = "fr_FR"
        line = refused(folders[name], **settings)
        assert f"{key}: the model does not know 'fr_FR'; for example, it knows fr" in line
        del settings[key]
        line = refused(folders[name], **settings)
        assert f"{key}: the model needs one; for example, it knows " in line
        assert len(line) < 400


@pytest.mark.parametrize("name", [*WITH_CODES, *WITH_TAGS])
def test_languages_that_training_recorded_need_no_setting(folders, name, tmp_path):
    folder = shutil.copytree(folders[name], tmp_path / "model")
    (prefix, french), (_, german) = LANGUAGES[name].values()
    if name in WITH_TAGS:
        tasks = {"translation_en_to_fr": {"prefix": prefix}}
        change(folder / "config.json", task_specific_params=tasks)
    else:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        tokenizer.src_lang = french["source_language"]
        tokenizer.tgt_lang = french["target_language"]
        tokenizer.save_pretrained(folder)
    assert ask(load(folder), SOURCES).translation == TARGETS["fr"]
    assert ask(load(folder, **german), SOURCES).translation == TARGETS["de"]
    if name in ("mBART-50", "M2M100", "NLLB"):
        forced = app.codes_of(tokenizer)[german["target_language"]]
        change(folder / "generation_config.json", forced_bos_token_id=forced)
        assert ask(load(folder), SOURCES).translation == TARGETS["de"]
        assert ask(load(folder, **french), SOURCES).translation == TARGETS["fr"]


def test_a_task_is_chosen_by_its_languages(folders):
    assert ask(load(folders["T5"]), SOURCES).translation == TARGETS["fr"]  # the first
    german = load(folders["T5"], target_language="de")
    assert german.prefix == TASKS["de"]
    line = refused(folders["T5"], target_language="es")
    assert "target_language: the model does not know 'es'; for example, it knows de, fr" in line
    by_prefix = load(folders["T5"], target_language="es", prefix="translate English to Spanish: ")
    assert by_prefix.prefix == "translate English to Spanish: "


# -- The log, and what cannot work -----------------------------------------------------------------

ASK_ALL = """
import json, sys
import template_ray_serve as app

for folder, settings in json.loads(sys.argv[1]).items():
    model = app.load_model(app.Settings(model=folder, **settings), threads=1)
    for text in ("Good morning!", "I like tea. " * 300, ["a </s> b", "x" * 900]):
        request = app.ModelRequest(text=text)
        inputs = model.plan(request)
        model.answer(request, inputs, model(inputs))
"""


def test_no_family_writes_a_line_into_the_log(folders):
    asked = {}
    for name, languages in LANGUAGES.items():
        _, settings = next(iter(languages.values()))
        asked[str(folders[name])] = {**settings, "max_new_tokens": 8}
    done = subprocess.run(
        [sys.executable, "-W", "default::UserWarning", "-c", ASK_ALL, json.dumps(asked)],
        cwd=ROOT / "templates",
        timeout=600,
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""
    assert done.stderr == ""


def test_what_cannot_work_is_refused_in_one_line(folders, tmp_path):
    gpt = tmp_path / "gpt"
    config = transformers.GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=9)
    transformers.GPT2LMHeadModel(config).save_pretrained(gpt)
    assert "a gpt2 has no encoder and decoder" in refused(gpt)

    for name, file, message in (
        ("T5", "spiece.model", "its tokenizer has no vocabulary"),
        ("M2M100", "sentencepiece.bpe.model", "its tokenizer cannot be loaded"),
    ):
        folder = shutil.copytree(folders[name], tmp_path / name)
        (folder / file).unlink()
        _, settings = next(iter(LANGUAGES[name].values()))
        assert message in refused(folder, **settings)

    folder = shutil.copytree(folders["mT5"], tmp_path / "mT5")
    marks = [f"<{number}>" for number in range(100)]
    options = {**families.T5_PIECES, "user_defined_symbols": marks}
    families.train_pieces(folder / "spiece.model", texts(), vocab_size=500, **options)
    assert "tokens, of which the model knows" in refused(folder)

    folder = shutil.copytree(folders["BART"], tmp_path / "weights")
    weights = transformers.BartForConditionalGeneration.from_pretrained(folder).state_dict()
    del weights["model.encoder.layers.0.fc1.weight"]
    network = transformers.BartForConditionalGeneration.from_pretrained(folder)
    network.save_pretrained(folder, state_dict=weights)
    assert "no weights for model.encoder.layers.0.fc1.weight" in refused(folder)
    change(folder / "config.json", encoder_ffn_dim=100)
    refused(folder)


@pytest.mark.parametrize("name", ["Marian", "M2M100", "T5", "NLLB"])
def test_a_missing_package_is_named(folders, name, tmp_path):
    """Without sentencepiece, as if it were not installed."""
    _, settings = next(iter(LANGUAGES[name].values()))
    asked = json.dumps({str(folders[name]): settings})
    done = subprocess.run(
        [sys.executable, "-c", ASK_ALL, asked],
        cwd=ROOT / "templates",
        env=os.environ | recipes.without(tmp_path, ["sentencepiece"]),
        timeout=600,
        text=True,
        capture_output=True,
    )
    assert done.returncode == 1
    assert (
        "(its tokenizer cannot be loaded without the package sentencepiece: "
        in done.stderr.splitlines()[-1]
    )


# -- The page --------------------------------------------------------------------------------------


def test_a_file_that_git_lfs_has_not_fetched_is_named(folders, tmp_path):
    folder = shutil.copytree(folders["T5"], tmp_path / "model")
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(
        ValueError, match="model.safetensors only stands for a file: .*git lfs pull"
    ):
        app.load_network(str(folder), None, "float32")


def test_limits_of_a_model_made_of_two():
    encoder = transformers.BertConfig(max_position_embeddings=64)
    decoder = transformers.BertConfig(max_position_embeddings=32)
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    assert app.limits_of(config) == {"max_sentence_tokens": 64, "max_new_tokens": 32}


MARKS = ("<!-- families: begin -->\n", "<!-- families: end -->")


def table(folders):
    """Return the table of the page as lines of Markdown."""
    rows = ["| family | tokenizer | how it is told the languages | a limit |", "|---|---|---|---|"]
    for name, languages in LANGUAGES.items():
        prefix, settings = next(iter(languages.values()))
        model = load(folders[name], **settings)
        told = "one task: nothing to set"
        if settings:
            told = ", ".join(f"`{key}: {value}`" for key, value in settings.items())
        if len(settings) == 1:
            told += f", which puts `{model.prefix.strip()}` before each sentence"
        limits = app.limits_of(model.model.config)
        limit = "none" if min(limits.values()) == 4096 else "`max_position_embeddings`"
        kind = type(model.tokenizer).__name__
        rows.append(f"| {name} | `{kind}` | {told} | {limit} |")
    return "\n".join(rows) + "\n"


def test_the_table_of_the_page_is_right(folders):
    begin, end = MARKS
    page = PAGE.read_text("utf-8")
    before, _, rest = page.partition(begin)
    found, _, after = rest.partition(end)
    if os.environ.get("WRITE_TABLES"):
        PAGE.write_text(before + begin + "\n" + table(folders) + "\n" + end + after, "utf-8")
    else:
        assert found.strip() == table(folders).strip(), "WRITE_TABLES=1 pytest ... writes it"
