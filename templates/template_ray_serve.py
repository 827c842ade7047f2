# template_ray_serve.py, version 0.1.0
"""Serve a text-to-text model (here a translator) over HTTP with Ray Serve.

    serve run template_ray_serve:translator_app --route-prefix "/translate"
    curl -d '{"text": "Hello world!"}' -H "Content-Type: application/json" http://127.0.0.1:8000/translate

It serves the folder `model/` beside this file, which export_model.py writes, else a small model from the hub.
Any other model, and every other setting below, by arguments only:

    serve run template_ray_serve:build model=/path/to/model prefix=" " --route-prefix "/translate"
"""

import asyncio
import json
import re
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, Literal

import ray
import torch
from click import ClickException
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import HTMLResponse, JSONResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from ray import serve
from ray.serve import metrics
from starlette.exceptions import HTTPException as AnyHTTPException
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

# YOUR CODE: what your model expects before each sentence, and the model to fetch when there is no `model/`.
PREFIX = "translate English to French: "
HUB_MODEL, HUB_REVISION = "google-t5/t5-small", "df1b051c49625cf57a3d0d8d3863ed4cc13564fe"


class Settings(BaseModel):
    """All you can set: `key=value` after `template_ray_serve:build`, or `args` in serve_config.yaml."""
    model_config = ConfigDict(extra="forbid")
    model: str = Field("", description="Folder or hub name; empty: `model/` beside this file, or HUB_MODEL")
    revision: str | None = Field(None, description="Commit of a hub model; pin it, for its files can change")
    prefix: str = Field(PREFIX, description="Put before every sentence; most models but T5 need none, \" \"")
    precision: Literal["float32", "bfloat16", "int8"] = Field("float32", description="The safe one, or a faster one")
    max_batch_size: int = Field(32, ge=1, le=1024, description="Sentences in one call of the model")
    max_sentence_tokens: int = Field(128, ge=16, le=4096, description="A longer sentence is cut at a space")
    max_new_tokens: int = Field(256, ge=1, le=4096, description="Longest translation of one sentence")
    max_request_tokens: int = Field(10_000, ge=1, description="A longer request gets 413")
    max_body_bytes: int = Field(256 * 1024, ge=1, description="A larger body gets 413 and is not read on")
    body_timeout_s: float = Field(10, gt=0, description="A body that has not arrived by then gets 408")
    max_queue: int = Field(256, ge=1, description="With so many sentences waiting, new requests get 503")
    timeout_s: float = Field(50, gt=0, description="A request not done by then gets 504")

    @model_validator(mode="wrap")
    @classmethod
    def name_the_key(cls, values: Any, handler: Any) -> "Settings":
        try:
            return handler(values)
        except ValidationError as err:  # in one line, which `serve run` prints without a traceback
            wrong = "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in err.errors())
            raise ClickException(wrong) from None


def blank(text: str) -> bool:
    """True if there is nothing to translate: only white space, control, zero-width or combining characters."""
    return all(c.isspace() or unicodedata.category(c) in ("Cc", "Cf", "Mn") for c in text)


# The gaps between sentences: around line breaks, and after . ! ? unless followed by a small letter.
GAPS = re.compile(r"""(^\s+|(?<!\s)\s+$|(?<!\s)\s*[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]\s*|(?<=[。！？])
    |(?:(?<=[.!?…])|(?<=[.!?…]["'»”’)]))(?<!\b\w\.)(?<!\b(?:Mr|Ms|Dr|St|vs)\.)(?<!\b(?:Mrs|e\.g|i\.e)\.)\s+(?![a-z\s]))""",
                  re.VERBOSE)


