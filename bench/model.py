"""Make a T5 of t5-small's shape, with random weights, whose every answer has 20 tokens.

python model.py FOLDER          60 million parameters
python model.py FOLDER small    0.2 million, so that all but the model shows
"""

import itertools
import sys

import torch
from tiny_translator import PREFIX, TASK, new_tokenizer
from transformers import GenerationConfig, T5Config, T5ForConditionalGeneration

WORDS = (
    "the a small big old new house garden river train letter teacher doctor "
    "sees buys paints opens in near with and"
)


def texts(mix):
    """256 texts like English ones: 16 words (`equal`), or 2 to 30, 16 on average (`mixed`)."""
    words = itertools.cycle(WORDS.split()[i * 7 % 20] for i in range(20 * 19))
    lengths = [16] * 256 if mix == "equal" else [2 + (i * 37) % 29 for i in range(256)]
    return [" ".join(itertools.islice(words, length)) for length in lengths]


def main(folder, size=""):
    tokenizer = new_tokenizer([PREFIX + WORDS] * 2)
    tokenizer.add_special_tokens({"unk_token": "<unk>"})  # CTranslate2 needs one
    # The rest of the vocabulary are made-up words: every token that the model gives is a text.
    tokenizer.add_tokens([f" w{number}" for number in range(32128 - len(tokenizer))])
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(
        T5Config(  # the defaults are t5-small's
            decoder_start_token_id=0,
            **{"d_model": 64, "d_kv": 16, "d_ff": 256, "num_layers": 2, "num_heads": 4}
            if size
            else {},
        )
    )
    model.generation_config = GenerationConfig(
        min_new_tokens=20,
        max_new_tokens=20,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=1,
        suppress_tokens=[0],
    )
    model.config.task_specific_params = {TASK: {"prefix": PREFIX}}
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main(*sys.argv[1:])
