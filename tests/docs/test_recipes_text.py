"""The recipes of docs/your-own-model.md for text: another language pair, and a summariser.

The models to start from are tiny and have random weights, but the files and the tokenizers of
their family: a Marian has two sentencepiece models, an mT5 has one.
"""

import json
from types import SimpleNamespace

import pytest
import sentencepiece
import transformers
from helpers import families, recipes
from serve_testing import Server

PAIR = "Translate another language pair"
SUMMARY = "Summarise texts"
MARIAN = "Helsinki-NLP/opus-mt-de-en"
MT5 = "google/mt5-small"
PREFIX = "translate German to English: "
# Random weights need more than the settings on the page, which are for a trained model. Metaflow
# reads parameters that are not in the command from these variables.
FROM_RANDOM = {"METAFLOW_RUN_EPOCHS": "25", "METAFLOW_RUN_TUNING_RATE": "0.005"}
TWO_SENTENCES = "Das Fest ist am 3. Oktober. Der Hund sieht die Blume."
TWO_TRANSLATIONS = "The party is on October 3. The dog sees the flower."


# -- Data ------------------------------------------------------------------------------------------


def german_pairs():
    """Return [(German, English), ...]."""
    subjects = {"Der Hund": "The dog", "Die Königin": "The queen", "Herr Groß": "Mr Groß"}
    subjects |= {"Meine Schwester": "My sister", "Ein Kind": "A child"}
    verbs = {"sieht": "sees", "möchte": "wants", "kauft": "buys", "malt": "paints"}
    nouns = {"Tür": "door", "Blume": "flower", "Straße": "road", "Brücke": "bridge"}
    adjectives = {"": "", "grüne ": "green ", "schöne ": "beautiful ", "kleine ": "small "}
    events = {"Das Fest": "The party", "Die Reise": "The journey", "Das Spiel": "The game"}
    events |= {"Der Kurs": "The course", "Die Wahl": "The election"}
    months = {"Januar": "January", "März": "March", "Oktober": "October"}
    sentences = [
        (
            f"{subject} {verb} die {adjective}{noun}.",
            f"{subjects[subject]} {verbs[verb]} the {adjectives[adjective]}{nouns[noun]}.",
        )
        for subject in subjects
        for verb in verbs
        for noun in nouns
        for adjective in adjectives
    ]
    dates = [
        (f"{event} ist am {day}. {month}.", f"{english} is on {months[month]} {day}.")
        for event, english in events.items()
        for day in range(1, 6)
        for month in months
    ]
    return sentences + dates


def reports():
    """Return [(text, summary), ...]."""
    things = ("lamp", "chair", "kettle", "radio", "clock", "mirror", "bag", "tent")
    beginnings = (
        "I bought this {} last week.",
        "My {} came on Monday.",
        "This {} was a present.",
        "We ordered a {} online.",
    )
    middles = (
        "The parcel was large.",
        "My neighbour took it in.",
        "It was easy to set up.",
        "The colour is blue.",
    )
    ends = {"It does not work.": "broken", "It broke on the first day.": "broken"}
    ends |= {"We use it every day.": "useful", "I would buy it again.": "good"}
    ends |= {"It costs far too much.": "expensive"}
    return [
        (f"{beginning.format(thing)} {middle} {end}", f"The {thing} is {ends[end]}.")
        for thing in things
        for beginning in beginnings
        for middle in middles
        for end in ends
    ]


def write_tsv(path, header, rows):
    lines = ["\t".join(row) for row in [header, *rows]]
    path.write_text("\n".join(lines) + "\n", "utf-8")


# -- Models to start from, with the files that the hub has for them --------------------------------


