# template_ray_serve.py, version 0.1.0
"""Serve a model over HTTP with Ray Serve.

    serve run template_ray_serve:translator_app --route-prefix "/translate"
    curl -d '{"text": "Hello world!"}' -H "Content-Type: application/json" \
        http://127.0.0.1:8000/translate

It serves the folder `model/` beside this file, which export_model.py writes. Another model, or
another setting, is an argument:

    serve run template_ray_serve:build model=/path/to/model --route-prefix "/translate"

As it is, it serves a translator. For a task of your own, change the settings (section 1) and
replace your work (section 2); mechanics, page and server (sections 3 to 5) work for any task.
"""

import asyncio
import contextlib
import hashlib
import hmac
import html
import json
import logging
import os
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from click import ClickException
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import HTMLResponse, JSONResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from ray import serve
from ray.serve import metrics
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.middleware.cors import CORSMiddleware

# Set before torch is imported: waiting threads stop spinning early and free the CPU.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

# isort: split
# YOUR CODE: imports
# Large packages are imported where they are used: only replicas need them, not `serve run`.
import re
import unicodedata
import warnings
from collections.abc import Iterable, Iterator
from functools import partial
from importlib.util import find_spec
from typing import Annotated, Literal, NamedTuple

from sentencex import segment

# -- 1. Settings -----------------------------------------------------------------------------------
# YOUR CODE: settings

NAME = "translator"  # begins the names of the metrics, and is the title of the page


class Settings(BaseModel):
    """Set as `key=value` after `template_ray_serve:build`, or under `args` in serve_config.yaml."""

    model_config = ConfigDict(extra="forbid")

    model: str = Field("", description="Folder or hub name; empty: `model/` beside this file")
    max_batch_size: int = Field(32, ge=1, le=1024, description="Inputs in one call of the model")
    max_queue: int = Field(1000, ge=1, description="Waiting inputs; beyond it, requests get 503")
    max_body_bytes: int = Field(256 * 1024, ge=1, description="A larger body gets 413")
    body_timeout_s: float = Field(10, gt=0, le=86_400, description="A slower body gets 408")
    timeout_s: float = Field(50, gt=0, le=86_400, description="A slower request gets 504")
    tokens_file: str = Field(
        "", description="Who may ask: a line `name: token` for each client; empty: anybody"
    )
    cors_origins: str = Field(
        "", description="Origins whose pages may ask, such as https://app.example; spaces between"
    )

    # Of the translator.
    revision: str | None = Field(None, description="Commit of a hub model: its files can change")
    prefix: str | None = Field(None, description="Before each sentence; default: the model's own")
    source_language: str = Field("", description="Of the texts; default: the model's own")
    target_language: str = Field("", description="Of the answers; default: the model's own")
    device: Literal["cpu", "cuda"] | None = Field(
        None, description="Default: a GPU if num_gpus gives the replica one"
    )
    precision: Literal["float32", "bfloat16", "int8"] = Field(
        "float32", description="The others are faster; int8 is for CPUs"
    )
    num_beams: int = Field(1, ge=1, le=64, description="More are slower, and often better")
    max_sentence_tokens: int | None = Field(
        None, ge=16, le=4096, description="A longer sentence is cut; default: as in training"
    )
    max_new_tokens: int | None = Field(
        None,
        ge=1,
        le=4096,
        description="Longest translation of a sentence; default: as in training",
    )
    max_request_tokens: int = Field(10_000, ge=1, description="A longer request gets 413")

    @model_validator(mode="wrap")
    @classmethod
    def name_the_key(cls, values: Any, handler: Any) -> "Settings":
        """Report wrong values in one line, which `serve run` prints without a traceback."""
        try:
            return handler(values)
        except ValidationError as error:
            raise ClickException(describe(error)) from None


# -- 2. Your work ----------------------------------------------------------------------------------
# YOUR CODE: begin
#
# Replace what is here and keep the names ModelRequest, ModelResponse, EXAMPLE, COUNTERS, Refuse
# and Model. Nothing here needs Ray or FastAPI: test it alone, or move it to a module and write
# `from my_work import *`. `settings` has the attributes of Settings.

HUB_MODEL = "google-t5/t5-small"  # served when there is no `model/`
HUB_REVISION = "df1b051c49625cf57a3d0d8d3863ed4cc13564fe"
HUB_TASK = "translation_en_to_fr"  # which of its tasks, unless the languages are set

# What is kept of the generation_config.json of a model: not forced_eos_token_id, which hides a cut,
# nor what draws at random, returns several translations, or makes generate() warn in each call.
GENERATION = (
    "bad_words_ids",
    "begin_suppress_tokens",
    "bos_token_id",
    "decoder_start_token_id",
    "early_stopping",
    "encoder_no_repeat_ngram_size",
    "eos_token_id",
    "forced_bos_token_id",
    "length_penalty",
    "max_new_tokens",
    "min_length",
    "no_repeat_ngram_size",
    "pad_token_id",
    "repetition_penalty",
    "suppress_tokens",
)

# Languages with rules in sentencex or below: as NLLB and Marian name them, and in two letters.
CODES = "amh:am ara:ar arb:ar ben:bn bul:bg cat:ca ces:cs cmn:zh dan:da deu:de ell:el eng:en"
CODES += " est:et fin:fi fra:fr glg:gl guj:gu hin:hi hrv:hr hun:hu hye:hy ita:it jpn:ja kan:kn"
CODES += " kaz:kk kor:ko mal:ml mar:mr mya:my nld:nl nno:nn nob:nb pan:pa pol:pl por:pt rus:ru"
CODES += " slk:sk slv:sl spa:es tam:ta tel:te tur:tr ukr:uk yue:zh zho:zh"
TWO_LETTERS = dict(pair.split(":") for pair in CODES.split())
ORDINALS = ("cs", "da", "de", "et", "fi", "hr", "hu", "nb", "no", "pl", "sk", "sl", "tr")  # "2."
QUOTES = ('"', "’", "”", "»", "」", "』", "】", "》")
NO_VOWEL = "[B-DF-HJ-NP-TV-XZ]?[b-df-hj-np-tv-xz]+"  # as in "Dr." and "str."
UNSPACED = ("ja", "zh")  # no space between sentences
# Invisible, and unknown to models: soft hyphen, word joiner, byte order mark, direction marks.
INVISIBLE = re.compile("[\u00ad\u061c\u200e\u200f\u202a-\u202e\u2060\u2066-\u2069\ufeff]")
NO_WORDS = re.compile("[0-9]\ufe0f?\u20e3|[\u115f\u1160\u3164\uffa0]")  # keycaps; blanks of Hangul
# sentencex takes quadratic time: cut very long lines, at a space if there is one.
PARTS = re.compile(r".{1,16000}(?!\S)|.{1,16000}", re.DOTALL)


class ModelRequest(BaseModel):
    """The body of a request."""

    model_config = ConfigDict(extra="forbid", strict=True)

    text: str | Annotated[list[str], Field(max_length=1000)]  # one, or several


class ModelResponse(BaseModel):
    """The body of an answer; a field that has its default value is left out."""

    translation: str | list[str]  # as many as there were texts, in their order
    cut_sentences: int = Field(0, description="Sentences whose translation hit max_new_tokens")

    # Counted in metrics, but not sent.
    output_tokens: int = Field(0, exclude=True)
    texts: int = Field(0, exclude=True)
    characters: int = Field(0, exclude=True)
    tokens: int = Field(0, exclude=True)  # without the prefix
    unknown_tokens: int = Field(0, exclude=True)


