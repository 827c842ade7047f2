# template_flow.py, version 0.1.0
"""Train a model with Metaflow, tracked by Weights & Biases.

    python template_flow.py run --offline True        no account, no key, no network
    python template_flow.py run --offline False       tracked: needs WANDB_API_KEY and WANDB_PROJECT

The same file runs on a laptop and, after `outerbounds configure ...`, on a cluster. As it is, it
trains a small translator. For a model of your own, change the settings (section 1) and replace
your work (sections 3 and 4); the flow and its mechanics (sections 2 and 5) work for any task.
"""

import argparse
import contextlib
import hashlib
import math
import netrc
import os
import shlex
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

import metaflow
from metaflow import (
    Checkpoint,
    Config,
    FlowMutator,
    FlowSpec,
    Parameter,
    Step,
    card,
    checkpoint,
    current,
    kubernetes,
    nvidia,
    pypi,
    requirements_txt_parser,
    retry,
    schedule,
    secrets,
    step,
)
from metaflow.cards import Markdown, Table, VegaChart
from metaflow.exception import MetaflowException, MetaflowNotFound
from metaflow.metaflow_config import DEFAULT_DATASTORE, DEFAULT_ENVIRONMENT

# isort: split
# YOUR CODE: imports
# Only the standard library: on a cluster, `start` runs without your packages. Import them inside
# the functions that use them.
import importlib
import importlib.util
import itertools
import re
import time
import unicodedata

# -- 1. Settings -----------------------------------------------------------------------------------
# YOUR CODE: settings

IMAGE = None  # "registry/name@sha256:...", built from Dockerfile; None: @pypi installs the packages
GPUS = 1  # of the step `train` on a cluster; 0: it runs on CPUs
# Names of secrets that hold WANDB_API_KEY: ["outerbounds.wandb"]; a deployed flow is then tracked.
SECRETS: list[str] = []
CRON = None  # when a deployed flow starts on its own: "0 6 * * 1"; None: only when it is triggered
METRIC = "chrf"  # the score that decides whether a model is good enough: higher is better
MINIMUM = 0.0  # what that score has to exceed, unless --minimum says otherwise
MAX_SCORED = 1000  # held-out examples to score at most


class Settings:
    """Parameters of `run`: `--epochs 3` reaches your work as `settings.epochs`."""

    data = Parameter("data", default="", help="TSV file, header source<TAB>target; none: demo data")
    base_model = Parameter("base-model", default="", help="to fine-tune: google-t5/t5-small")
    source_language = Parameter("source-language", default="", help="of a base with many: en_XX")
    target_language = Parameter("target-language", default="", help="of a base with many: fr_XX")
    epochs = Parameter("epochs", type=int, default=14, help="passes over the training examples")
    learning_rate = Parameter("learning-rate", type=float, default=5e-3, help="of a new model")
    tuning_rate = Parameter("tuning-rate", type=float, default=3e-4, help="of --base-model")
    seconds = Parameter("seconds", type=float, default=0.0, help="longest training; 0: no limit")
    seed = Parameter("seed", type=int, default=0, help="same seed and same data: same model")


LIMITS = {  # the least and the most that a parameter may be
    "epochs": (1, 1_000_000),
    "learning_rate": (1e-9, 1),
    "tuning_rate": (1e-9, 1),
    "seconds": (0, math.inf),
    "seed": (0, 2**32 - 1),
    "minimum": (-math.inf, 1e9),
}


# -- 2. The flow -----------------------------------------------------------------------------------

# True when the flow is deployed to Argo Workflows, and when it runs there.
SCHEDULED = "argo-workflows" in sys.argv or "ARGO_WORKFLOW_NAME" in os.environ
REQUIREMENTS = Path(__file__).with_name("requirements.outerbounds.txt")


class LocalOrCluster(FlowMutator):
    """Removes the decorators that the place where the flow runs does not support (section 5)."""

    def pre_mutate(self, mutable_flow):
        adapt_steps(mutable_flow)


