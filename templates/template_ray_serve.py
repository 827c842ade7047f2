# template_ray_serve.py, version 0.1.0
"""Serve a text-to-text model (here a translator) over HTTP with Ray Serve.

    serve run template_ray_serve:translator_app --route-prefix "/translate"
    curl -d '{"text": "Hello world!"}' -H "Content-Type: application/json" http://127.0.0.1:8000/translate

It serves the folder `model/` beside this file, which export_model.py writes, else a small model from the
Hugging Face hub. Any other model, and every other setting below, by arguments only:

    serve run template_ray_serve:build model=/path/to/model prefix="" --route-prefix "/translate"
"""

import asyncio
import json
import logging
import re
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import ray
import torch
from click import ClickException
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import HTMLResponse, JSONResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from ray import serve
from ray.serve import metrics
from starlette.exceptions import HTTPException as AnyHTTPException
from starlette.requests import ClientDisconnect
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

# YOUR CODE: what your model expects before each sentence, and the model to fetch when there is no `model/`.
PREFIX = "translate English to French: "
HUB_MODEL, HUB_REVISION = "google-t5/t5-small", "df1b051c49625cf57a3d0d8d3863ed4cc13564fe"


class Settings(BaseModel):
    """All you can set: `key=value` after `template_ray_serve:build`, or `user_config` in the YAML file."""

    model_config = ConfigDict(extra="forbid")
    model: str = Field("", description="Folder or hub name; empty: `model/` beside this file, or HUB_MODEL")
    revision: str | None = Field(None, description="Commit of a hub model; pin it, for its files can change")
    prefix: str = Field(PREFIX, description="Put before every sentence; most models but T5 need none")
    precision: Literal["float32", "bfloat16", "int8"] = Field("float32", description="The safe one, or faster")
    max_batch_size: int = Field(32, ge=1, le=1024, description="Sentences in one call of the model")
    max_sentence_tokens: int = Field(128, ge=16, le=4096, description="A longer sentence is cut at a space")
    max_new_tokens: int = Field(256, ge=1, le=4096, description="Longest translation of one sentence")
    max_request_tokens: int = Field(10_000, ge=1, description="A longer request gets 413")
    max_body_bytes: int = Field(256 * 1024, ge=1, description="A larger body gets 413 and is not read on")
    max_queue: int = Field(256, ge=1, description="With so many sentences waiting, new requests get 503")
    timeout_s: float = Field(50, gt=0, description="A request not done by then gets 504")

    @model_validator(mode="wrap")
    @classmethod
    def _name_the_key(cls, values: Any, handler: Any) -> "Settings":
        try:
            return handler(values)
        except ValidationError as err:  # one line instead of a report; click prints it without a traceback
            wrong = [f"{'.'.join(map(str, e['loc'])) or 'settings'}: {e['msg']}" for e in err.errors()]
            raise ClickException("; ".join(wrong)) from None


def blank(text: str) -> bool:
    """True if there is nothing to translate: only white space, control, zero-width or combining characters."""
    return all(c.isspace() or unicodedata.category(c) in ("Cc", "Cf", "Mn") for c in text)


GAP = re.compile(r"\s+|(?<=[。！？])(?![\s。！？」』）])")
LINE_BREAK = re.compile(r"[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]")
SENTENCE_END = re.compile(r"""[.!?…。！？]["'»”’)\]」』）]*$""")
NO_END = re.compile(r"(^|\W)(\w|e\.g|i\.e|mr|mrs|ms|dr|st|prof|vs|cf|approx|fig)\.$", re.IGNORECASE)


def split(text: str) -> list[str]:
    """Cut a text after its sentences and lines: [sentence, gap, sentence, ...], which joined are the text."""
    parts, start = [], 0
    for gap in GAP.finditer(text):
        word, following = text[max(start, gap.start() - 20) : gap.start()], text[gap.end() : gap.end() + 1]
        ended = SENTENCE_END.search(word) and not NO_END.search(word) and not following.islower()
        if ended or not word or not following or LINE_BREAK.search(gap[0]):
            parts += [text[start : gap.start()], gap[0]]
            start = gap.end()
    return [*parts, text[start:]]