# A valid request: tried at the start, shown on the page, in /docs and with error 422. Once there is
# a `model/`, its first known answer is the example.
EXAMPLE = {"text": "Hello world!"}
COUNTERS = (  # fields of ModelResponse to add up in metrics
    "cut_sentences",
    "output_tokens",
    "texts",
    "characters",
    "tokens",
    "unknown_tokens",
)


class Refuse(Exception):
    """Raised by `plan`: what the client gets, 413 (too large) or 422 (unusable), and why."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class Sentence(NamedTuple):
    """An input of the model, and what `answer` needs to put the text together again."""

    text: int  # number of the text in the request
    before: str  # what stands before the sentence and does not reach the model
    tokens: list[int]
    after: str  # what stands behind the last sentence


class Output(NamedTuple):
    """The output of the model for a sentence."""

    translation: str
    tokens: int
    was_cut: bool


class Model:
    """The model as the server uses it."""

    # Averages per text in training, {counter: mean}: an alert compares the counters with them.
    expected: dict[str, float]

    # Here a transformers sequence-to-sequence model and its tokenizer.

    def __init__(self, name: str, settings: Any, threads: int) -> None:
        """Load the model; whatever it raises is reported in one line, and nothing is served.

        `name` is a folder or a hub name, empty if there is neither; `threads` is how many CPUs
        the replica has. Runs on the thread that calls the model later.
        """
        import torch
        import transformers

        torch.set_num_threads(threads)
        transformers.logging.set_verbosity_error()  # the log is JSON
        transformers.logging.disable_progress_bar()
        revision = settings.revision
        if not name:
            name, revision = HUB_MODEL, HUB_REVISION
            logging.getLogger("ray.serve").info("no model/ folder: serving %s from the hub", name)
        self.device = choose_device(settings)
        dtype = "bfloat16" if settings.precision == "bfloat16" else "float32"
        self.model = load_network(name, revision, dtype)
        self.tokenizer = load_tokenizer(name, revision)
        self.tokenizer.padding_side = "right"  # positions count from the left
        self.check_vocabulary()
        self.read_generation(settings)
        self.read_languages(settings)
        self.read_limits(settings)
        self.expected = getattr(self.model.config, "input_profile", None) or {}
        if settings.precision == "int8":
            use_int8(self.model)
        self.model.to(self.device)

    def check_vocabulary(self) -> None:
        """Refuse a tokenizer that was made up because its files are missing, or is another's."""
        vocabulary = self.tokenizer.get_vocab()
        for token in self.tokenizer.all_special_tokens:
            vocabulary.pop(token, None)
        if len(vocabulary) < 2:
            raise ValueError("its tokenizer has no vocabulary: a file is missing")
        tokens = max(vocabulary.values()) + 1
        known = self.model.get_input_embeddings().num_embeddings
        if tokens > known:
            raise ValueError(f"its tokenizer has {tokens} tokens, of which the model knows {known}")

    def read_generation(self, settings: Any) -> None:
        """Generate as the model's own files say, but the likeliest, and one for each sentence."""
        import torch
        import transformers

        own = self.model.generation_config
        generation = transformers.GenerationConfig(num_beams=settings.num_beams)
        for name in GENERATION:
            value = getattr(own, name, None)
            setattr(generation, name, value)
        if settings.max_new_tokens:
            generation.max_new_tokens = settings.max_new_tokens
        if generation.eos_token_id is None:
            generation.eos_token_id = self.tokenizer.eos_token_id
        self.ends = torch.tensor(generation.eos_token_id, device=self.device)
        self.model.generation_config = generation

    def read_languages(self, settings: Any) -> None:
        """Tell the model its task and languages, in the way that its tokenizer has for them."""
        tasks = getattr(self.model.config, "task_specific_params", None) or {}
        source = settings.source_language
        target = settings.target_language
        task = choose_task(tasks, source, target)
        prefix = tasks.get(task, {}).get("prefix", "")
        if settings.prefix is not None:
            prefix = settings.prefix.lstrip()  # `serve run` cannot pass an empty value: " "
        codes = codes_of(self.tokenizer)
        tags = tags_of(self.tokenizer)
        if codes:
            source = self.use_source_code(codes, source)
            target = self.use_target_code(codes, target)
        elif tags:
            prefix = with_tag(prefix, tags, target)
        elif target and prefix and settings.prefix is None:
            known = {languages_of(name)[1] for name in tasks}
            require_language("target_language", two_letters(target), known)
        self.use_prefix(prefix, tags)
        task_source, task_target = languages_of(task)
        source = source or getattr(self.tokenizer, "source_lang", "") or task_source
        target = target or getattr(self.tokenizer, "target_lang", "") or task_target
        self.language = two_letters(source or "en")
        self.spaces = two_letters(target) not in UNSPACED

    def use_source_code(self, codes: dict[str, int], code: str) -> str:
        """Set the source language of a model that has codes: mBART, M2M100, NLLB."""
        code = code or self.tokenizer.init_kwargs.get("src_lang") or ""
        require_language("source_language", code, codes)
        self.tokenizer.src_lang = code
        return code

    def use_target_code(self, codes: dict[str, int], code: str) -> str:
        """Set the first token of the answers, by default as training has recorded it."""
        tokenizer = self.tokenizer
        generation = self.model.generation_config
        first = (generation.forced_bos_token_id, generation.decoder_start_token_id)
        if not code:
            for known, token in codes.items():
                if token in first:
                    return known
            code = tokenizer.tgt_lang or ""
        require_language("target_language", code, codes)
        tokenizer.set_tgt_lang_special_tokens(code)
        if codes[code] in tokenizer.prefix_tokens:
            generation.forced_bos_token_id = codes[code]
        else:  # in the first mBART, the language replaces the start token
            generation.forced_bos_token_id = None
            generation.decoder_start_token_id = codes[code]
        tokenizer.set_src_lang_special_tokens(tokenizer.src_lang)
        return code

    def use_prefix(self, prefix: str, tags: dict[str, str]) -> None:
        """Prepare `encode`: special tokens are special in the prefix, but not in a text."""
        tokenizer = self.tokenizer
        self.as_text: dict[int, list[int]] = {}
        end = 0  # of the last special token of the prefix
        for token in [*tokenizer.all_special_tokens, *tags.values()]:
            if token in prefix:
                end = max(end, prefix.rfind(token) + len(token))
            number = tokenizer.convert_tokens_to_ids(token)
            if number != tokenizer.unk_token_id:
                apart = token[0] + " " + token[1:]
                self.as_text[number] = self.tokens_of(apart)
        # One letter, and the same with what the tokenizer puts before and behind a text.
        letter = self.tokens_of("a")
        whole = tokenizer("a")["input_ids"]
        start = whole.index(letter[0])
        special = tokenizer(prefix[:end], add_special_tokens=False)["input_ids"]
        self.begin = whole[:start] + special
        self.end = whole[start + len(letter) :]
        self.prefix = prefix
        self.prefix_text = prefix[end:]

    def tokens_of(self, text: str) -> list[int]:
        """Return the tokens of a text alone. Some tokenizers still find "</s>" in it."""
        alone = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)
        return alone["input_ids"]

    def encode(self, text: str) -> list[int]:
        """Return the tokens of prefix and text. Text is text: "</s>" in it ends nothing."""
        tokens = list(self.begin)
        for token in self.tokens_of(self.prefix_text + text):
            if token in self.as_text:
                tokens += self.as_text[token]
            else:
                tokens.append(token)
        return tokens + self.end

    def read_limits(self, settings: Any) -> None:
        """Use the model's own files for every limit that is not given."""
        limits = limits_of(self.model.config)
        for name, limit in limits.items():
            value = getattr(settings, name)
            if value and value > limit:
                raise ValueError(f"{name}: the model takes at most {limit}")
        longest = self.tokenizer.model_max_length  # a huge number if the tokenizer has none
        if longest > 4096:
            longest = 512
        longest = min(longest, limits["max_sentence_tokens"])
        self.max_sentence_tokens = settings.max_sentence_tokens or longest
        generation = self.model.generation_config
        longest = generation.max_new_tokens or 256
        generation.max_new_tokens = min(longest, limits["max_new_tokens"])
        self.max_request_tokens = settings.max_request_tokens
        self.frame = len(self.encode(""))  # tokens of the prefix, and around a text
        if self.frame > self.max_sentence_tokens // 2:
            raise ValueError("prefix: takes more than half of max_sentence_tokens")

    def plan(self, request: ModelRequest) -> list[Sentence]:
        """Return the inputs of the model for a request, of any type. May raise Refuse.

        Runs on any thread, also while the model is busy.
        """
        texts = texts_of(request)
        tokens = sum(len(self.encode(text)) for text in texts)
        limit = self.max_request_tokens
        if tokens > limit:
            raise Refuse(413, f"The request has {tokens} tokens; the limit is {limit}.")
        inputs: list[Sentence] = []
        for number, text in enumerate(texts):
            inputs += self.sentences(number, text)
        return inputs

    def sentences(self, number: int, text: str) -> list[Sentence]:
        """Return the sentences of a text, and between them all that is not translated."""
        found: list[Sentence] = []
        between = ""
        for piece in self.pieces(text):
            if not has_words(piece):
                between += piece
                continue
            start = len(piece) - len(piece.lstrip())
            end = len(piece.rstrip())
            tokens = self.encode(piece[start:end])
            found.append(Sentence(number, between + piece[:start], tokens, after=""))
            between = piece[end:]
        if found:
            found[-1] = found[-1]._replace(after=between)
        return found

    def pieces(self, text: str) -> Iterator[str]:
        """Yield sentences, or parts of long ones: joined, they are the text again."""
        for line in lines_of(text):
            # sentencex 1.0.32 fails at some white space, such as the no-break one in "A\u00a0.".
            plain = "".join(" " if character.isspace() else character for character in line)
            plain = plain.replace("។", "।")  # nor does it know the full stop of Khmer
            sentences = segment(self.language, plain)
            following = iter([*sentences[1:], ""])
            start = end = 0
            for sentence in sentences:
                end += len(sentence)
                if not goes_on(sentence, next(following), self.language):
                    yield from self.split_to_fit(line[start:end])
                    start = end

    def split_to_fit(self, sentence: str) -> list[str]:
        """Return parts of at most max_sentence_tokens, cut at spaces if there are any."""
        tokens = len(self.encode(sentence))
        if tokens <= self.max_sentence_tokens or len(sentence) < 2:
            return [sentence]
        middle = len(sentence) // 2
        cut = sentence.rfind(" ", 0, middle) + 1  # behind the last space of the first half
        if cut <= 1:
            cut = middle
        first = self.split_to_fit(sentence[:cut])
        second = self.split_to_fit(sentence[cut:])
        return first + second

    def size(self, sentence: Sentence) -> int:
        """Return how large an input is: those of like size share a batch; the sum is a metric."""
        return len(sentence.tokens)

    def __call__(self, sentences: list[Sentence]) -> list[Output]:
        """Return one output for each input. Inputs of several requests come together.

        If it raises an error, each input is tried alone, and the one that fails gets 500.
        """
        import torch

        token_lists = [sentence.tokens for sentence in sentences]
        batch = self.tokenizer.pad({"input_ids": token_lists}, return_tensors="pt")
        with torch.inference_mode():
            tokens = self.model.generate(**batch.to(self.device))
        translations = self.tokenizer.batch_decode(
            tokens,
            skip_special_tokens=True,
            clean_up_tokenization_spaces=False,
        )
        generated = tokens[:, 1:]  # behind the start token, which may be the same as the end
        is_end = torch.isin(generated, self.ends)
        before_end = (is_end.cumsum(dim=1) == 0).sum(dim=1)
        cut = ~is_end.any(dim=1)
        return list(map(Output, translations, before_end.tolist(), cut.tolist()))

    def answer(
        self,
        request: ModelRequest,
        inputs: list[Sentence],
        outputs: list[Output],
    ) -> ModelResponse:
        """Return the answer to a request from the outputs for its inputs, in their order."""
        begun: dict[int, str] = {}
        for sentence, output in zip(inputs, outputs):
            text = begun.get(sentence.text, "")
            text += self.gap(text, sentence.before)
            begun[sentence.text] = text + output.translation + sentence.after
        texts = texts_of(request)
        translations = []
        for number, text in enumerate(texts):
            without_words = "" if is_blank(text) else text
            translations.append(begun.get(number, without_words))
        one_text = isinstance(request.text, str)
        response = ModelResponse(translation=translations[0] if one_text else translations)
        response.texts = len(texts)
        response.characters = sum(map(len, texts))
        for sentence, output in zip(inputs, outputs):
            response.cut_sentences += output.was_cut
            response.output_tokens += output.tokens
            response.tokens += len(sentence.tokens) - self.frame
            response.unknown_tokens += sentence.tokens.count(self.tokenizer.unk_token_id)
        return response

    def gap(self, text: str, between: str) -> str:
        """Return what goes between a text and its next sentence, as the target language has it."""
        if not text or between.strip(" \u3000"):
            return between
        if not self.spaces or text.endswith(("。", "！", "？")):
            return ""
        return between.replace("\u3000", " ") or " "

    def same(self, answer: ModelResponse, known: ModelResponse) -> bool:
        """Return True if an answer is the known one: asked at the start for each known answer.

        Numbers may differ in the last digits, from one machine to another.
        """
        return answer.model_dump() == known.model_dump()


