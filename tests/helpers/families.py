"""Tiny sequence-to-sequence models with random weights, in the files in which each family comes.

`make(name, folder, texts)` writes one: the vocabulary is trained on the texts, and the tokenizer
files are those of the published models (spiece.model, source.spm, ...), not tokenizer.json.
"""

import json
from types import SimpleNamespace
from typing import NamedTuple

import sentencepiece
import tokenizers
import transformers
from transformers.models.m2m_100.tokenization_m2m_100 import FAIRSEQ_LANGUAGE_CODES

SMALL: dict[str, object] = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "dropout": 0.0,
    "max_position_embeddings": 512,
}
SMALL_T5: dict[str, object] = {
    "d_model": 32,
    "d_kv": 16,
    "d_ff": 64,
    "num_layers": 1,
    "num_heads": 2,
}
SMALL_T5 |= {"dropout_rate": 0.0, "decoder_start_token_id": 0}
GATED: dict[str, object] = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}


class Family(NamedTuple):
    model: str  # classes of transformers
    tokenizer: str
    config: dict  # what is special about its size and its tokens
    languages: tuple = ("", "")  # --source-language and --target-language
    prefix: str = ""  # what MADLAD calls a target language


FAMILIES = {
    "T5 v1.0": Family("T5ForConditionalGeneration", "T5Tokenizer", SMALL_T5),
    "T5 v1.1": Family("T5ForConditionalGeneration", "T5Tokenizer", {**SMALL_T5, **GATED}),
    "mT5": Family("MT5ForConditionalGeneration", "T5Tokenizer", {**SMALL_T5, **GATED}),
    "MADLAD": Family(
        "T5ForConditionalGeneration", "T5Tokenizer", {**SMALL_T5, **GATED}, ("", "fr"), "<2fr> "
    ),
    "BART": Family("BartForConditionalGeneration", "BartTokenizer", SMALL),
    "mBART": Family("MBartForConditionalGeneration", "MBartTokenizer", SMALL, ("en_XX", "fr_XX")),
    "mBART-50": Family(
        "MBartForConditionalGeneration", "MBart50Tokenizer", SMALL, ("en_XX", "fr_XX")
    ),
    "Marian": Family("MarianMTModel", "MarianTokenizer", SMALL),
    "Marian, multilingual": Family("MarianMTModel", "MarianTokenizer", SMALL, ("", "fra")),
    "Marian, two vocabularies": Family(
        "MarianMTModel", "MarianTokenizer", {**SMALL, "share_encoder_decoder_embeddings": False}
    ),
    "M2M100": Family("M2M100ForConditionalGeneration", "M2M100Tokenizer", SMALL, ("en", "fr")),
    "NLLB": Family(
        "M2M100ForConditionalGeneration", "NllbTokenizer", SMALL, ("eng_Latn", "fra_Latn")
    ),
    "PEGASUS": Family("PegasusForConditionalGeneration", "PegasusTokenizer", SMALL),
}


SPECIAL = {
    "M2M100": [f"__{code}__" for code in FAIRSEQ_LANGUAGE_CODES["m2m100"]],
    "NLLB": ["deu_Latn", "eng_Latn", "fra_Latn"],
}


def train_pieces(file, texts, vocab_size, **options):
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
    file.write_text(json.dumps({word: number for number, word in enumerate(dict.fromkeys(words))}))


def write_vocabulary(name, folder, sources, targets):
    """Write the files of the vocabulary, as the published models of the family have them."""
    texts = [*sources, *targets]
    if name == "BART":
        bpe = tokenizers.ByteLevelBPETokenizer()
        special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
        bpe.train_from_iterator(texts, 400, special_tokens=special, show_progress=False)
        bpe.save_model(str(folder))
    elif name.startswith("Marian"):
        ids = {"bos_id": -1, "eos_id": 0, "unk_id": 1}
        of_sources = train_pieces(folder / "source.spm", sources, 300, **ids)
        of_targets = train_pieces(folder / "target.spm", targets, 300, **ids)
        if "two" in name:
            write_numbers(folder / "vocab.json", [*of_sources, "<pad>"])
            write_numbers(folder / "target_vocab.json", [*of_targets[:9], "<pad>", *of_targets[9:]])
        else:
            tags = [">>fra<<", ">>deu<<"] if "multilingual" in name else []
            both = [*of_sources[:2], *tags, *of_sources, *of_targets, "<pad>"]
            write_numbers(folder / "vocab.json", both)
    elif name == "M2M100":
        pieces = train_pieces(folder / "sentencepiece.bpe.model", texts, 300, model_type="bpe")
        write_numbers(folder / "vocab.json", ["<s>", "<pad>", "</s>", "<unk>", *pieces])
    elif name == "NLLB":
        train_pieces(folder / "sentencepiece.bpe.model", texts, 300, model_type="bpe")
    elif "mBART" in name:
        train_pieces(folder / "sentencepiece.bpe.model", texts, 300)
    elif name == "PEGASUS":
        ids = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
        symbols = ["<mask_1>", "<mask_2>", *[f"<unk_{number}>" for number in range(2, 103)]]
        train_pieces(folder / "spiece.model", texts, 300, user_defined_symbols=symbols, **ids)
    else:
        ids = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
        symbols = ["<2fr>", "<2de>", "<2en>"] if name == "MADLAD" else []
        train_pieces(folder / "spiece.model", texts, 300, user_defined_symbols=symbols, **ids)


def make(name, folder, pairs, **changes):
    """Write a model of a family into an empty folder, with changes of its config."""
    family = FAMILIES[name]
    write_vocabulary(name, folder, *zip(*pairs))
    described = {"tokenizer_class": family.tokenizer, "model_max_length": 512}
    described["separate_vocabs"] = "two" in name
    if name in SPECIAL:
        described["extra_special_tokens"] = SPECIAL[name]
    (folder / "tokenizer_config.json").write_text(json.dumps(described))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model_class = getattr(transformers, family.model)
    special = {}
    if "Marian" in name:
        special = {"decoder_start_token_id": tokenizer.pad_token_id, "forced_eos_token_id": 0}
        special |= {"static_position_embeddings": True, "scale_embedding": True}
    elif family.config is SMALL and name != "PEGASUS":
        special = {"decoder_start_token_id": tokenizer.eos_token_id}
    elif name == "PEGASUS":
        special = {"decoder_start_token_id": tokenizer.pad_token_id}
    if name == "BART":
        special |= {"forced_bos_token_id": tokenizer.bos_token_id, "forced_eos_token_id": 2}
    config = model_class.config_class(
        **{**family.config, **changes},
        **special,
        vocab_size=len(tokenizer) + 108,  # M2M100 has a hundred languages above its vocabulary
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    transformers.set_seed(0)
    model_class(config).save_pretrained(folder)


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