@schedule(cron=CRON, daily=False)
@LocalOrCluster()
class TemplateFlow(FlowSpec, Settings):
    """Examples in, a model and its scores out."""

    offline = Parameter(
        "offline",
        type=bool,
        default=not (SCHEDULED and SECRETS),
        help="True: no key, no network. False: tracked by W&B",
    )
    minimum = Parameter(
        "minimum", type=float, default=MINIMUM, help=f"fail unless {METRIC} is higher than this"
    )
    requirements = Config(  # what @pypi installs
        "requirements",
        parser=requirements_txt_parser,
        default_value=REQUIREMENTS.read_text() if REQUIREMENTS.exists() else "",
    )

    @step
    def start(self):
        """Check what can be checked before any work, and read the examples."""
        if not self.offline and DEFAULT_DATASTORE == "local":
            require_wandb()  # on a cluster, only the steps that are tracked have the key
        settings = settings_of(self)
        require_limits(settings)
        with user_errors_in_one_line():
            self.examples = read(settings)
        self.next(self.prepare)

    # Larger data: raise memory and disk, both in MB.
    @kubernetes(image=IMAGE, cpu=2, memory=8_000, disk=10_000)
    @step
    def prepare(self):
        """Hold out about a tenth of the examples for the evaluation."""
        self.training, self.held_out = split(self.examples)
        counts = f"{len(self.training)} to train on, {len(self.held_out)} held out"
        self.examples_used = f"{counts}, SHA-256 {sha256(repr(self.examples)):x}"
        print("examples:", counts)
        self.next(self.train)

    @retry(times=2)
    @checkpoint(show_card=False)
    @card(type="blank", id="losses")
    @secrets(sources=SECRETS)
    # A run that you start uses @nvidia; change gpu_type, or delete the line to use your own GPUs.
    @nvidia(gpu=GPUS, gpu_type="L40S")
    # A scheduled run uses @kubernetes, and every run if GPUS = 0. Larger models: more MB.
    @kubernetes(image=IMAGE, gpu=GPUS or None, memory=16_000, disk=20_000)
    @pypi(python="3.11", packages=requirements.packages)
    @step
    def train(self):
        """Make the model, fit it, and keep its files; @retry and `resume` use its checkpoints."""
        settings = settings_of(self)
        with user_errors_in_one_line():
            model = new_model(self.training, settings)
        restore_checkpoint()
        with wandb_run(self) as run:
            self.losses = fit(
                model,
                self.training,
                settings,
                folder=current.checkpoint.directory,
                save_checkpoint=current.checkpoint.save,
                log=run.log,
            )
            add_training_card(run, self.losses)
        self.model = pack(model)
        self.next(self.evaluate)

    @card(type="blank")
    @secrets(sources=SECRETS)
    # Larger models: raise memory and disk, both in MB.
    @kubernetes(image=IMAGE, cpu=2, memory=8_000, disk=10_000)
    @pypi(python="3.11", packages=requirements.packages)
    @step
    def evaluate(self):
        """Score the model on examples it has never seen."""
        model = unpack(self.model)
        examples = at_most(MAX_SCORED, self.held_out)
        outputs = predict(model, examples)
        scores, tables = score(examples, outputs)
        self.scores = {name: float(value) for name, value in scores.items()}
        self.known_answers = known_answers(examples, outputs)
        add_evaluation_card(self.scores, tables)
        with wandb_run(self) as run:
            run.summary.update(self.scores)
        self.next(self.end)

    @step
    def end(self):
        """Print the scores, and fail if they are not good enough: the cards are kept."""
        print("held-out scores:", as_text(self.scores))
        require_quality(self.scores, self.minimum)
        print("next: python export_model.py")


# -- 3. Your work ----------------------------------------------------------------------------------
# YOUR CODE: begin
#
# Replace what is here and keep the names UserError, read, key, new_model, fit, save, load, predict,
# score and known_answers: the rest of the file uses only these. Nothing here needs Metaflow: test
# it alone, or move it to a module and write `from my_work import *`. `settings` has the parameters
# of section 1 as attributes: `settings.epochs`.

TASK = "translation_en_to_fr"  # task and languages, as transformers names them
PREFIX = "translate English to French: "  # how a T5 is told its task
MAX_TOKENS = 128  # of a source, and of a target; longer ones are cut, and the log says how many
BATCH_SIZE = 64
# Invisible, and unknown to models: soft hyphen, word joiner, byte order mark, direction marks.
INVISIBLE = re.compile("[\u00ad\u061c\u200e\u200f\u202a-\u202e\u2060\u2066-\u2069\ufeff]")


class UserError(Exception):
    """A mistake in data or settings: ends the run with this one line, without a traceback."""


def read(settings):
    """Return the examples, a list of plain data.

    Called once, in `start`, where a cluster has only the standard library. Raises UserError for
    settings or data that cannot be used.
    Here an example is (source, target).
    """
    if settings.base_model and importlib.util.find_spec("transformers"):
        load_base(settings)  # what it refuses is known before any work
    if not settings.base_model and (settings.source_language or settings.target_language):
        raise UserError("a language needs a --base-model that knows it; or change TASK and PREFIX")
    if not settings.data:
        return demo_pairs()
    return read_pairs(settings.data)


def read_pairs(path):
    """Return [(source, target), ...] from a UTF-8 TSV file with the header source<TAB>target."""
    try:
        text = Path(path).read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; --data takes a TSV file") from None
    except UnicodeDecodeError as error:
        line = 1 + error.object.count(b"\n", 0, error.start)
        raise UserError(
            f"{path} line {line}: not UTF-8; save as uncompressed TSV in UTF-8"
        ) from None
    end = "\n" if "\n" in text else "\r"  # of older programs on a Mac
    lines = text.rstrip(end).split(end)
    rows = [[unquote(cell) for cell in line.split("\t")] for line in lines]
    if rows[0] != ["source", "target"]:
        raise UserError(f"{path} line 1: the header of the TSV has to be source<TAB>target")
    for number, row in enumerate(rows, start=1):
        if len(row) != 2 or any(cell.strip().lower() in ("", "nan") for cell in row):
            raise UserError(
                f"{path} line {number}: needs two texts separated by one tab, neither empty nor NaN"
            )
    return [(source, target) for source, target in rows[1:]]