def texts_of(request: ModelRequest) -> list[str]:
    """Return the texts of a request, also if it has only one, without invisible characters."""
    texts = [request.text] if isinstance(request.text, str) else request.text
    return [INVISIBLE.sub("", text) for text in texts]


def lines_of(text: str) -> Iterator[str]:
    """Yield the lines of a text, in parts if they are very long."""
    for line in text.splitlines(keepends=True):
        yield from PARTS.findall(line)


def has_words(text: str) -> bool:
    """Return True if there is a letter or a digit: something to translate."""
    return any(character.isalnum() for character in NO_WORDS.sub("", text))


def is_blank(text: str) -> bool:
    """Return True for white space, control, zero-width and combining characters only."""
    for character in text:
        unseen = unicodedata.category(character) in ("Cc", "Cf", "Mn")
        if not (unseen or character.isspace()):
            return False
    return True


def goes_on(sentence: str, following: str, language: str) -> bool:
    """Return True where no sentence ends although sentencex splits, as after "M." or "1."."""
    if not following:
        return False
    small = next(filter(str.isalpha, following), "").islower()
    text = sentence.rstrip()
    if following[0] in "』】》":  # 『君の名は。』
        return True
    is_speech = text.endswith(("?", "!")) and following[0] in "-–—"  # "– Où ? – dit-il."
    if is_speech or text.endswith("]"):
        return small  # "Yan et al. [2004] analysed it."
    if text.endswith(QUOTES):
        return small or (text == sentence and following[0].isalpha())  # 「はい。」と言った
    if not text.endswith("."):
        return False
    *words, last = text.split()
    last = last.rstrip(".")
    is_date = language in ("hu", "ko") and following[0].isdigit()  # "2020. 05. 03."
    if last.isdigit() and (small or is_date or len(last) < 3):
        if small or is_date or not words:
            return True  # "2020. május", or the number of a list
        return language in ORDINALS and not words[-1].endswith(".")
    if last[:1].isalpha() and sum(map(str.isalpha, last)) == 1:
        return language != "en"  # "M. Dupont"; sentencex knows what to do with "So do I."
    is_unit = bool(words) and words[-1][-1].isdigit()  # "5 km."
    if language != "en" and not is_unit and re.fullmatch(NO_VOWEL, last):
        return True
    shortened = len(last) < (5 if is_unit else 3) or "." in last  # "5 mln. euro", "i.e. one"
    return small and shortened