class Model:
    """A transformers seq2seq model and its tokenizer."""
    def __init__(self, settings: Settings) -> None:
        """Load it and try the answers it came with; RuntimeError, in one line, if it cannot be used."""
        beside, name, revision = Path(__file__).with_name("model"), settings.model, settings.revision
        if not name:
            name, revision = (str(beside), None) if beside.is_dir() else (HUB_MODEL, HUB_REVISION)
        try:
            self.settings, self.tokenizer = settings, AutoTokenizer.from_pretrained(name, revision=revision)
            dtype = settings.precision.replace("int8", "float32")
            self.model = AutoModelForSeq2SeqLM.from_pretrained(name, revision=revision, dtype=dtype).eval()
            if settings.precision == "int8":  # weights now, what flows between the layers at each call
                self.model = torch.ao.quantization.quantize_dynamic(self.model, {torch.nn.Linear}, torch.qint8)
        except Exception as err:  # many kinds: no folder, no hub, a broken file, a package that this tokenizer needs
            reason = (str(err).splitlines() or [repr(err)])[0]
            raise RuntimeError(
                f"no usable model {name!r} ({reason}): make one (`python template_flow.py run` and "
                "`python export_model.py`), or name one (`serve run template_ray_serve:build model=PATH`)") from None
        if len(self.encode("")) > settings.max_sentence_tokens // 2:
            raise RuntimeError("prefix: takes more than half of max_sentence_tokens")
        known = Path(name, "known_answers.json")
        for text, right in (json.loads(known.read_text("utf-8")) if known.is_file() else {}).items():
            if (answer := self([self.encode(text)])[0][0]) != right:
                raise RuntimeError(f"{known}: the model answers {text!r} with {answer!r}, not {right!r}")

    def encode(self, text: str) -> list[int]:
        """Token ids of prefix and text; `</s>` and the like in the text are plain text, not commands."""
        return self.tokenizer(self.settings.prefix.lstrip() + text, split_special_tokens=True)["input_ids"]

    def fitting(self, text: str) -> list[str]:
        """[sentence, gap, sentence, ...], joined the text; one over max_sentence_tokens is cut near its middle."""
        parts = GAPS.split(text)
        for i in reversed(range(0, len(parts), 2)):
            part, middle = parts[i], len(parts[i]) // 2
            if middle and len(self.encode(part)) > self.settings.max_sentence_tokens:
                gaps = [gap.span() for gap in re.finditer(r"\s+", part)] or [(middle, middle)]
                start, end = min(gaps, key=lambda gap: abs(gap[0] - middle))
                parts[i : i + 1] = [*self.fitting(part[:start]), part[start:end], *self.fitting(part[end:])]
        return parts

    def plan(self, texts: list[str]) -> tuple[list[list[str]], list[list[int]]]:
        """Each text as [sentence, gap, sentence, ...], and the tokens of each sentence that is not blank."""
        count, limit = sum(len(self.encode(text)) for text in texts), self.settings.max_request_tokens
        if count > limit:
            raise HTTPException(413, f"The request has {count} tokens; the limit is {limit}.")
        plans = [[""] if blank(text) else self.fitting(text) for text in texts]
        return plans, [self.encode(part) for plan in plans for part in plan[::2] if not blank(part)]

    def __call__(self, batch: list[list[int]]) -> list[tuple[str, bool]]:
        """For the tokens of each sentence, its translation, and whether max_new_tokens cut that off."""
        # YOUR CODE: another task with text in and text out needs other lines here, and nothing else.
        ids = self.tokenizer.pad({"input_ids": batch}, return_tensors="pt")
        with torch.inference_mode():
            out = self.model.generate(**ids, max_new_tokens=self.settings.max_new_tokens, do_sample=False, num_beams=1)
        texts = self.tokenizer.batch_decode(out, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return list(zip(texts, (out != self.tokenizer.eos_token_id).all(dim=1).tolist(), strict=True))


class Batcher:
    """Runs the model on one thread, each time on the sentences that came in while it was busy."""
    def __init__(self, model: Model, thread: ThreadPoolExecutor) -> None:
        self.model, self.size, self.thread = model, model.settings.max_batch_size, thread
        self.waiting: dict[asyncio.Future, list[int]] = {}  # the tokens of each sentence, by its result to come
        self.worker: asyncio.Task | None = None
        self.sizes = metrics.Histogram("translator_batch_size", boundaries=[1, 2, 4, 8, 16, 32, 64, 128])
        self.tokens = metrics.Counter("translator_input_tokens")
        self.cut = metrics.Counter("translator_cut_sentences")

    def put(self, tokens: list[int]) -> asyncio.Future:
        """Queue a sentence; cancel what comes back, and the model never sees it."""
        loop = asyncio.get_running_loop()
        answer, self.newest = loop.create_future(), loop.time()
        self.waiting[answer] = tokens
        if not self.worker or self.worker.done():
            self.worker = asyncio.create_task(self.work())
        return answer

    def alive(self) -> dict[asyncio.Future, list[int]]:
        """Those that wait, without those whose client has left."""
        self.waiting = {one: tokens for one, tokens in self.waiting.items() if not one.done()}
        return self.waiting

    def take(self) -> dict[asyncio.Future, list[int]]:
        """The sentence that waits longest and those nearest in length: little padding, and none starves."""
        waiting = self.alive()
        length = len(next(iter(waiting.values()), []))
        near = sorted(waiting, key=lambda one: abs(len(waiting[one]) - length))[: self.size]
        return {one: waiting.pop(one) for one in near}

    async def work(self) -> None:
        """Give the model batch after batch until nobody waits."""
        loop = asyncio.get_running_loop()
        while batch := self.take():
            tokens, begin = list(batch.values()), loop.time()
            results = await loop.run_in_executor(self.thread, self.run, tokens)
            for one, result in zip(batch, results, strict=True):
                if not one.done():
                    one.set_result(result)
            self.sizes.observe(len(batch))
            self.tokens.inc(sum(map(len, tokens)))
            # Those just answered tend to ask again, and with them one batch does what takes two: wait while they come.
            full, now = min(len(batch) + len(self.alive()), self.size), loop.time()
            limit = now + (now - begin) / 2
            while 1 < full > len(self.alive()) and loop.time() < min(max(now + 0.1, self.newest + 0.05), limit):
                await asyncio.sleep(0.002)

    def run(self, batch: list[list[int]]) -> list:
        """A result or an exception for each; a batch that fails is tried one by one, so none harms another."""
        try:
            return self.model(batch)
        except Exception as err:
            return [err] if len(batch) == 1 else [self.run([tokens])[0] for tokens in batch]


class Question(BaseModel):
    """What is asked: one text, or several."""
    model_config = ConfigDict(extra="forbid", strict=True, json_schema_extra={"example": {"text": "Hello world!"}})
    text: str | Annotated[list[str], Field(max_length=1000)]


class Answer(BaseModel):
    """What comes back: the translation, or as many as there were texts, in their order."""
    translation: str | list[str]
    cut_sentences: int = Field(0, description="Sentences whose translation was cut at max_new_tokens; left out if none")


PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>Translator</title>
<style>body {font: 16px sans-serif; max-width: 40em; margin: 2em auto} textarea {width: 100%}</style>
<h1>Translator</h1><form><textarea rows="5" aria-label="Text">Hello world!</textarea><p><button>Translate</button>
</form><pre aria-live="polite" style="white-space: pre-wrap"></pre><script>
document.forms[0].onsubmit = async event => {
  event.preventDefault()
  const headers = {"Content-Type": "application/json"}, text = document.querySelector("textarea").value
  const reply = await fetch("", {method: "POST", headers, body: JSON.stringify({text})}), answer = await reply.json()
  document.querySelector("pre").textContent = reply.ok ? answer.translation : answer.error.message }</script></html>"""


class BothForms:
    """Makes `/translate` mean `/translate/`: a redirect would answer a POST with nothing."""
    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, *channels: Any) -> None:
        bare = scope["type"] == "http" and scope["path"] == scope.get("root_path")
        await self.app({**scope, "path": scope["path"] + "/"} if bare else scope, *channels)


CLOSE = {"Connection": "close"}  # the rest of such a body is not worth reading
api = FastAPI(title="Translator", redirect_slashes=False)
api.add_middleware(BothForms)


@api.exception_handler(AnyHTTPException)
async def refuse(_: Request, err: AnyHTTPException) -> JSONResponse:
    """Every error has one shape, and none repeats what the client sent."""
    return JSONResponse({"error": {"code": err.status_code, "message": err.detail}}, err.status_code, err.headers)


async def read(request: Request, limit: int) -> Question:
    """The question in a request; HTTPException 413, 415 or 422 if there is none."""
    if not re.match(r"\s*application/json\s*(;|$)", request.headers.get("content-type", "application/json"), re.I):
        raise HTTPException(415, "Send JSON with the header Content-Type: application/json.")
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > limit:
            raise HTTPException(413, f"The body is larger than {limit} bytes.", CLOSE)
    try:
        return Question.model_validate_json(bytes(body))
    except ValidationError:
        raise HTTPException(422, 'Send {"text": "..."} or {"text": ["...", up to 1000]}, nothing else.') from None


# More ongoing requests than max_queue: it is this app that refuses, in its own words. Where even those are too many,
# Ray's own backoff would pass on but a few a second. No second try of a bad model.
@serve.deployment(max_ongoing_requests=320, max_queued_requests=256, max_constructor_retry_count=1,
                  request_router_config={"initial_backoff_s": 0.002, "max_backoff_s": 0.01},
                  ray_actor_options={"num_cpus": 1})
@serve.ingress(api)
class Translator:
    """Answers over HTTP; one replica holds one model."""
    def __init__(self, settings: Settings) -> None:
        threads = int(ray.get_runtime_context().get_assigned_resources().get("CPU", 1)) or 1
        # All on one thread: each thread that calls torch gets a team of OpenMP threads, and two teams slow each other.
        thread = ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(threads,))
        self.settings, self.model = settings, thread.submit(Model, settings).result()
        self.batcher = Batcher(self.model, thread)

    @api.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def page(self) -> str:
        return PAGE

    @api.get("/health")
    async def health(self) -> dict[str, str]:
        return {"status": "ok"}

    @api.post("/", response_model=Answer, response_model_exclude_defaults=True, openapi_extra={
        "requestBody": {"required": True, "content": {"application/json": {"schema": Question.model_json_schema()}}}})
    async def answer(self, request: Request) -> Answer:
        """Translate one text or a list of texts."""
        try:
            question = await asyncio.wait_for(read(request, self.settings.max_body_bytes), self.settings.body_timeout_s)
        except TimeoutError:
            raise HTTPException(408, f"No whole body within {self.settings.body_timeout_s:g} s.", CLOSE) from None
        texts = [question.text] if isinstance(question.text, str) else question.text
        plans, sentences = await asyncio.to_thread(self.model.plan, texts)  # a long text must not hold up the others
        if sentences and len(self.batcher.alive()) >= self.settings.max_queue:
            raise HTTPException(503, "Too many sentences are waiting; try again soon.", {"Retry-After": "1"})
        try:
            # A timeout, or a client that leaves, cancels what still waits for the model.
            done = await asyncio.wait_for(asyncio.gather(*map(self.batcher.put, sentences)), self.settings.timeout_s)
        except TimeoutError:
            raise HTTPException(504, f"Not done within {self.settings.timeout_s:g} seconds; try less text.") from None
        if failed := [type(one).__name__ for one in done if isinstance(one, Exception)]:
            raise HTTPException(500, f"The model failed on this text: {failed[0]}.")
        new, cut = iter(done), sum(cut for _, cut in done)
        out = ["".join(part if i % 2 or blank(part) else next(new)[0] for i, part in enumerate(plan)) for plan in plans]
        if cut:
            self.batcher.cut.inc(cut)
        return Answer(translation=out[0] if isinstance(question.text, str) else out, cut_sentences=cut)


def build(args: Settings) -> serve.Application:
    """The application for `serve run template_ray_serve:build key=value ...`, or for `args` in serve_config.yaml."""
    return Translator.bind(args)  # type: ignore[attr-defined]


translator_app = build(Settings())