def unquote(cell):
    """Undo the quoting of pandas and Excel: the cell "Say ""hi""!" is the text Say "hi"! again."""
    inner = cell[1:-1]
    quoted = cell == f'"{inner}"' and '""' in inner and '"' not in inner.replace('""', "")
    return inner.replace('""', '"') if quoted else cell


def key(example):
    """Return a text: examples with the same key never stand on both sides of the split."""
    # Here the letters and digits of the source: "Hello!" and "hello" are one sentence.
    source, _ = example
    text = "".join(character for character in source if not is_unseen(character))
    text = unicodedata.normalize("NFKC", text).casefold()
    text = unicodedata.normalize("NFKC", text)  # as some lower case letters are two characters
    words = "".join(character if is_of_word(character) else " " for character in text).split()
    return " ".join(words) or text.strip() or source


def is_unseen(character):
    """Return True for a soft hyphen, joiner, mark of direction, variation selector and so on."""
    name = unicodedata.name(character, "")
    others = re.search("VARIATION SELECTOR|GRAPHEME JOINER|HANGUL.* FILLER|INHERENT", name)
    return unicodedata.category(character) == "Cf" or bool(others)


def is_of_word(character):
    """Return True for letters, for marks on them such as vowels of Hindi and Thai, and digits."""
    return unicodedata.category(character)[0] in "LMN"


def new_model(examples, settings):
    """Return a model to train, of any type: `fit`, `save` and `predict` get it as it is.

    `examples` are those to train on. May raise UserError.
    Here (network, tokenizer) of --base-model, or a T5 of 0.3 million parameters.
    """
    transformers = import_transformers()
    transformers.set_seed(settings.seed)
    if settings.base_model:
        return load_base(settings)
    tokenizer = new_tokenizer(examples)
    config = transformers.T5Config(
        vocab_size=len(tokenizer),
        d_model=64,
        d_kv=16,
        d_ff=256,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        decoder_start_token_id=tokenizer.pad_token_id,
        task_specific_params={TASK: {"prefix": PREFIX}},
    )
    return transformers.T5ForConditionalGeneration(config), tokenizer


def load_base(settings):
    """Return --base-model, told its languages."""
    network, tokenizer = load(settings.base_model)
    task = TASK
    if settings.source_language and settings.target_language:
        task = f"translation_{settings.source_language}_to_{settings.target_language}"
    prefix = set_languages(network, tokenizer, settings)
    network.config.task_specific_params = {task: {"prefix": prefix}}
    # Keep its tokens; its other settings, such as several answers per text, suited its old task.
    kinds = ("_token_id", "bad_words_ids", "suppress_tokens")
    own = network.generation_config.to_dict()
    kept = {name: value for name, value in own.items() if name.endswith(kinds)}
    network.generation_config = import_transformers().GenerationConfig(**kept)
    return network, tokenizer


def set_languages(network, tokenizer, settings):
    """Tell a base of many languages which to use; return what goes before each source."""
    source = settings.source_language
    target = settings.target_language
    if hasattr(tokenizer, "src_lang"):
        known = languages_of(tokenizer)
        saved = tokenizer.init_kwargs
        source = source or saved.get("src_lang")
        target = target or saved.get("tgt_lang")
        tokenizer.src_lang = known_language("--source-language", source, known)
        tokenizer.tgt_lang = known_language("--target-language", target, known)
        start_with_language(network, tokenizer)
        return ""
    tags = tags_of(tokenizer)
    if tags:
        own = getattr(network.config, "task_specific_params", None)
        if own and not target:
            return prefix_of(network)  # of a model that this flow has trained
        return tags[known_language("--target-language", target, tags)] + " "
    if source or target:
        raise UserError(
            f"{settings.base_model} has no languages to choose from: leave out --source-language "
            "and --target-language, and say in TASK and PREFIX what it does"
        )
    return PREFIX if "t5" in network.config.model_type else ""


def languages_of(tokenizer):
    """Return the codes that mBART (fr_XX), M2M100 (fr) or NLLB (fra_Latn) knows."""
    codes = getattr(tokenizer, "lang_code_to_id", None)
    return codes or [token for token in tokenizer.all_special_tokens if "_" in token]


def tags_of(tokenizer):
    """Return {code: token} of a MADLAD ("<2fr>") or a Marian (">>fra<<") with many languages."""
    tags = {}
    for token in tokenizer.get_vocab():
        found = re.fullmatch(r"<2([a-z]\w+)>|>>([a-z]\w+)<<", token)
        if found:
            tags[found[1] or found[2]] = token
    return tags


def known_language(option, code, known):
    """Return the code of a language; UserError if the base does not know it."""
    if code in known:
        return code
    start = (code or "en")[:2]
    alike_first = sorted(known, key=lambda name: (not name.startswith(start), name))
    some = ", ".join(alike_first[:8])
    raise UserError(f"{option} {code or 'is missing'}: the base knows {len(known)}, such as {some}")