def make_marian(folder):
    """Write a Marian as the hub has them: shared vocabulary, two sentencepiece models."""
    folder.mkdir(parents=True)
    sources, targets = zip(*german_pairs())
    found = families.train_pieces(folder / "source.spm", sources, 150)
    found += families.train_pieces(folder / "target.spm", targets, 150)
    pieces = sorted(set(found) - {"<unk>", "<s>", "</s>"})
    vocabulary = ["</s>", "<unk>", *pieces, "<pad>"]
    pad = len(vocabulary) - 1
    ids = {piece: number for number, piece in enumerate(vocabulary)}
    (folder / "vocab.json").write_text(json.dumps(ids), "utf-8")
    tokenizer = {"source_lang": "deu", "target_lang": "eng", "model_max_length": 512}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    transformers.set_seed(0)
    config = transformers.MarianConfig(
        vocab_size=len(vocabulary),
        d_model=64,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=256,
        decoder_ffn_dim=256,
        max_position_embeddings=512,
        activation_function="swish",
        dropout=0.0,
        init_std=0.1,
        scale_embedding=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=pad,
        decoder_start_token_id=pad,
    )
    transformers.MarianMTModel(config).save_pretrained(folder)
    # The hub has these settings of generate() in both files.
    generation = {"bad_words_ids": [[pad]], "forced_eos_token_id": 0, "num_beams": 6}
    generation |= {"max_length": 512, "decoder_start_token_id": pad, "pad_token_id": pad}
    generation |= {"eos_token_id": 0, "bos_token_id": 0}
    both = json.loads((folder / "config.json").read_text()) | generation
    (folder / "config.json").write_text(json.dumps(both))
    (folder / "generation_config.json").write_text(json.dumps(generation))


def make_mt5(folder):
    """Write an mT5 as the hub has it: a sentencepiece model, and more embeddings than pieces."""
    folder.mkdir(parents=True)
    families.make("mT5", folder, german_pairs(), d_ff=256)


# -- Help ------------------------------------------------------------------------------------------


def python(folder, script, **environment):
    """Run a script in a folder; return what it prints as JSON in its last line."""
    (folder / "probe.py").write_text(script, "utf-8")
    code, output = recipes.run(folder, "python probe.py", **environment)
    assert code == 0, output
    return json.loads(output.splitlines()[-1])


ASK = """
import json
from template_ray_serve import Model, ModelRequest, Settings

def ask(text, **settings):
    model = Model("model", Settings(**settings), threads=1)
    request = ModelRequest(text=text)
    inputs = model.plan(request)
    return model.answer(request, inputs, model(inputs)).model_dump()
"""


def resumed_is_the_same(folder, options, **environment):
    """Kill a run in its training and resume it: the model has to be that of the run before."""
    whole = recipes.artifacts(folder, "evaluate")
    recipes.kill_in_train(folder, options, 4, **environment)
    code, output = recipes.run(folder, f"{recipes.FLOW} resume")
    assert code == 0, output
    resumed = recipes.artifacts(folder, "evaluate")
    assert resumed["losses"] == whole["losses"]
    assert resumed["known_answers"] == whole["known_answers"]
    assert recipes.changed_files(resumed["model"], whole["model"]) == []


@pytest.mark.parametrize("heading", [PAIR, SUMMARY])
def test_recipe_is_short_and_stays_within_the_marks(heading, tmp_path):
    folder = recipes.apply(heading, tmp_path)
    assert recipes.check_limits(heading, folder) > 0
    recipes.check_style(folder)


# -- Another language pair -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def marian(tmp_path_factory):
    """A folder in which everything of the page was done, with a Marian."""
    folder = recipes.apply(PAIR, tmp_path_factory.mktemp("marian"))
    make_marian(folder / MARIAN)
    write_tsv(folder / "pairs.tsv", ("source", "target"), german_pairs())
    recipes.follow(PAIR, folder, **FROM_RANDOM)
    return folder


@pytest.mark.slow
def test_marian_keeps_both_of_its_sentencepiece_models(marian):
    pieces = []
    for name in ("source.spm", "target.spm"):
        pieces.append((marian / "model" / name).read_bytes())
        assert pieces[-1] == (marian / MARIAN / name).read_bytes()
    assert pieces[0] != pieces[1]
    known = recipes.known_answers(marian)
    assert len(known) >= 3
    answers = dict(german_pairs())
    for case in known:
        assert case["answer"]["translation"] == answers[case["request"]["text"]]


