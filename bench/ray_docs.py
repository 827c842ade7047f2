"""The form of Ray's own tutorial: one request at a time, no batches."""

import os

import torch
from ray import serve
from starlette.requests import Request
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

PREFIX, THREADS = "translate English to French: ", int(os.environ["BENCH_THREADS"])


@serve.deployment(ray_actor_options={"num_cpus": THREADS})
class Translator:
    def __init__(self):
        torch.set_num_threads(THREADS)
        self.tokenizer = AutoTokenizer.from_pretrained(os.environ["BENCH_MODEL"])
        self.model = AutoModelForSeq2SeqLM.from_pretrained(os.environ["BENCH_MODEL"])

    def translate(self, text):
        out = self.model.generate(
            **self.tokenizer(PREFIX + text, return_tensors="pt"), do_sample=False, num_beams=1
        )
        return self.tokenizer.decode(out[0], skip_special_tokens=True)

    async def __call__(self, request: Request):
        return {"translation": self.translate((await request.json())["text"])}


app = Translator.bind()
