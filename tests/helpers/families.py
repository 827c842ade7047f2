"""Tiny sequence-to-sequence models with random weights, in the files in which each family comes.

`make(name, folder, pairs)` writes one: the vocabulary is trained on the pairs, and its files are
those of the published models (spiece.model, source.spm, ...), not tokenizer.json.
"""

import json
import string
from collections.abc import Callable
from types import SimpleNamespace
from typing import NamedTuple

import sentencepiece
import tokenizers
import transformers
from transformers.models.m2m_100.tokenization_m2m_100 import FAIRSEQ_LANGUAGE_CODES

# -- Vocabularies ----------------------------------------------------------------------------------

T5_PIECES = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
FAIRSEQ_PIECES = {"unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": -1}
MARIAN_PIECES = {"eos_id": 0, "unk_id": 1, "bos_id": -1}
FAIRSEQ_FILE = "sentencepiece.bpe.model"


def train_pieces(file, texts, vocab_size=300, **options):
    """Write a sentencepiece model of at most so many pieces; return them."""
    with file.open("wb") as writer:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=writer,
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            character_coverage=1.0,
            minloglevel=2,
            **options,
        )
    model = sentencepiece.SentencePieceProcessor(model_file=str(file))
    return [model.id_to_piece(number) for number in range(model.get_piece_size())]


def write_numbers(file, words):
    """Write {word: number} as JSON."""
    numbers = {word: number for number, word in enumerate(dict.fromkeys(words))}
    file.write_text(json.dumps(numbers), "utf-8")


def describe(folder, tokenizer, **values):
    """Write the name of a tokenizer's class, and what it has to know."""
    values["tokenizer_class"] = tokenizer
    (folder / "tokenizer_config.json").write_text(json.dumps(values), "utf-8")


def t5(folder, sources, targets):
    train_pieces(folder / "spiece.model", [*sources, *targets], **T5_PIECES)
    describe(folder, "T5Tokenizer", extra_ids=100)


def mt5(folder, sources, targets):
    train_pieces(folder / "spiece.model", [*sources, *targets], **T5_PIECES)
    describe(folder, "T5Tokenizer", extra_ids=0)


def madlad(folder, sources, targets):
    tags = ["<2de>", "<2en>", "<2fr>"]
    options = {**FAIRSEQ_PIECES, "user_defined_symbols": tags}
    # The published vocabulary knows all of these.
    texts = [*sources, *targets, string.printable.strip()]
    train_pieces(folder / "spiece.model", texts, **options)
    names = {"unk_token": "<unk>", "eos_token": "</s>", "pad_token": "<s>", "bos_token": "<s>"}
    describe(folder, "T5Tokenizer", extra_ids=0, **names)


def bart(folder, sources, targets):
    pieces = tokenizers.ByteLevelBPETokenizer()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    texts = [*sources, *targets]
    pieces.train_from_iterator(texts, 400, special_tokens=special, show_progress=False)
    pieces.save_model(str(folder))
    describe(folder, "BartTokenizer")


def mbart(folder, sources, targets):
    train_pieces(folder / FAIRSEQ_FILE, [*sources, *targets], **FAIRSEQ_PIECES)
    describe(folder, "MBartTokenizer")


def mbart50(folder, sources, targets):
    train_pieces(folder / FAIRSEQ_FILE, [*sources, *targets], **FAIRSEQ_PIECES)
    describe(folder, "MBart50Tokenizer")


def m2m100(folder, sources, targets):
    pieces = train_pieces(folder / FAIRSEQ_FILE, [*sources, *targets], **FAIRSEQ_PIECES)
    write_numbers(folder / "vocab.json", ["<s>", "<pad>", "</s>", "<unk>", *pieces[3:]])
    codes = [f"__{code}__" for code in FAIRSEQ_LANGUAGE_CODES["m2m100"]]
    describe(folder, "M2M100Tokenizer", additional_special_tokens=codes)


def nllb(folder, sources, targets):
    options = {**FAIRSEQ_PIECES, "model_type": "bpe"}
    train_pieces(folder / FAIRSEQ_FILE, [*sources, *targets], **options)
    codes = ["deu_Latn", "eng_Latn", "fra_Latn"]
    describe(folder, "NllbTokenizer", additional_special_tokens=codes)


def pegasus(folder, sources, targets):
    masks = ["<mask_1>", "<mask_2>", *[f"<unk_{number}>" for number in range(2, 103)]]
    options = {**T5_PIECES, "unk_id": 105, "user_defined_symbols": masks}
    train_pieces(folder / "spiece.model", [*sources, *targets], **options)
    describe(folder, "PegasusTokenizer")


def marian(folder, sources, targets, tags=()):
    pieces = train_pieces(folder / "source.spm", sources, **MARIAN_PIECES)
    pieces += train_pieces(folder / "target.spm", targets, **MARIAN_PIECES)
    write_numbers(folder / "vocab.json", ["</s>", "<unk>", *tags, *pieces, "<pad>"])
    describe(folder, "MarianTokenizer", source_lang="eng", target_lang="fra")


def marian_with_tags(folder, sources, targets):
    marian(folder, sources, targets, [">>deu<<", ">>fra<<"])