@pytest.mark.slow
def test_marian_learns_targets_in_pieces_of_the_target_language(marian):
    source, target = german_pairs()[7]
    labels = python(
        marian,
        f"""
import json
import template_flow as flow
model = _, tokenizer = flow.load("model")
found = flow.encode(model, [{source!r}]) + flow.encode(model, [{target!r}], "text_target")
print(json.dumps([tokenizer.convert_ids_to_tokens(tokens) for tokens in found]))
""",
    )
    pieces = [
        sentencepiece.SentencePieceProcessor(model_file=str(marian / MARIAN / f"{name}.spm"))
        for name in ("source", "target")
    ]
    assert labels[0] == [*pieces[0].encode(source, out_type=str), "</s>"]
    assert labels[1] == [*pieces[1].encode(target, out_type=str), "</s>"]
    assert pieces[0].encode(target, out_type=str) != pieces[1].encode(target, out_type=str)


@pytest.mark.slow
def test_text_is_cut_into_sentences_of_its_own_language(marian):
    answers = python(
        marian,
        f"""{ASK}
text = {TWO_SENTENCES!r}
print(json.dumps([ask(text), ask(text, source_language="en")]))
""",
    )
    german, english = [answer["translation"] for answer in answers]
    assert german == TWO_TRANSLATIONS != english


@pytest.mark.slow
def test_marian_tells_that_a_translation_was_cut(marian):
    generation = json.loads((marian / "model/generation_config.json").read_text())
    assert generation["forced_eos_token_id"] == 0  # which looks like an end that is none
    source = german_pairs()[0][0]
    answers = python(
        marian, f"{ASK}print(json.dumps([ask({source!r}), ask({source!r}, max_new_tokens=5)]))"
    )
    assert [answer["cut_sentences"] for answer in answers] == [0, 1]


@pytest.mark.slow
def test_marian_without_sentencepiece_ends_in_one_line(tmp_path):
    folder = recipes.apply(PAIR, tmp_path)
    make_marian(folder / MARIAN)
    write_tsv(folder / "pairs.tsv", ("source", "target"), german_pairs())
    recipes.fails_in_one_line(
        folder,
        f"--base-model {MARIAN} --data pairs.tsv",
        f"no usable model at {MARIAN}: its tokenizer needs a package: pip install sentencepiece",
        **recipes.without(folder, ["sentencepiece"]),
    )


@pytest.mark.slow
def test_marian_that_was_killed_resumes_to_the_same_model(marian):
    options = f"--base-model {MARIAN} --data pairs.tsv"
    resumed_is_the_same(marian, options, **FROM_RANDOM)


@pytest.mark.slow
def test_image_of_a_marian(marian):
    if not recipes.docker_answers():
        pytest.skip("no docker daemon answers")
    with recipes.image(marian, "recipe-language-pair") as image:
        answer = image.first_answer(lambda: image.post("/translate", {"text": TWO_SENTENCES}))
        assert answer == {"translation": TWO_TRANSLATIONS}


