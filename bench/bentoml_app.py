"""BentoML with its adaptive batching."""

import os

import bentoml
import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

PREFIX = "translate English to French: "


@bentoml.service(traffic={"timeout": 120, "max_concurrency": 1000}, metrics={"enabled": False})
class Translator:
    def __init__(self):
        torch.set_num_threads(int(os.environ["BENCH_THREADS"]))
        self.tokenizer = AutoTokenizer.from_pretrained(os.environ["BENCH_MODEL"])
        self.model = AutoModelForSeq2SeqLM.from_pretrained(os.environ["BENCH_MODEL"]).eval()

    @bentoml.api(batchable=True, max_batch_size=32, max_latency_ms=60_000)
    def translate(self, text: list[str]) -> list[str]:
        texts = [PREFIX + sentence for sentence in text]
        ids = self.tokenizer(texts, return_tensors="pt", padding=True)
        with torch.inference_mode():
            out = self.model.generate(**ids, do_sample=False, num_beams=1)
        return self.tokenizer.batch_decode(out, skip_special_tokens=True)