# -- What the files of a model say -----------------------------------------------------------------


def load_network(name: str, revision: str | None, dtype: str) -> Any:
    """Return the network; ValueError if it is of another kind, or lacks weights."""
    import transformers

    for file in Path(name).glob("*.*"):
        small = file.stat().st_size < 1000
        if small and file.read_bytes().startswith(b"version https://git-lfs"):
            raise ValueError(f"{file.name} only stands for a file: run `git lfs pull` there")
    config = transformers.AutoConfig.from_pretrained(name, revision=revision)
    if not config.is_encoder_decoder:
        raise ValueError(f"a {config.model_type} has no encoder and decoder, as a T5 has")
    network, report = transformers.AutoModelForSeq2SeqLM.from_pretrained(
        name,
        revision=revision,
        dtype=dtype,
        output_loading_info=True,
    )
    for weight, _ in network.named_parameters():
        if weight in report["missing_keys"]:
            raise ValueError(f"its files have no weights for {weight}")
    return network.eval()


def choose_device(settings: Any) -> str:
    """Return where the model runs; ValueError if it cannot run there."""
    import torch

    has_gpu = torch.cuda.is_available()
    device = settings.device or ("cuda" if has_gpu else "cpu")
    if device == "cuda" and not has_gpu:
        raise ValueError("device: the replica has no GPU; num_gpus of its deployment gives it one")
    if device == "cuda" and settings.precision == "int8":
        raise ValueError("precision: int8 is for CPUs; on a GPU use bfloat16")
    return device


def use_int8(network: Any) -> None:
    """Make the linear layers of a network compute in int8."""
    import torch

    layers: list[Any] = [layer for layer in network.modules() if type(layer) is torch.nn.Linear]
    for layer in layers:
        weight = layer.weight.detach()
        scale = largest(weight) / 127
        integers = (weight / scale).round().to(torch.int8)
        layer.weight = torch.nn.Parameter(integers, requires_grad=False)
        layer.forward = partial(multiply_integers, integers, scale, layer.bias)


def multiply_integers(weight: Any, scale: Any, bias: Any, inputs: Any) -> Any:
    """Compute a linear layer in int8, with a scale for each output and for each token.

    With one scale for all tokens, an answer would depend on the other texts of its batch.
    """
    import torch

    tokens = inputs.flatten(end_dim=-2)
    scale_of_tokens = largest(tokens) / 127
    integers = (tokens / scale_of_tokens).round().to(torch.int8)
    outputs = torch._int_mm(integers, weight.t()) * scale_of_tokens * scale.t()
    if bias is not None:
        outputs += bias
    return outputs.view(*inputs.shape[:-1], -1)


def largest(rows: Any) -> Any:
    """Return the largest absolute value of each row, never 0."""
    return rows.abs().amax(dim=1, keepdim=True).clamp(min=1e-12)


def load_tokenizer(name: str, revision: str | None) -> Any:
    """Return the tokenizer; ValueError names the package that it may need."""
    import transformers

    try:
        with warnings.catch_warnings(action="ignore"):  # of a package that Marian does not use
            return transformers.AutoTokenizer.from_pretrained(name, revision=revision)
    except Exception as error:
        problem = "its tokenizer cannot be loaded"
        if not find_spec("sentencepiece"):
            problem += " without the package sentencepiece"
        reason = str(error) or repr(error)
        raise ValueError(f"{problem}: {reason.strip()}") from None


def limits_of(config: Any) -> dict[str, int]:
    """Return {setting: the most that the model can take}."""

    def most(part: str) -> int:
        own = getattr(config, f"max_{part}_position_embeddings", None)
        inner = getattr(config, part, config)  # of an EncoderDecoderModel
        return own or getattr(inner, "max_position_embeddings", None) or 4096  # a T5 has no limit

    return {"max_sentence_tokens": most("encoder"), "max_new_tokens": most("decoder")}


def two_letters(language: str) -> str:
    """Return "fr" for "fr", "fr_XX", "fr-CA", "fra_Latn" and "__fra__"."""
    code, *_ = re.split("[-_]", language.lower().strip("_"))
    return TWO_LETTERS.get(code, code)


def languages_of(task: str) -> tuple[str, str]:
    """Return ("en", "fr") for "translation_en_to_fr", and ("", "") for "summarization"."""
    _, _, languages = task.partition("_")
    source, _, target = languages.partition("_to_")
    return two_letters(source), two_letters(target)


def choose_task(tasks: dict[str, Any], source: str, target: str) -> str:
    """Return the name of the task for these languages, or of the first; "" if there is none."""
    target = two_letters(target)
    for task in tasks:
        if languages_of(task) == (two_letters(source), target):
            return task
    for task in tasks:
        if target and target == languages_of(task)[1]:
            return task
    if HUB_TASK in tasks:
        return HUB_TASK
    return next(iter(tasks), "")


def codes_of(tokenizer: Any) -> dict[str, int]:
    """Return {"fra_Latn": token} of a tokenizer that is told the source language, or nothing."""
    if not hasattr(tokenizer, "src_lang"):
        return {}
    if hasattr(tokenizer, "lang_code_to_id"):
        return tokenizer.lang_code_to_id
    codes = tokenizer.extra_special_tokens
    return dict(zip(codes, tokenizer.convert_tokens_to_ids(codes)))


def tags_of(tokenizer: Any) -> dict[str, str]:
    """Return {"fr": "<2fr>"}, the words for target languages in MADLAD, or in Marian ">>fra<<"."""
    tags = {}
    for token in tokenizer.get_vocab():
        if re.fullmatch(r"<2[a-z]\w+>|>>[a-z]\w+<<", token):
            code = token.strip("<2>")
            tags[code] = token
    return tags


def with_tag(prefix: str, tags: dict[str, str], target: str) -> str:
    """Return a prefix that begins with the tag of the target language."""
    rest = prefix
    for tag in tags.values():
        rest = rest.replace(tag, "")
    if not target and (rest != prefix or len(tags) == 1):
        return prefix  # has a tag, or needs none
    require_language("target_language", target, tags)
    return f"{tags[target]} {rest.lstrip()}"