@pytest.mark.slow
def test_mt5_with_a_prefix_needs_sentencepiece_only_to_train(tmp_path):
    folder = recipes.apply(PAIR, tmp_path)
    flow = folder / "template_flow.py"
    text = flow.read_text("utf-8")
    assert text.count('PREFIX = ""') == 1
    flow.write_text(text.replace('PREFIX = ""', f'PREFIX = "{PREFIX}"'), "utf-8")
    make_mt5(folder / MT5)
    write_tsv(folder / "pairs.tsv", ("source", "target"), german_pairs())
    options = f"--base-model {MT5} --data pairs.tsv --minimum 80"
    code, output = recipes.run(folder, f"{recipes.FLOW} run {options}", **FROM_RANDOM)
    assert code == 0, output
    code, output = recipes.run(folder, "python export_model.py")
    assert code == 0, output
    config = json.loads((folder / "model/config.json").read_text())
    assert config["task_specific_params"] == {"translation_de_to_en": {"prefix": PREFIX}}
    assert config["model_type"] == "mt5"
    known = recipes.known_answers(folder)
    assert len(known) >= 3 and dict(german_pairs()).items() >= {
        (case["request"]["text"], case["answer"]["translation"]) for case in known
    }
    command = ("run", "template_ray_serve:translator_app", "--route-prefix", "/translate")
    with Server(folder, *command, **recipes.without(folder, ["sentencepiece"])) as server:
        recipes.check_example(server.wait(), "/translate", known)
        for case in known:
            assert server.ask(body=case["request"]) == (200, case["answer"])
        answer = server.ask(body={"text": TWO_SENTENCES})
        assert answer == (200, {"translation": TWO_TRANSLATIONS})
        recipes.check_refused(server, "/translate", {"texts": "Hallo"}, "text: Field required")


# -- A summariser ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def summariser(tmp_path_factory):
    """A folder in which everything of the page was done."""
    folder = recipes.apply(SUMMARY, tmp_path_factory.mktemp("summariser"))
    write_tsv(folder / "texts.tsv", ("text", "summary"), reports())
    recipes.follow(SUMMARY, folder, **recipes.without(folder, ["sentencex"]))
    return folder


@pytest.mark.slow
def test_known_summaries_are_those_of_the_shortest_texts(summariser):
    found = SimpleNamespace(**recipes.artifacts(summariser, "evaluate"))
    known = recipes.known_answers(summariser)
    lengths = sorted(len(text) for text, _ in found.held_out)
    assert [len(case["request"]["text"]) for case in known] == lengths[:5]
    assert found.scores["chrf"] > 95 > 40 > found.scores["baseline_chrf"] > 5


@pytest.mark.slow
def test_first_words_are_no_summary(summariser):
    texts = {"text": "one two three four", "lead": "one two"}
    scores = python(
        summariser,
        f"""
import json
import template_flow as flow
examples = [({texts["text"]!r}, {texts["lead"]!r})]
print(json.dumps(flow.score(examples, ["one"])[0]))
""",
    )
    assert scores["baseline_chrf"] == 100 > scores["chrf"]


@pytest.mark.slow
def test_summariser_refuses_what_it_cannot_use(summariser):
    command = ("run", "template_ray_serve:translator_app", "--route-prefix", "/summarise")
    known = recipes.known_answers(summariser)
    with Server(summariser, *command) as server:
        recipes.check_example(server.wait(), "/summarise", known)
        for case in known:
            assert server.ask(body=case["request"]) == (200, case["answer"])
        recipes.check_refused(server, "/summarise", {}, "text: Field required")
        recipes.check_refused(server, "/summarise", {"text": " \n"}, "text: ")
        recipes.check_refused(server, "/summarise", {"text": ["a", "b"]}, "text: ")
        status, answer = server.ask(body={"text": "It does not work. " * 200})
        assert status == 413 and answer["error"]["message"].endswith("the limit is 512.")


@pytest.mark.slow
def test_summary_that_was_cut_is_told(summariser):
    text, _ = reports()[0]
    answers = python(
        summariser, f"{ASK}print(json.dumps([ask({text!r}), ask({text!r}, max_new_tokens=2)]))"
    )
    assert [answer["cut_summaries"] for answer in answers] == [0, 1]


@pytest.mark.slow
def test_wrong_data_for_a_summariser_ends_in_one_line(tmp_path):
    folder = recipes.apply(SUMMARY, tmp_path)
    write_tsv(folder / "pairs.tsv", ("source", "target"), [("a", "b")])
    message = "pairs.tsv line 1: the header of the TSV has to be text<TAB>summary"
    recipes.fails_in_one_line(folder, "--data pairs.tsv", message)
