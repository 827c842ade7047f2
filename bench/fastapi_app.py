"""FastAPI and uvicorn alone: each request on a thread of FastAPI's pool."""

import os

import torch
from fastapi import FastAPI
from pydantic import BaseModel
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

PREFIX = "translate English to French: "
torch.set_num_threads(int(os.environ["BENCH_THREADS"]))
tokenizer = AutoTokenizer.from_pretrained(os.environ["BENCH_MODEL"])
model = AutoModelForSeq2SeqLM.from_pretrained(os.environ["BENCH_MODEL"])
app = FastAPI()


class Question(BaseModel):
    text: str


@app.post("/translate")
def translate(question: Question):
    ids = tokenizer(PREFIX + question.text, return_tensors="pt")
    with torch.inference_mode():
        out = model.generate(**ids, do_sample=False, num_beams=1)
    return {"translation": tokenizer.decode(out[0], skip_special_tokens=True)}
