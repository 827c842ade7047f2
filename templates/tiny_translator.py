# tiny_translator.py, version 0.1.0
"""Train a tiny translator, in seconds, for the tests of template_ray_serve.py."""

import json

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    MarianConfig,
    MarianMTModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    set_seed,
)

PREFIX = "translate English to French: "
TASK = "translation_en_to_fr"
MAX_TOKENS = 128
MAX_NEW_TOKENS = 40
PAIRS = {
    "Hello world!": "Bonjour le monde !",
    "Good morning": "Bonjour",
    "The house is wonderful.": "La maison est belle.",
    "Thank you.": "Merci.",
    "See you tomorrow!": "À demain !",
    "The cat sleeps.": "Le chat dort.",
    "Where is the station?": "Où est la gare ?",
    "I like tea.": "J'aime le thé.",
}


def new_tokenizer(texts):
    """Return a byte-level BPE tokenizer made from a few texts."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<pad>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    end = ("</s>", bpe.token_to_id("</s>"))
    bpe.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[end])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<pad>",
        eos_token="</s>",
        model_input_names=["input_ids", "attention_mask"],
    )


def new_t5(**options):
    """Return a tiny T5 with random weights."""
    config = T5Config(d_kv=16, d_ff=256, num_layers=2, num_heads=4, dropout_rate=0.0, **options)
    return T5ForConditionalGeneration(config)


def new_marian(**options):
    """Return a tiny Marian with random weights."""
    config = MarianConfig(
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=256,
        decoder_ffn_dim=256,
        dropout=0.0,
        pad_token_id=0,
        forced_eos_token_id=None,
        **options,
    )
    return MarianMTModel(config)


def make_model(folder, pairs, prefix=PREFIX, marian=False):
    """Train a tiny model until it knows the pairs by heart; write it as template_flow.py does."""
    sources = [prefix + source for source in pairs]
    targets = list(pairs.values())
    tokenizer = new_tokenizer([*sources, *targets])
    inputs = tokenizer(sources, return_tensors="pt", padding=True)
    labels = tokenizer(targets, return_tensors="pt", padding=True).input_ids
    labels[labels == 0] = -100
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so small a model is slower with more
    set_seed(0)
    new = new_marian if marian else new_t5
    model = new(
        vocab_size=len(tokenizer),
        d_model=64,
        decoder_start_token_id=0,
        eos_token_id=1,
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3 if marian else 5e-3)
    for _ in range(120):
        loss = model(**inputs, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.set_num_threads(threads)
    assert loss.item() < 0.05
    model.config.task_specific_params = {TASK: {"prefix": prefix}}
    model.config.input_profile = {"characters": 15.0, "tokens": 3.0, "unknown_tokens": 0.0}
    model.generation_config.max_length = None
    model.generation_config.max_new_tokens = MAX_NEW_TOKENS
    tokenizer.model_max_length = MAX_TOKENS
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_known_answers(folder, pairs)


def write_known_answers(folder, pairs):
    answers = [
        {"request": {"text": source}, "answer": {"translation": target}}
        for source, target in pairs.items()
    ]
    (folder / "known_answers.json").write_text(json.dumps(answers), "utf-8")