def require_language(name: str, language: str, known: Iterable[str]) -> None:
    """Raise ValueError, with some known languages, unless this is one of them."""
    if language in known:
        return
    problem = "the model needs one"
    codes = sorted(filter(None, known))
    if language:
        problem = f"the model does not know {language!r}"
        similar = [code for code in codes if code[:2] == language[:2]]
        codes = similar or codes
    some = ", ".join(codes[:6])
    raise ValueError(f"{name}: {problem}; for example, it knows {some}")


# YOUR CODE: end
# -- 3. Mechanics: the same for every task ---------------------------------------------------------

MODEL_FOLDER = Path(__file__).with_name("model")


def read_known_answers(folder: Path) -> list[dict[str, Any]]:
    """Return [{"request": ..., "answer": ...}, ...] as export_model.py wrote them, or nothing."""
    file = folder / "known_answers.json"
    if not file.is_file():
        return []
    answers = json.loads(file.read_text("utf-8"))
    if not isinstance(answers, list):
        raise ValueError(f"{file} is of an older release; export the model again")
    return answers


with contextlib.suppress(Exception):  # a broken file is reported when the model is loaded
    EXAMPLE = read_known_answers(MODEL_FOLDER)[0]["request"]
BODY = {"schema": ModelRequest.model_json_schema(), "example": EXAMPLE}


def describe(error: ValidationError, fields: Any = None) -> str:
    """Return the problems in one line; of names that a client sent, only those of fields."""
    problems: list[str] = []
    for problem in error.errors(include_input=False):
        path = problem["loc"]
        if fields is not None and path:
            numbers = [part for part in path[1:] if isinstance(part, int)]
            path = (path[0], *numbers) if path[0] in fields else ()
        name = ".".join(map(str, path))
        line = f"{name}: {problem['msg']}" if name else problem["msg"]
        if line not in problems:
            problems.append(line)
    if len(problems) > 3:
        problems[3:] = [f"and {len(problems) - 3} more"]
    return "; ".join(problems)


def hash_of(folder: Path, *patterns: str) -> str:
    """Return a short hash of the names and the contents of the files that match in a folder."""
    whole = hashlib.sha256()
    paths = [path for pattern in patterns for path in folder.glob(pattern)]
    for path in sorted(paths):
        if path.is_file():
            name = path.relative_to(folder).as_posix()
            whole.update(name.encode())
            with path.open("rb") as file:
                content = hashlib.file_digest(file, "sha256")
            whole.update(content.digest())
    return whole.hexdigest()[:12]


FIRST_LINE = Path(__file__).read_text("utf-8").partition("\n")[0]
RELEASE = FIRST_LINE.partition("version ")[2]
# Now, while this process reads it: the files beside this one, and in packages there.
CODE = hash_of(MODEL_FOLDER.parent, "[!.]*.py", "[!.]*/*.py")


def identify(settings: Settings) -> dict[str, str]:
    """Return what is served: the release of this file, and hashes of the code and of the model."""
    folder = Path(settings.model or MODEL_FOLDER)
    model = settings.model
    if folder.is_dir():
        model = hash_of(folder, "**/[!.]*")
    return {"release": RELEASE, "code": CODE, "model": model}


def check_deployed(settings: Settings, deployed: dict[str, str]) -> dict[str, str]:
    """Return what this process serves; RuntimeError if something else was deployed.

    So a replica that starts later never serves other files than those before it.
    """
    served = identify(settings)
    sent = os.environ.get("DEPLOYED_FILES")  # by check_serve_config.py --deploy
    if sent:
        deployed = json.loads(sent)
    for part, right in deployed.items():
        found = served[part]
        if settings.model and right == settings.model:
            continue  # a name: where it was deployed, there was no such folder
        if found != right:
            raise RuntimeError(
                f"the {part} here is {found!r}, but {right!r} was deployed: deploy again "
                "(check_serve_config.py --deploy), or restart the server"
            )
    return served


def load_model(settings: Settings, threads: int) -> Model:
    """Return a model that gives its known answers; RuntimeError, in one line, if there is none."""
    name = settings.model or (str(MODEL_FOLDER) if MODEL_FOLDER.is_dir() else "")
    try:
        model = Model(name, settings, threads)
        check_answers(model, read_known_answers(Path(name)) if name else [])
    except Exception as error:  # no folder, no hub, a broken file, a missing package, ...
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise RuntimeError(
            f"no usable model {name or 'model/'!r} ({reason}): make one "
            "(`python template_flow.py run` and `python export_model.py`), or name one "
            "(`serve run template_ray_serve:build model=PATH`)"
        ) from None
    return model


def check_answers(model: Model, known: list[dict[str, Any]]) -> None:
    """Raise ValueError, in one line, unless the model gives each answer that came with it."""
    for case in known or [{"request": EXAMPLE}]:
        body = json.dumps(case["request"])
        request = ModelRequest.model_validate_json(body)
        inputs = model.plan(request)
        outputs = model(inputs) if inputs else []
        answer = model.answer(request, inputs, outputs)
        if "answer" not in case:
            continue
        body = json.dumps(case["answer"])
        right = ModelResponse.model_validate_json(body)
        if not model.same(answer, right):
            asked, got, not_got = map(as_json, (request, answer, right))
            raise ValueError(f"the model answers {asked} with {got}, not {not_got}")


def as_json(value: BaseModel) -> str:
    """Return a request or an answer as it is sent."""
    return value.model_dump_json(exclude_defaults=True)


METRICS = NAME.replace("-", "_").replace(" ", "_")  # as Prometheus allows


class Counter(metrics.Counter):
    """A counter of the app, which Prometheus sees from the start, at 0."""

    def __init__(self, name: str) -> None:
        super().__init__(f"{METRICS}_{name}")
        self._record(0)  # `inc` takes no 0

    def add(self, number: float) -> None:
        if number:
            self.inc(number)


class RequestCounter(metrics.Counter):
    """Counts requests by client and status; 499 is a client that left before its answer."""

    ANYBODY = "anybody"  # a client without a token
    STATUSES = (200, 400, 401, 408, 413, 415, 422, 499, 500, 503, 504)

    def __init__(self) -> None:
        tags: Any = ("client", "status")
        super().__init__(f"{METRICS}_requests", tag_keys=tags)
        for status in self.STATUSES:
            self._record(0, {"client": self.ANYBODY, "status": str(status)})

    def add(self, client: str, status: int) -> None:
        self.inc(1, {"client": client, "status": str(status)})


class RequestSeconds(metrics.Counter):
    """A histogram of request durations that, unlike Ray's, exists before the first request."""

    LIMITS = ("0.05", "0.1", "0.2", "0.5", "1", "2", "5", "10", "20", "50", "+Inf")

    def __init__(self) -> None:
        super().__init__(f"{METRICS}_request_seconds_bucket", tag_keys=("le",))
        for limit in self.LIMITS:
            self._record(0, {"le": limit})

    def add(self, seconds: float) -> None:
        for limit in self.LIMITS:
            if seconds <= float(limit):
                self.inc(1, {"le": limit})