class Model:
    """A transformers seq2seq model and its tokenizer."""

    def __init__(self, settings: Settings) -> None:
        """Load it and try the answers it came with; RuntimeError, in one line, if it cannot be used."""
        beside, name, revision = Path(__file__).with_name("model"), settings.model, settings.revision
        if not name:
            name, revision = (str(beside), None) if beside.is_dir() else (HUB_MODEL, HUB_REVISION)
        dtype = torch.bfloat16 if settings.precision == "bfloat16" else torch.float32
        try:
            self.settings, self.tokenizer = settings, AutoTokenizer.from_pretrained(name, revision=revision)
            self.model = AutoModelForSeq2SeqLM.from_pretrained(name, revision=revision, dtype=dtype).eval()
        except (OSError, ValueError) as err:
            raise RuntimeError(
                f"no usable model {name!r} ({str(err).splitlines()[0]}): train and export one (`python "
                "template_flow.py run`, then `python export_model.py`), or give one (`serve run "
                "template_ray_serve:build model=PATH`)"
            ) from None
        if settings.precision == "int8":
            self.model = torch.ao.quantization.quantize_dynamic(self.model, {torch.nn.Linear}, torch.qint8)
        if len(self.encode("")) > settings.max_sentence_tokens // 2:
            raise RuntimeError("prefix: longer than half of max_sentence_tokens; shorten it or raise that")
        known = Path(name, "known_answers.json")
        for text, right in (json.loads(known.read_text("utf-8")) if known.is_file() else {}).items():
            answer = self([self.encode(text)])[0][0]
            if answer != right:
                raise RuntimeError(f"{known}: the model answers {text!r} with {answer!r}, not {right!r}")

    def encode(self, text: str) -> list[int]:
        """Token ids of prefix and text; `</s>` and the like in the text are plain text, not commands."""
        return self.tokenizer(self.settings.prefix + text, split_special_tokens=True)["input_ids"]

    def fitting(self, text: str) -> list[str]:
        """`split`, with each sentence over max_sentence_tokens cut at the white space nearest its middle."""
        parts = split(text)
        for i in reversed(range(0, len(parts), 2)):
            part, middle = parts[i], len(parts[i]) // 2
            if middle and len(self.encode(part)) > self.settings.max_sentence_tokens:
                gaps = [gap.span() for gap in re.finditer(r"\s+", part)] or [(middle, middle)]
                start, end = min(gaps, key=lambda gap: abs(gap[0] - middle))
                parts[i : i + 1] = [*self.fitting(part[:start]), part[start:end], *self.fitting(part[end:])]
        return parts

    def plan(self, texts: list[str]) -> list[list[str]]:
        """Each text as [sentence, gap, sentence, ...]; a blank text as an empty one."""
        count, limit = sum(map(len, self.tokenizer(texts)["input_ids"])), self.settings.max_request_tokens
        if count > limit:
            raise HTTPException(413, f"The request has {count} tokens; the limit is {limit}.")
        return [[""] if blank(text) else self.fitting(text) for text in texts]

    def __call__(self, batch: list[list[int]]) -> list[tuple[str, bool]]:
        """For the tokens of each sentence, its translation, and whether max_new_tokens cut that off."""
        # YOUR CODE: another task with text in and text out needs other lines here, and nothing else.
        ids = self.tokenizer.pad({"input_ids": batch}, return_tensors="pt")
        with torch.inference_mode():
            longest = self.settings.max_new_tokens
            out = self.model.generate(**ids, max_new_tokens=longest, do_sample=False, num_beams=1)
        ended = (out == self.tokenizer.eos_token_id).any(dim=1).tolist()
        texts = self.tokenizer.batch_decode(out, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return [(text, not end) for text, end in zip(texts, ended, strict=True)]


class Waiting(NamedTuple):
    """A sentence that waits for (its translation, whether that was truncated)."""

    model: Model
    tokens: list[int]
    answer: asyncio.Future


class Batcher:
    """Runs the model on one thread, each time on the sentences that came in while it was busy."""

    def __init__(self, threads: int) -> None:
        # One thread, since torch keeps a team of OpenMP threads for each thread that calls it.
        self.thread = ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(threads,))
        self.waiting: list[Waiting] = []
        self.arrived = asyncio.Event()
        self.task = asyncio.get_running_loop().create_task(self.work())
        self.sizes = metrics.Histogram("translator_batch_size", boundaries=[1, 2, 4, 8, 16, 32, 64, 128])
        self.queue = metrics.Gauge("translator_waiting_sentences")
        self.tokens = metrics.Counter("translator_input_tokens")
        self.sentences = metrics.Counter("translator_sentences", tag_keys=("outcome",))

    async def translate(self, model: Model, text: str) -> tuple[str, bool]:
        """The translation of a sentence, and whether max_new_tokens cut it off."""
        self.waiting.append(one := Waiting(model, model.encode(text), asyncio.Future()))
        self.arrived.set()
        return await one.answer

    def take(self) -> list[Waiting]:
        """The sentence that waits longest and those nearest in length: little padding, and none starves."""
        waiting = [one for one in self.waiting if not one.answer.cancelled()]  # cancelled: its client has left
        first = waiting[:1]
        fit = [one for one in waiting if one.model is first[0].model]
        fit.sort(key=lambda one: abs(len(one.tokens) - len(first[0].tokens)))
        batch = fit[: first[0].model.settings.max_batch_size] if first else []
        taken = {id(one) for one in batch}
        self.waiting = [one for one in waiting if id(one) not in taken]
        return batch

    async def work(self) -> None:
        """Whenever the model is free, give it a batch."""
        loop, size, took = asyncio.get_running_loop(), 0, 0.0
        while await self.arrived.wait():
            for _ in range(10):  # who was just answered tends to ask again: wait a little for as many as then
                if len(self.waiting) < size:
                    await asyncio.sleep(took / 100)
            start, batch = loop.time(), self.take()
            if not batch:
                self.arrived.clear()
            for one, result in zip(batch, await loop.run_in_executor(self.thread, self.run, batch), strict=True):
                ...
            size, took = len(batch), loop.time() - start