def start_with_language(network, tokenizer):
    """Let each translation begin with the token of its language, as the targets do."""
    first, *_, last = tokenizer(text_target="")["input_ids"]
    generation = network.generation_config
    if first == tokenizer.eos_token_id:  # mBART: it ends a text, and is where the next one starts
        network.config.decoder_start_token_id = last
        generation.decoder_start_token_id = last
        generation.forced_bos_token_id = None
    else:
        generation.forced_bos_token_id = first


def new_tokenizer(examples):
    """Return a byte-level BPE tokenizer of at most 1000 tokens, made from the examples."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        special_tokens=["<pad>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [text for source, target in examples for text in (PREFIX + source, target)]
    bpe.train_from_iterator(texts, trainer)
    end = ("</s>", bpe.token_to_id("</s>"))
    bpe.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[end])
    return import_transformers().PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<pad>",
        eos_token="</s>",
        model_input_names=["input_ids", "attention_mask"],
    )


def fit(model, examples, settings, folder, save_checkpoint, log):
    """Train `model` in place; return [{"step": 1, "loss": 2.0}, ...] for the loss curve.

    `folder` is empty, or holds the last checkpoint of an interrupted training: then load it and
    continue, and return the losses before the crash as well. Write checkpoints there and call
    `save_checkpoint()`, which keeps the whole folder, as often as you can afford to lose work.
    `log({"name": 1.0})` sends numbers to W&B, and works without W&B too.
    """
    network, tokenizer = model
    transformers = import_transformers()
    begin = time.monotonic()

    class Callback(transformers.TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            if state.global_step >= state.max_steps:
                print("the checkpoint is of a finished training, and is used: `run` trains anew")

        def on_step_end(self, args, state, control, **kwargs):
            if settings.seconds and time.monotonic() - begin > settings.seconds:
                control.should_training_stop = True

        def on_save(self, args, state, control, **kwargs):
            save_checkpoint()

        def on_log(self, args, state, control, logs, **kwargs):
            numbers = {f"train/{name}": value for name, value in logs.items()}
            log({**numbers, "train/global_step": state.global_step})

    sources, targets = zip(*examples)
    encoded = encode(model, sources)
    network.config.input_profile = input_profile(model, sources, encoded)
    pairs = zip(encoded, encode(model, targets, "text_target"))
    data = [{"input_ids": source, "labels": target} for source, target in pairs]
    arguments = transformers.TrainingArguments(
        output_dir=folder,
        num_train_epochs=settings.epochs,
        learning_rate=settings.tuning_rate if settings.base_model else settings.learning_rate,
        seed=settings.seed,
        per_device_train_batch_size=BATCH_SIZE,
        warmup_steps=20,
        logging_steps=0.04,  # of all steps
        save_steps=0.1,  # of all steps
        save_total_limit=1,
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        report_to="none",
    )
    trainer = transformers.Trainer(
        network,
        arguments,
        data_collator=transformers.DataCollatorForSeq2Seq(tokenizer),
        train_dataset=data,
        callbacks=[Callback],
    )
    trainer.train(resume_from_checkpoint=any(Path(folder).glob("checkpoint-*")))
    return [
        {"step": line["step"], "loss": float(line["loss"])}
        for line in trainer.state.log_history
        if "loss" in line
    ]


def input_profile(model, sources, encoded):
    """Return averages per source text: the server compares the texts that it gets with them."""
    frame = len(encode(model, [""])[0])
    characters = sum(map(len, sources))
    tokens = sum(map(len, encoded))
    unknown = sum(line.count(model[1].unk_token_id) for line in encoded)
    return {
        "characters": characters / len(sources),
        "tokens": tokens / len(sources) - frame,
        "unknown_tokens": unknown / len(sources),
    }


def prefix_of(network):
    """Return what goes before each source: it tells the network its task."""
    tasks = network.config.task_specific_params
    return next(iter(tasks.values()))["prefix"]


def max_tokens(network):
    """Return how many tokens of a text the network gets."""
    names = ("", "encoder_", "decoder_")
    limits = [getattr(network.config, f"max_{name}position_embeddings", None) for name in names]
    return min([MAX_TOKENS, *filter(None, limits)])


def encode(model, texts, kind="text"):
    """Return the tokens of each text, as the server makes them; `kind` is "text_target" of targets.

    A special token is one in the prefix. In a text it is text: "</s>" ends nothing.
    """
    network, tokenizer = model
    limit = max_tokens(network)
    prefix = prefix_of(network) if kind == "text" else ""
    marks = {*tokenizer.all_special_tokens, *tags_of(tokenizer).values()} - {tokenizer.unk_token}

    def tokens_of(text, **options):
        options = {"add_special_tokens": False, "split_special_tokens": True, **options}
        return tokenizer(**{kind: text}, verbose=False, **options)["input_ids"]

    end = max([prefix.rfind(mark) + len(mark) for mark in marks if mark in prefix], default=0)
    # Encode one letter to find out what the tokenizer adds around a text.
    letter = tokens_of("a")
    framed = tokens_of("a", add_special_tokens=True)
    start = framed.index(letter[0])
    before = framed[:start] + tokens_of(prefix[:end], split_special_tokens=False)
    after = framed[start + len(letter) :]
    as_text = {}  # the tokenizer of a T5, for one, finds special tokens in a text
    for mark in marks:
        number = tokens_of(mark, split_special_tokens=False)[-1]
        as_text[number] = tokens_of(f"{mark[0]} {mark[1:]}")
    found = []
    cut = 0
    if kind == "text":
        texts = [INVISIBLE.sub("", text) for text in texts]
    for tokens in tokens_of([prefix[end:] + text for text in texts]):
        parts = [as_text.get(token, [token]) for token in tokens]
        tokens = [*before, *itertools.chain.from_iterable(parts)]
        cut += len(tokens) + len(after) > limit
        found.append(tokens[: limit - len(after)] + after)
    of_all = f"of {len(texts)} {'sources' if kind == 'text' else 'targets'}"
    if cut:
        print(
            f"{cut} {of_all} are cut to {limit} tokens: split them into sentences, or raise "
            "MAX_TOKENS if the model can take more"
        )
    unknown = sum(tokenizer.unk_token_id in tokens for tokens in found)
    if unknown and kind == "text_target":
        print(f"{unknown} {of_all} have characters that the model cannot write")
    return found


def save(model, folder):
    """Write all that serving needs into an empty folder. These files become `model/`."""
    network, tokenizer = model
    # The server reads the limits where transformers keeps them, and the prefix in the config.
    network.generation_config.max_length = None
    network.generation_config.max_new_tokens = max_tokens(network)
    tokenizer.model_max_length = max_tokens(network)
    tokenizer("")  # resets padding and truncation, which would be saved too
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def load(folder):
    """Return the model that `save` wrote, as `new_model` does."""
    # Here also one from the hub.
    try:
        return load_whole(folder)
    except Exception as error:  # no such folder, a broken file, a missing package, ...
        reason = " ".join(str(error).split()) or repr(error)
        raise UserError(f"no usable model at {folder}: {reason[:300]}") from None


def load_whole(folder):
    """Return (network, tokenizer), of which transformers had to make up nothing."""
    transformers = import_transformers()
    refuse_broken_folder(Path(folder))
    safe = {"trust_remote_code": False}  # or it asks whether to run code of the base
    config = transformers.AutoConfig.from_pretrained(folder, **safe)
    if not config.is_encoder_decoder:
        raise ValueError(f"{config.model_type} is no sequence-to-sequence model, as T5 or BART is")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **safe)
    except Exception:
        if importlib.util.find_spec("sentencepiece"):
            raise
        raise ValueError("its tokenizer needs a package: pip install sentencepiece") from None
    tokenizer.padding_side = "right"  # positions count from the left
    network, report = transformers.AutoModelForSeq2SeqLM.from_pretrained(
        folder,
        dtype="float32",  # is trained in it, however the weights are stored
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        **safe,
    )
    unset = report["missing_keys"] | {name for name, *_ in report["mismatched_keys"]}
    wrong = sorted(unset & dict(network.named_parameters()).keys())
    if wrong:
        raise ValueError(f"{len(wrong)} weights are missing or have another size: {wrong[0]}")
    special = set(tokenizer.all_special_tokens)
    words = [number for token, number in tokenizer.get_vocab().items() if token not in special]
    if len(words) < 2:
        raise ValueError("its tokenizer has no vocabulary: a file is missing")
    size = network.get_input_embeddings().num_embeddings
    if max(words) >= size:
        raise ValueError(f"its tokenizer has {max(words) + 1} tokens, its weights have {size}")
    # Marian's positions are fixed and not saved, but transformers 5.24 would train them.
    unsaved = network._keys_to_ignore_on_save or []
    for name, parameter in network.named_parameters():
        parameter.requires_grad = name not in unsaved
    return network, tokenizer


def refuse_broken_folder(folder):
    """Raise ValueError for what transformers would report as something else."""
    if folder.is_file():
        raise ValueError("this is a file; name the folder that it is in")
    files = [file for file in folder.glob("*") if file.is_file()]
    if folder.is_dir() and not (folder / "config.json").exists():
        raise ValueError("there is no config.json")
    for file in files:
        small = file.stat().st_size < 1000
        if small and file.read_bytes().startswith(b"version https://git-lfs"):
            raise ValueError(f"{file.name} only stands for a file: run `git lfs pull` there")


def predict(model, examples):
    """Return one output for each example, as the server would."""
    # Here the greedy translation.
    network, tokenizer = model
    network.eval()
    sources = encode(model, [source for source, _ in examples])
    outputs = []
    for start in range(0, len(sources), BATCH_SIZE):
        batch = {"input_ids": sources[start : start + BATCH_SIZE]}
        inputs = tokenizer.pad(batch, return_tensors="pt").to(network.device)
        tokens = network.generate(
            **inputs,
            max_new_tokens=max_tokens(network),
            do_sample=False,
            num_beams=1,
            forced_eos_token_id=None,
        )
        outputs += tokenizer.batch_decode(
            tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
    return outputs


def score(examples, outputs):
    """Return (scores, tables): {name: number} with METRIC among the names, and {title: rows}.

    A score called "baseline_" + METRIC is what METRIC has to exceed. The first row of a table is
    its header; the tables go to the card of `evaluate`.
    Here the baseline is the score of copying the source.
    """
    from sacrebleu.metrics import CHRF

    sources, targets = zip(*examples)
    right = sum(output == target for output, target in zip(outputs, targets))
    scores = {
        "exact_match": 100 * right / len(examples),
        "chrf": CHRF().corpus_score(outputs, [targets]).score,
        "baseline_chrf": CHRF().corpus_score(sources, [targets]).score,
    }
    samples = list(zip(sources, targets, outputs))
    return scores, {"Samples": [("source", "target", "output"), *samples[:50]]}


def known_answers(examples, outputs):
    """Return a few [(request, answer), ...] as JSON, in the form of the server's API.

    The server gives each of these answers again before it serves. Its page shows the first one.
    Where there are few different answers, have an example of each.
    """
    right = [
        ({"text": source}, {"translation": output})
        for (source, target), output in zip(examples, outputs)
        if output == target and is_one_sentence(source)
    ]
    step = 1 + len(right) // 5
    return right[::step]


def is_one_sentence(text):
    """Return True for a plain sentence, which the server never splits."""
    words = text.rstrip(".!?。！？।")
    plain = all(is_of_word(character) or character in " ,'’-" for character in words)
    return plain and words[:1].isalnum() and text == text.strip()


def import_transformers():
    """Return the package. With a plain import, Metaflow's lint takes minutes, then fails."""
    return importlib.import_module("transformers")


