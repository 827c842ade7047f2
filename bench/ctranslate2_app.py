"""CTranslate2 (int8) behind FastAPI, with a batch formed whenever the engine is free."""

import asyncio
import contextlib
import os
from concurrent.futures import ThreadPoolExecutor

import ctranslate2
from fastapi import FastAPI
from pydantic import BaseModel
from transformers import AutoTokenizer

PREFIX, FOLDER = "translate English to French: ", os.environ["BENCH_MODEL"]
tokenizer = AutoTokenizer.from_pretrained(FOLDER)
converted = ctranslate2.converters.TransformersConverter(FOLDER).convert(
    f"{FOLDER}-ct2", quantization="int8", force=True
)
engine = ctranslate2.Translator(converted, "cpu", intra_threads=int(os.environ["BENCH_THREADS"]))
waiting: list = []


def run(batch):
    tokens = [
        tokenizer.convert_ids_to_tokens(tokenizer(PREFIX + text)["input_ids"]) for text in batch
    ]
    done = engine.translate_batch(
        tokens,
        beam_size=1,
        min_decoding_length=20,
        max_decoding_length=20,
        suppress_sequences=[["<pad>"], ["<unk>"]],
    )
    outputs = [result.hypotheses[0] for result in done]
    return [tokenizer.decode(tokenizer.convert_tokens_to_ids(output)) for output in outputs]


async def work():
    loop, thread = asyncio.get_running_loop(), ThreadPoolExecutor(1)
    while True:
        if not waiting:
            await asyncio.sleep(0.001)
            continue
        batch, waiting[:] = waiting[:32], waiting[32:]
        for (_, answer), text in zip(
            batch, await loop.run_in_executor(thread, run, [text for text, _ in batch])
        ):
            answer.set_result(text)
        await asyncio.sleep(0.005)


@contextlib.asynccontextmanager
async def life(_):
    task = asyncio.create_task(work())
    yield
    task.cancel()


app = FastAPI(lifespan=life)


class Question(BaseModel):
    text: str


@app.post("/translate")
async def translate(question: Question):
    answer = asyncio.get_running_loop().create_future()
    waiting.append((question.text, answer))
    return {"translation": await answer}