class Gauges:
    """The version served and the averages of the training; `set` has to be called regularly."""

    def __init__(self, served: dict[str, str], expected: dict[str, float]) -> None:
        tags: Any = tuple(served)
        self.served = served
        self.expected = expected
        self.version = metrics.Gauge(f"{METRICS}_served", tag_keys=tags)
        self.usual = metrics.Gauge(f"{METRICS}_expected", tag_keys=("counter",))
        self.set()

    def set(self) -> None:
        self.version.set(1, self.served)
        for name, value in self.expected.items():
            self.usual.set(value, {"counter": name})


@dataclass(frozen=True)
class Waiting:
    """An input in the queue."""

    item: Any
    size: int
    rank: int
    request: list[Any]  # all inputs of its request
    since: float


def rank_of(inputs: list[Any]) -> int:
    """Return the rank of a request: the same for 1 input, for 2 to 3, 4 to 7, 8 to 15 and so on."""
    return len(inputs).bit_length()


class Batcher:
    """Runs the model on one thread, each time on inputs that came in while it was busy."""

    def __init__(self, model: Model, max_batch_size: int, thread: ThreadPoolExecutor) -> None:
        self.model = model
        self.max_batch_size = max_batch_size
        self.thread = thread
        self.waiting: dict[asyncio.Future, Waiting] = {}  # for each output to come, oldest first
        self.arrived = asyncio.Event()
        self.busy_since: float | None = None
        self.share = 0.0  # places in the next batch that are kept for the oldest request
        self.worker: asyncio.Task | None = None
        self.batch_size = metrics.Histogram(
            f"{METRICS}_batch_size", boundaries=[1, 2, 4, 8, 16, 32, 64, 128]
        )
        self.batches = Counter("batches")
        self.inputs = Counter("inputs")
        self.input_size = Counter("input_size")
        self.queue_seconds = Counter("queue_seconds")
        self.model_seconds = Counter("model_seconds")
        self.queue = metrics.Gauge(f"{METRICS}_queue")
        self.queue.set(0)

    def submit(self, inputs: list[Any]) -> list[asyncio.Future]:
        """Queue the inputs of a request; cancel a returned future to drop it from the queue."""
        loop = asyncio.get_running_loop()
        rank = rank_of(inputs)
        outputs: list[asyncio.Future] = []
        for item in inputs:
            output = loop.create_future()
            size = self.model.size(item)
            self.waiting[output] = Waiting(item, size, rank, inputs, loop.time())
            outputs.append(output)
        self.arrived.set()
        if self.waiting and (self.worker is None or self.worker.done()):
            self.worker = asyncio.create_task(self.work())
        return outputs

    def drop_cancelled(self) -> int:
        """Drop the inputs whose clients have left; return how many still wait."""
        for output in list(self.waiting):
            if output.done():
                del self.waiting[output]
        self.queue.set(len(self.waiting))
        return len(self.waiting)

    def ahead_of(self, inputs: list[Any]) -> int:
        """Return how many inputs wait whose requests are not larger: they go first."""
        self.drop_cancelled()
        largest = rank_of(inputs)
        ranks = [waiting.rank for waiting in self.waiting.values()]
        return sum(rank <= largest for rank in ranks)

    def seconds_busy(self) -> float:
        """Return how long the model has been at work on its batch; 0 if it is idle."""
        if self.busy_since is None:
            return 0.0
        loop = asyncio.get_running_loop()
        return loop.time() - self.busy_since

    async def work(self) -> None:
        """Run batches until no input waits."""
        loop = asyncio.get_running_loop()
        while self.drop_cancelled():
            batch = self.next_batch()
            taken = list(batch.values())
            items = [waiting.item for waiting in taken]
            self.busy_since = loop.time()
            self.queue_seconds.add(sum(self.busy_since - waiting.since for waiting in taken))
            self.queue.set(len(self.waiting))
            results = await loop.run_in_executor(self.thread, self.run, items)
            seconds = self.seconds_busy()
            self.busy_since = None
            for output, result in zip(batch, results):
                if not output.done():
                    output.set_result(result)
            self.count(taken, seconds)
            await self.wait_for_returning_clients(len(batch), seconds)

    def count(self, batch: list[Waiting], seconds: float) -> None:
        """Add a batch to the metrics."""
        size = sum(waiting.size for waiting in batch)
        self.batch_size.observe(len(batch))
        self.batches.add(1)
        self.inputs.add(len(batch))
        self.input_size.add(size)
        self.model_seconds.add(seconds)

    def next_batch(self) -> dict[asyncio.Future, Waiting]:
        """Take the inputs of small requests first, and among these, inputs of similar size.

        So a text never waits for the lists of others, and little is padded. A quarter of all
        places belongs to the request that has waited longest: no large one waits forever.
        """
        first = min(self.waiting.values(), key=lambda waiting: waiting.rank)
        oldest = next(iter(self.waiting.values()))

        def order(output: asyncio.Future) -> tuple[int, int]:
            waiting = self.waiting[output]
            difference = waiting.size - first.size
            return waiting.rank, abs(difference)

        ordered = sorted(self.waiting, key=order)
        of_oldest: list[asyncio.Future] = []
        for output in ordered:
            if self.waiting[output].request is oldest.request:
                of_oldest.append(output)
        self.share += self.max_batch_size / 4
        kept = of_oldest[: int(self.share)]
        self.share %= 1
        unique = list(dict.fromkeys(kept + ordered))
        chosen = unique[: self.max_batch_size]
        return {output: self.waiting.pop(output) for output in chosen}

    def run(self, batch: list[Any]) -> list[Any]:
        """Return an output or an exception for each input; after a failure, try one by one."""
        try:
            outputs = self.model(batch)
            if len(outputs) != len(batch):
                raise ValueError(f"{len(outputs)} outputs for {len(batch)} inputs")
            return list(outputs)
        except Exception as error:
            if len(batch) == 1:
                return [error]
            return [self.run([item])[0] for item in batch]

    async def wait_for_returning_clients(self, batch_size: int, batch_seconds: float) -> None:
        """Wait for clients that have just been answered: they often ask again immediately.

        One full batch then replaces two half-full ones. The wait is proportional to the duration
        of the last batch and shrinks as clients return, so it suits a model of any speed.
        """
        loop = asyncio.get_running_loop()
        latest = loop.time() + batch_seconds / 2
        expected = min(batch_size + self.drop_cancelled(), self.max_batch_size)
        if expected == 1:
            return
        while (missing := expected - self.drop_cancelled()) > 0:
            patience = batch_seconds / 3 * missing / expected
            self.arrived.clear()
            try:
                async with asyncio.timeout_at(min(loop.time() + patience, latest)):
                    await self.arrived.wait()
            except TimeoutError:
                return


# -- 4. The page: it sends any request and shows any answer ----------------------------------------
# In this file, so that two files are enough to serve. It needs no other host, and works offline.