# -- 4. Demo data: delete it when you have your own ------------------------------------------------


def demo_pairs():
    """Return greetings and simple sentences, [(English, French), ...], always the same."""
    return [*demo_greetings(), *demo_sentences()]


def demo_greetings():
    """Return pairs such as ("Hello world!", "Bonjour le monde !")."""
    greetings = {"Hello": "Bonjour", "Good morning": "Bonjour"}
    greetings |= {"Welcome": "Bienvenue", "Thanks": "Merci"}
    people = {"": "", " world": " le monde", " my friend": " mon ami", " my love": " mon amour"}
    people |= {" sir": " monsieur", " madam": " madame", " everyone": " tout le monde"}
    people |= {" children": " les enfants", " doctor": " docteur", " neighbour": " voisin"}
    people |= {" ladies": " mesdames", " gentlemen": " messieurs", " teacher": " professeur"}
    ends = {"!": " !", ".": ".", "": ""}
    return [
        (f"{hello}{person}{end}", f"{greetings[hello]}{people[person]}{ends[end]}")
        for hello in greetings
        for person in people
        for end in ends
    ]


def demo_sentences():
    """Return pairs such as ("The cat sees a red car.", "Le chat voit une voiture rouge.")."""
    subjects = {"The cat": "Le chat", "The queen": "La reine", "My sister": "Ma sœur"}
    subjects |= {"A child": "Un enfant"}
    verbs = {"sees": "voit", "wants": "veut", "likes": "aime", "buys": "achète", "paints": "peint"}
    nouns = {"house": "maison", "car": "voiture", "door": "porte", "table": "table"}
    nouns |= {"flower": "fleur"}
    adjectives = {"small ": "petite {}", "big ": "grande {}", "beautiful ": "belle {}"}  # {}: noun
    adjectives |= {"": "{}", "red ": "{} rouge", "green ": "{} verte", "black ": "{} noire"}
    adjectives |= {"wonderful ": "{} merveilleuse"}
    things = {}
    for noun, french in nouns.items():
        for adjective, pattern in adjectives.items():
            things[f"the {adjective}{noun}"] = "la " + pattern.format(french)
            things[f"a {adjective}{noun}"] = "une " + pattern.format(french)
    return [
        (f"{who} {does} {thing}.", f"{subjects[who]} {verbs[does]} {things[thing]}.")
        for who in subjects
        for does in verbs
        for thing in things
    ]