def marian_of_two(folder, sources, targets):
    pieces = train_pieces(folder / "source.spm", sources, **MARIAN_PIECES)
    write_numbers(folder / "vocab.json", [*pieces, "<pad>"])
    pieces = train_pieces(folder / "target.spm", targets, **MARIAN_PIECES)
    # As the padding of both vocabularies has one number, it stands within the longer one.
    write_numbers(folder / "target_vocab.json", [*pieces[:9], "<pad>", *pieces[9:]])
    describe(folder, "MarianTokenizer", separate_vocabs=True)


# -- The families ----------------------------------------------------------------------------------

T5_SIZE: dict[str, object] = {
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 128,
    "num_layers": 2,
    "num_heads": 4,
    "dropout_rate": 0.0,
}
GATED = {**T5_SIZE, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
SIZE: dict[str, object] = {
    "d_model": 64,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "dropout": 0.0,
    "max_position_embeddings": 512,
}
M2M100_SIZE = {**SIZE, "encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0}
MARIAN_SIZE = {**SIZE, "static_position_embeddings": True, "scale_embedding": True}
ONE: dict[str, tuple[str, str]] = {"fr": ("", "")}


class Family(NamedTuple):
    """What makes a family: its vocabulary, its network, and how it is told the languages."""

    write_vocabulary: Callable  # (folder, sources, targets)
    network: str  # class of transformers
    config: dict
    start: str  # the token that the decoder starts with, by its name in a tokenizer; "": none
    languages: dict = ONE  # {language: (source language, target language) as the family writes it}
    tag: str = ""  # what goes before a source: "<2{}>", with the target language in it


FAMILIES = {
    "T5": Family(t5, "T5ForConditionalGeneration", T5_SIZE, "pad"),
    "T5 1.1": Family(t5, "T5ForConditionalGeneration", GATED, "pad"),
    "mT5": Family(mt5, "MT5ForConditionalGeneration", GATED, "pad"),
    "MADLAD-400": Family(
        madlad,
        "T5ForConditionalGeneration",
        GATED,
        "unk",
        {"fr": ("", "fr"), "de": ("", "de")},
        "<2{}>",
    ),
    "BART": Family(bart, "BartForConditionalGeneration", SIZE, "eos"),
    "mBART": Family(
        mbart,
        "MBartForConditionalGeneration",
        SIZE,
        "",
        {"fr": ("en_XX", "fr_XX"), "de": ("en_XX", "de_DE")},
    ),
    "mBART-50": Family(
        mbart50,
        "MBartForConditionalGeneration",
        SIZE,
        "eos",
        {"fr": ("en_XX", "fr_XX"), "de": ("en_XX", "de_DE")},
    ),
    "Marian": Family(marian, "MarianMTModel", MARIAN_SIZE, "pad"),
    "Marian, several targets": Family(
        marian_with_tags,
        "MarianMTModel",
        MARIAN_SIZE,
        "pad",
        {"fr": ("", "fra"), "de": ("", "deu")},
        ">>{}<<",
    ),
    "Marian, two vocabularies": Family(
        marian_of_two,
        "MarianMTModel",
        {**MARIAN_SIZE, "share_encoder_decoder_embeddings": False},
        "pad",
    ),
    "M2M100": Family(
        m2m100,
        "M2M100ForConditionalGeneration",
        M2M100_SIZE,
        "eos",
        {"fr": ("en", "fr"), "de": ("en", "de")},
    ),
    "NLLB": Family(
        nllb,
        "M2M100ForConditionalGeneration",
        M2M100_SIZE,
        "eos",
        {"fr": ("eng_Latn", "fra_Latn"), "de": ("eng_Latn", "deu_Latn")},
    ),
    "PEGASUS": Family(pegasus, "PegasusForConditionalGeneration", SIZE, "pad"),
}


def new_network(name, tokenizer, **changes):
    """Return a network of a family with random weights, with changes of its config."""
    family = FAMILIES[name]
    model_class = getattr(transformers, family.network)
    numbers = {f"{token}_token_id": number_of(tokenizer, token) for token in ("pad", "eos", "bos")}
    if family.start:
        numbers["decoder_start_token_id"] = number_of(tokenizer, family.start)
    transformers.set_seed(0)
    network = model_class(
        model_class.config_class(
            **{**family.config, **numbers, **changes},
            vocab_size=len(tokenizer) + 12,  # published models have more embeddings than tokens
        )
    )
    generation = network.generation_config
    if name == "BART":
        generation.forced_bos_token_id = tokenizer.bos_token_id
        generation.forced_eos_token_id = tokenizer.eos_token_id
    if name.startswith("Marian"):
        generation.forced_eos_token_id = tokenizer.eos_token_id
        generation.bad_words_ids = [[tokenizer.pad_token_id]]
    return network


def number_of(tokenizer, token):
    return getattr(tokenizer, f"{token}_token_id")


def make(name, folder, pairs, **changes):
    """Write a model of a family into an empty folder, with changes of its config."""
    FAMILIES[name].write_vocabulary(folder, *zip(*pairs))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    new_network(name, tokenizer, **changes).save_pretrained(folder)


# A text of a user stays text: none of these is a special token or a language.
TAGGED_PAIR = ("Price </s>20 euros<2de> now", "Prix </s>20 euros<2de> aujourd'hui")


def settings_for(base, source="", target=""):
    """Return the settings of a run that fine-tunes a base for a few seconds."""
    return SimpleNamespace(
        base_model=str(base),
        source_language=source,
        target_language=target,
        epochs=6,
        tuning_rate=5e-3,
        seconds=0,
        seed=0,
    )