PAGE = r"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>TITLE</title>
<style>
:root { color-scheme: light dark }
* { box-sizing: border-box; margin: 0; font: inherit; color: inherit }
body {
  max-width: 64rem; margin: 2rem auto; padding: 0 1.5rem; font: 1rem/1.5 system-ui, sans-serif;
  background: light-dark(#f4f5f7, #15181d); color: light-dark(#1c2128, #e6e8ec)
}
h1 { margin-bottom: 1rem; font-size: 1.75rem; font-weight: 700 }
form { display: grid; gap: .5rem 1.5rem }
@media (min-width: 40rem) { form { grid: auto 1fr auto / auto-flow minmax(0, 1fr) } }
label, h2, button { font-weight: 600 }
dt, small { font-size: .875rem; color: light-dark(#59616d, #9ba3af) }
textarea, dl {
  min-height: 12rem; max-height: 70vh; padding: .75rem 1rem; overflow: auto; resize: vertical;
  border: 1px solid light-dark(#cdd2d9, #3b424d); border-radius: .5rem;
  background: light-dark(#fff, #1d2127)
}
dd { margin-bottom: .75rem; white-space: pre-wrap; overflow-wrap: anywhere }
dl.error, dl.error dt { border-color: currentColor; color: light-dark(#c62828, #ff8a80) }
dl[aria-busy=true] { opacity: .5 }
button { padding: .5rem 1.5rem; border: 0; border-radius: .5rem; background: #2557d6; color: #fff }
:focus-visible { outline: 3px solid light-dark(#7ba3f7, #6690ee); outline-offset: 1px }
</style>
<h1>TITLE</h1>
<form>
<label for="request">Request</label>
<textarea id="request" dir="auto" spellcheck="false" autofocus>EXAMPLE</textarea>
<p><button>Send</button> <small>or Ctrl+Enter</small></p>
<h2>Answer</h2>
<dl aria-live="polite"></dl>
<p><small id="time">&nbsp;</small></p>
</form>
<script>
const [form, input, answer, time] = document.querySelectorAll("form, textarea, dl, #time")
const example = JSON.parse(input.value)
const [field, ...others] = Object.keys(example)
const isText = others.length === 0 && typeof example[field] === "string"
if (isText) input.value = example[field]

input.onkeydown = event => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit()
}

form.onsubmit = async event => {
  event.preventDefault()
  if (answer.ariaBusy === "true") return
  answer.ariaBusy = "true"
  const begin = performance.now()
  const tick = () => time.textContent = ((performance.now() - begin) / 1000).toFixed(2) + " s"
  const clock = setInterval(tick, 50)
  await ask(isText ? JSON.stringify({[field]: input.value}) : input.value)
  clearInterval(clock)
  tick()
  answer.ariaBusy = "false"
}

async function ask(body) {
  const headers = {"Content-Type": "application/json"}
  const signal = AbortSignal.timeout(LIMIT_S * 1000)
  try {
    const reply = await fetch("", {method: "POST", headers, body, signal})
    const text = await reply.text()
    const isJson = reply.headers.get("Content-Type") === headers["Content-Type"]
    const json = isJson ? JSON.parse(text) : {error: {message: text}} // of a proxy
    show(reply.ok ? json : {["Error " + reply.status]: json.error.message}, !reply.ok)
  } catch (error) {
    const isLate = error.name === "TimeoutError"
    show({"No answer": isLate ? "Not within LIMIT_S s." : "The server cannot be reached."}, true)
  }
}

function show(fields, isError) {
  answer.className = isError ? "error" : ""
  answer.replaceChildren()
  for (const [name, value] of Object.entries(fields)) {
    const [term, text] = [document.createElement("dt"), document.createElement("dd")]
    term.textContent = name
    text.textContent = typeof value === "string" ? value : readable(value)
    text.dir = "auto"
    answer.append(term, text)
  }
}

// JSON, one entry a line; what is short stays on one line, and so does a list of numbers.
function readable(value, indent = "\n") {
  const line = JSON.stringify(value)
  const isList = Array.isArray(value)
  if (isList && value.every(Number.isFinite)) return "[" + value.join(", ") + "]"
  if (line.length < 50 || Object(value) !== value) return line
  const name = key => isList ? "" : JSON.stringify(key) + ": "
  const entry = key => indent + "  " + name(key) + readable(value[key], indent + "  ")
  return line[0] + Object.keys(value).map(entry) + indent + line.at(-1)
}
</script>
</html>
"""


# -- 5. The server: a request, from top to bottom --------------------------------------------------
# It comes last because Ray pickles the class together with the names defined above it.


class OptionalTrailingSlash:
    """Serves `/translate` as `/translate/`: a redirect would lose the body of a POST."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and scope["path"] == scope.get("root_path"):
            scope = {**scope, "path": scope["path"] + "/"}
        await self.app(scope, receive, send)


class CrossOrigin:
    """Allows pages of the origins in `cors_origins` to send requests."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        app = self.app
        if scope["type"] == "http":
            server: Any = serve.get_replica_context().servable_object
            origins = server.settings.cors_origins.split()
            if origins:
                headers = ["Authorization", "Content-Type"]
                app = CORSMiddleware(app, origins, allow_methods=["POST"], allow_headers=headers)
        await app(scope, receive, send)


api = FastAPI(title=NAME.capitalize(), redirect_slashes=False)
api.add_middleware(OptionalTrailingSlash)
api.add_middleware(CrossOrigin)


@api.exception_handler(StarletteHTTPException)
async def error_response(_: Request, error: StarletteHTTPException) -> JSONResponse:
    """Give every error the same shape, and repeat nothing that the client sent."""
    body = {"error": {"code": error.status_code, "message": error.detail}}
    return JSONResponse(body, error.status_code, error.headers)


def read_tokens(file: str) -> dict[str, str]:
    """Return {name: token} from lines of `name: token` in a file, or in API_TOKENS.

    Raises ValueError, which names the line but not the token.
    """
    source = file or "API_TOKENS"
    text = os.environ.get("API_TOKENS", "").replace(",", "\n")
    if file:
        try:
            text = Path(file).read_text("utf-8-sig")
        except OSError as error:
            raise ValueError(f"{file}: {error.strerror}") from None
    tokens: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        name, _, token = map(str.strip, line.partition(":"))
        if not name or name in tokens or len(token) < 16 or not token.isascii() or " " in token:
            wanted = "a new name, and a token of 16 ASCII characters or more"
            raise ValueError(f"{source} line {number}: needs `name: token`, {wanted}")
        tokens[name] = token
    if not tokens:
        raise ValueError(f"{source}: has no `name: token`")
    return tokens


def client_of(request: Request, tokens: dict[str, str]) -> str:
    """Return the name of the client whose token a request has; HTTPException 401 without one."""
    sent = request.headers.getlist("authorization")
    scheme, _, token = sent[0].partition(" ") if len(sent) == 1 else ("", "", "")
    client = ""
    for name, right in tokens.items():  # all of them: the time it takes tells nothing
        if hmac.compare_digest(token.strip().encode(), right.encode()):
            client = name
    if not client or scheme.lower() != "bearer":
        headers = {"WWW-Authenticate": "Bearer", **CLOSE}
        raise HTTPException(401, "Send your token as Authorization: Bearer TOKEN.", headers)
    return client


LARGE_BODY = 10_000  # bytes
CLOSE = {"Connection": "close"}  # instead of reading the rest of a body that is refused


async def read(request: Request, max_bytes: int) -> bytearray:
    """Return the body of a request; HTTPException 400, 413 or 415 if it cannot be used."""
    content_type = request.headers.get("content-type", "application/json")
    kind = content_type.partition(";")[0].strip().lower()
    if not kind.endswith(("/json", "+json")):  # also application/vnd.api+json
        raise HTTPException(415, "Send JSON with the header Content-Type: application/json.")
    if request.headers.get("content-encoding", "").lower() not in ("", "identity"):
        raise HTTPException(415, "Send the body uncompressed, without Content-Encoding.")
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > max_bytes:
            raise HTTPException(413, f"The body is larger than {max_bytes} bytes.", CLOSE)
    if not body and "upgrade" in request.headers:  # as of `curl --http2`: uvicorn drops the body
        raise HTTPException(400, "Send HTTP/1.1 without the header Upgrade.", CLOSE)
    return body


def parse(body: bytearray) -> ModelRequest:
    """Return the request in a body; HTTPException 422 if there is none."""
    try:
        encoding = json.detect_encoding(body)  # UTF-8, 16 or 32, with a byte order mark or without
        return ModelRequest.model_validate_json(body.decode(encoding))
    except UnicodeDecodeError:
        raise HTTPException(422, "The body is not UTF-8.") from None
    except ValidationError as error:
        problems = describe(error, ModelRequest.model_fields)
        raise HTTPException(422, f"{problems}. Send JSON like {json.dumps(EXAMPLE)}.") from None


def model_failed(error: Exception) -> HTTPException:
    """Return the client's error; log where the work failed, but no message: it may quote text."""
    frames = traceback.extract_tb(error.__traceback__)
    places = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames]
    name = type(error).__name__
    logging.getLogger("ray.serve").error("%s at %s", name, " > ".join(places))
    return HTTPException(500, f"The model failed on this request: {name}.")


# The app refuses requests before Ray does: max_ongoing_requests is above max_queue. The short
# backoff keeps Ray's router from sending only a few requests a second when replicas are full.
@serve.deployment(
    max_ongoing_requests=1100,
    max_queued_requests=256,
    max_constructor_retry_count=1,  # a model that cannot be loaded is not tried again
    request_router_config={"initial_backoff_s": 0.002, "max_backoff_s": 0.01},
    ray_actor_options={"num_cpus": 1},
)
@serve.ingress(api)
class ModelServer:
    """A replica: one model, which answers over HTTP."""

    def __init__(self, settings: Settings, deployed: dict[str, str]) -> None:
        cpus = ray.get_runtime_context().get_assigned_resources().get("CPU", 1)
        # One thread loads and runs the model: each thread that calls torch has OpenMP threads of
        # its own, and two teams of them slow each other down.
        thread = ThreadPoolExecutor(max_workers=1)
        self.settings = settings
        self.needs_token = bool(settings.tokens_file) or "API_TOKENS" in os.environ
        if self.needs_token:
            read_tokens(settings.tokens_file)  # fails now rather than at the first request
        self.model = thread.submit(load_model, settings, max(1, int(cpus))).result()
        self.served = check_deployed(settings, deployed)  # last: the files may have changed since
        self.batcher = Batcher(self.model, settings.max_batch_size, thread)
        # A short text is never planned behind the long lists of others.
        self.planner = ThreadPoolExecutor(max_workers=4)
        self.planner_of_large = ThreadPoolExecutor(max_workers=1)
        self.counters = {name: Counter(name) for name in COUNTERS}
        self.requests = RequestCounter()
        self.request_seconds = RequestSeconds()
        self.gauges = Gauges(self.served, getattr(self.model, "expected", {}))

    async def check_health(self) -> None:
        """Set the gauges again: Ray calls this every 10 s, and forgets gauges after 20 s."""
        self.gauges.set()
        self.batcher.drop_cancelled()

    @api.api_route(
        "/", methods=["GET", "HEAD"], response_class=HTMLResponse, include_in_schema=False
    )
    async def page(self) -> str:
        example = json.dumps(EXAMPLE, ensure_ascii=False, indent=1)
        limit = self.settings.timeout_s + 10  # the app's own answer to a timeout comes first
        page = PAGE.replace("TITLE", api.title).replace("LIMIT_S", f"{limit:g}")
        return page.replace("EXAMPLE", html.escape(example))

    @api.get("/health")
    @api.head("/health", include_in_schema=False)
    async def health(self) -> dict[str, str]:
        """Answer immediately, even while the model is busy, unless it is stuck."""
        limit = self.settings.timeout_s
        if self.batcher.seconds_busy() > limit:
            raise HTTPException(503, f"One batch has taken longer than {limit:g} seconds.")
        return {"status": "ok", **self.served}

    @api.post(
        "/",
        response_model=ModelResponse,
        response_model_exclude_defaults=True,
        openapi_extra={"requestBody": {"required": True, "content": {"application/json": BODY}}},
    )
    async def answer(self, http_request: Request) -> ModelResponse:
        """Answer one request, and count it."""
        client = RequestCounter.ANYBODY
        status = 500
        begin = time.monotonic()
        try:
            if self.needs_token:
                client = client_of(http_request, self.tokens())
            response = await self.answer_to(http_request)
            status = 200
            return response
        except HTTPException as error:
            status = error.status_code
            raise
        except asyncio.CancelledError:
            status = 499  # the client has left
            raise
        finally:
            self.requests.add(client, status)
            self.request_seconds.add(time.monotonic() - begin)

    def tokens(self) -> dict[str, str]:
        """Return {name: token}, as they are now: a changed file counts immediately."""
        try:
            return read_tokens(self.settings.tokens_file)
        except ValueError as error:
            logging.getLogger("ray.serve").error("nobody may ask: %s", error)
            return {}

    async def answer_to(self, http_request: Request) -> ModelResponse:
        """Return the answer to a request: read, plan, run and put together."""
        settings = self.settings
        try:
            reading = read(http_request, settings.max_body_bytes)
            body = await asyncio.wait_for(reading, settings.body_timeout_s)
        except TimeoutError:
            seconds = f"{settings.body_timeout_s:g}"
            raise HTTPException(408, f"No whole body within {seconds} s.", CLOSE) from None
        request = parse(body)
        planner = self.planner if len(body) < LARGE_BODY else self.planner_of_large
        try:
            # On a thread: others are answered meanwhile.
            loop = asyncio.get_running_loop()
            inputs = await loop.run_in_executor(planner, self.model.plan, request)
        except Refuse as refusal:
            raise HTTPException(refusal.status, str(refusal)) from None
        except Exception as error:
            raise model_failed(error) from None
        limit = settings.max_queue
        if len(inputs) > limit:
            raise HTTPException(413, f"The request has {len(inputs)} inputs; the limit is {limit}.")
        if inputs and self.batcher.ahead_of(inputs) + len(inputs) > limit:
            message = "Too many requests are waiting; try again soon."
            raise HTTPException(503, message, {"Retry-After": "1"})
        results = asyncio.gather(*self.batcher.submit(inputs))
        try:
            # A timeout, or a client that leaves, cancels what has not reached the model.
            outputs = await asyncio.wait_for(results, settings.timeout_s)
        except TimeoutError:
            message = f"Not done within {settings.timeout_s:g} seconds; send less at once."
            raise HTTPException(504, message) from None
        for output in outputs:
            if isinstance(output, Exception):
                raise model_failed(output)
        try:
            response = self.model.answer(request, inputs, outputs)
        except Exception as error:
            raise model_failed(error) from None
        for name, counter in self.counters.items():
            counter.add(getattr(response, name))
        return response


def build(args: Settings) -> serve.Application:
    """Return the application, with `key=value` of `serve run` or `args` of a config."""
    return ModelServer.bind(args, identify(args))  # type: ignore[attr-defined]


translator_app = build(Settings())