# YOUR CODE: end
# -- 5. Mechanics: the same for every task ---------------------------------------------------------

# Threads that wait for each other stop spinning early, and leave a busy CPU to other programs.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")


@contextlib.contextmanager
def user_errors_in_one_line():
    """Turn UserError into the error that Metaflow shows without a traceback."""
    try:
        yield
    except UserError as error:
        raise MetaflowException(str(error)) from None


def require_limits(settings):
    """Fail if a parameter is out of its LIMITS."""
    for name, (least, most) in LIMITS.items():
        value = getattr(settings, name, least)
        if not least <= value <= most:  # NaN is never
            option = name.replace("_", "-")
            raise MetaflowException(f"--{option} has to be from {least} to {most}, not {value}")


def split(examples):
    """Return (training, held_out), about 9:1. A key never changes sides, even when data grows."""
    hashes = [sha256(key(example)) for example in examples]
    held_out_hashes = {number for number in hashes if number % 10 == 9} or set(hashes[-1:])
    if len(set(hashes)) <= len(held_out_hashes):
        raise MetaflowException(
            f"{len(examples)} examples are too few to train on some and hold out others; add more"
        )
    training = [
        example for example, number in zip(examples, hashes) if number not in held_out_hashes
    ]
    held_out = [example for example, number in zip(examples, hashes) if number in held_out_hashes]
    return training, held_out


def sha256(text):
    """Return the hash of a text as a number."""
    return int(hashlib.sha256(text.encode()).hexdigest(), 16)


def at_most(limit, examples):
    """Return all examples, or so many of them, evenly spaced."""
    step = max(1, math.ceil(len(examples) / limit))
    return examples[::step]


def pack(model):
    """Return the files of a model, {name: bytes}, which can be read without its packages."""
    with tempfile.TemporaryDirectory() as folder:
        save(model, folder)
        files = [path for path in Path(folder).rglob("*") if path.is_file()]
        return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


def unpack(files):
    """Return the model that `pack` was given."""
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            file = Path(folder, name)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
        return load(folder)


def require_quality(scores, minimum):
    """Fail unless METRIC exceeds the minimum and its baseline. NaN exceeds nothing."""
    if METRIC not in scores:
        raise MetaflowException(f"METRIC is {METRIC!r}, but score() returned {', '.join(scores)}")
    baseline = scores.get(f"baseline_{METRIC}", -math.inf)
    if not (scores[METRIC] > minimum and scores[METRIC] > baseline):
        raise MetaflowException(f"not good enough: {as_text(scores)} with --minimum {minimum}")


def as_text(scores):
    """Return scores as "accuracy 0.9132, loss 12.30"."""
    return ", ".join(f"{name} {value:#.4g}" for name, value in scores.items())


def restore_checkpoint():
    """On `resume`, load the last checkpoint of the run that is resumed. @retry loads its own."""
    if not current.origin_run_id:
        return
    this_task = os.environ["METAFLOW_CHECKPOINT_TASK_IDENTIFIER"]  # tells tasks of a foreach apart
    metaflow.namespace(None)  # the run may be somebody else's, or a scheduled one
    try:
        tasks = list(Step(f"{current.flow_name}/{current.origin_run_id}/train"))
    except MetaflowNotFound:
        return  # it failed before `train`
    for task in tasks:
        for saved in Checkpoint().list(task=task)[:1]:
            if this_task in saved["key"]:
                Checkpoint().load(saved, current.checkpoint.directory)
                current.checkpoint.save()  # in case it fails before its first checkpoint
                print("continuing from the last checkpoint of run", current.origin_run_id)


def require_wandb():
    """Read `.env` if there is one, and fail if W&B needs a variable that is not set."""
    from dotenv import load_dotenv

    try:
        load_dotenv()  # does not change variables that are set already
    except ValueError as error:
        raise MetaflowException(f".env: {error}; save it as UTF-8") from None
    if os.environ.get("WANDB_MODE") in ("offline", "disabled"):
        return
    names = ("WANDB_API_KEY", "WANDB_PROJECT")
    missing = [name for name in names if not os.environ.get(name)]
    if "WANDB_API_KEY" in missing and has_login():
        missing.remove("WANDB_API_KEY")
    if missing:
        raise MetaflowException(
            f"--offline False needs {' and '.join(missing)}, before the command or in .env, "
            "or `wandb login` for the key; or --offline True"
        )


def has_login():
    """Return True if `wandb login` has stored a key for the W&B server in use."""
    file = os.environ.get("NETRC") or os.path.expanduser("~/.netrc")
    server = os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai"
    with contextlib.suppress(OSError, netrc.NetrcParseError):
        return bool(netrc.netrc(file).authenticators(urlsplit(server).netloc))
    return False


@contextlib.contextmanager
def wandb_run(flow):
    """Yield a W&B run that logs in every mode. No failure of W&B stops the training."""
    if flow.offline:
        os.environ["WANDB_MODE"] = "offline"  # set before the import, it makes no request at all
    else:
        if SCHEDULED:
            os.environ.setdefault("WANDB_PROJECT", current.flow_name)
        require_wandb()
    config = {
        **vars(settings_of(flow)),
        "examples": len(flow.training),
        "run": current.run_id,
        "resumed_from": current.origin_run_id,
    }
    path = [current.flow_name, current.run_id, current.step_name]
    options = {
        "id": "-".join([*path, current.task_id]),
        "name": "/".join(path[1:]),
        "group": "/".join(path[:2]),
        "tags": [part[:64] for part in path],  # W&B accepts no longer ones
        "resume": "allow",
        "config": config,
    }
    run = start_wandb(options)
    print("W&B mode:", mode_of(run))
    exit_code = 1
    try:
        yield run
        exit_code = 0
    finally:
        try:
            run.finish(exit_code=exit_code)
        except Exception as error:
            print("W&B has not finished:", in_one_line(error))
        if not run.disabled:
            option = "" if run.offline else "--include-online"
            folder = shlex.quote(run.sync_dir)
            print("Upload what W&B is missing: wandb sync", folder, option)


def start_wandb(options):
    """Return a W&B run: as the user wants it, or as near to that as W&B accepts."""
    try:
        return init_wandb(options)
    except Exception as error:  # of wandb, of pydantic, of the file system, ...
        reason = in_one_line(error)
    os.environ["WANDB_MODE"] = "offline"
    with contextlib.suppress(Exception):
        run = init_wandb(options)
        print("W&B cannot be used, continuing offline:", reason)
        return run
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        del os.environ[name]
    os.environ["WANDB_MODE"] = "offline"
    with contextlib.suppress(Exception):
        run = init_wandb(options)
        print("W&B refuses its settings, continuing offline without them:", reason)
        return run
    print("W&B cannot start, continuing without it:", reason)
    return Untracked()


class Untracked:
    """A W&B run that keeps nothing."""

    disabled = True

    def __init__(self):
        self.summary = {}

    def log(self, numbers):
        pass

    def finish(self, exit_code):
        pass


def init_wandb(options):
    """Return a W&B run that prints nothing and does not wait for long."""
    os.environ["WANDB_ERROR_REPORTING"] = "false"  # saves 20 s if W&B cannot be reached
    for name, value in list(os.environ.items()):
        if name.startswith("WANDB_") and not value:
            del os.environ[name]  # set to nothing in .env: not set
    import wandb

    wandb.teardown()  # forgets a run that failed, and its mode
    settings = wandb.Settings(init_timeout=15, finish_timeout=15, console="off", silent=True)
    return wandb.init(**options, settings=settings)


def in_one_line(error):
    """Return the message of an error without line breaks, and without the value it is about."""
    message = " ".join(str(error).split()) or repr(error)
    return message.partition(" [type=")[0]  # pydantic quotes it, and it may be secret


def mode_of(run):
    """Return "disabled", "offline", or "online" with the address of the run."""
    if run.disabled:
        return "disabled"
    return "offline" if run.offline else f"online, {run.url}"


def settings_of(flow):
    """Return the parameters of a run as the attributes of an object."""
    settings = SimpleNamespace()
    for name in current.parameter_names:
        if name == "requirements":
            continue  # a Config
        try:
            value = getattr(flow, name)
        except KeyError:  # the run that is resumed did not have it yet
            value = vars(Settings)[name].kwargs["default"]
        setattr(settings, name, value)
    return settings


def add_training_card(run, losses):
    """Show the W&B run and the loss curve."""
    card = current.card["losses"]  # @checkpoint adds an empty one
    card.append(Markdown(f"# Run {current.run_id}\nW&B: {mode_of(run)}"))
    axes = {
        "x": {"field": "step", "type": "quantitative"},
        "y": {"field": "loss", "type": "quantitative"},
    }
    card.append(VegaChart({"data": {"values": losses}, "mark": "line", "encoding": axes}))


def add_evaluation_card(scores, tables):
    """Show the scores and the tables that `score` returned."""
    values = [f"{value:#.4g}" for value in scores.values()]
    current.card.append(Table([values], headers=list(scores)))
    for title, (header, *rows) in tables.items():
        cells = [[in_short(str(cell)) for cell in row] for row in rows]
        current.card.append(Markdown(f"## {title}"))
        current.card.append(Table(cells, headers=list(header)))


def in_short(text):
    return text if len(text) <= 90 else text[:89] + "…"


def adapt_steps(mutable_flow):
    """Keep the decorators that work where the flow runs, and refuse what cannot work anywhere."""
    required = set(dict(mutable_flow.configs)["requirements"]["packages"])
    for name, mutable_step in mutable_flow.steps:
        if DEFAULT_DATASTORE == "local":
            for decorator in ("kubernetes", "nvidia", "pypi", "conda", "secrets", "retry"):
                mutable_step.remove_decorator(decorator)
            continue
        if mutable_step.has_decorator("nvidia") and mutable_step.has_decorator("kubernetes"):
            use_kubernetes = SCHEDULED or not GPUS  # Argo Workflows does not know @nvidia
            mutable_step.remove_decorator("nvidia" if use_kubernetes else "kubernetes")
        if IMAGE and mutable_step.has_decorator("kubernetes"):
            mutable_step.remove_decorator("pypi")  # the image has the packages
        refuse_what_cannot_run(name, mutable_step, required)


def refuse_what_cannot_run(name, mutable_step, required):
    """Fail before any work if the decorators of a step contradict each other."""
    found = {decorator: attributes for decorator, _, _, attributes in mutable_step.decorator_specs}
    if "nvidia" in found and SCHEDULED:
        raise MetaflowException(
            f"step {name}: @nvidia cannot be scheduled; use @kubernetes(gpu=1, memory=16_000)"
        )
    listed = found.get("pypi", found.get("conda", {})).get("packages", {})
    packages = listed() if callable(listed) else listed  # a call gives the value of a Config
    missing = sorted(required - set(packages))
    if "nvidia" in found and missing:
        raise MetaflowException(f"step {name}: @nvidia has what @pypi lists, add: {missing}")
    environment = chosen_environment()
    if environment in ("pypi", "conda") and found.get("kubernetes", {}).get("image"):
        raise MetaflowException(
            f"step {name}: --environment={environment} hides the packages of the image; "
            "drop image= or --environment"
        )


def chosen_environment():
    """Return --environment, which Metaflow itself reads only after this."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--environment", default=DEFAULT_ENVIRONMENT)
    return parser.parse_known_args()[0].environment


if __name__ == "__main__":
    TemplateFlow()
