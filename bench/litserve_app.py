"""LitServe with its own batching."""

import os

import litserve
import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

PREFIX = "translate English to French: "


class Translator(litserve.LitAPI):
    def setup(self, device):
        torch.set_num_threads(int(os.environ["BENCH_THREADS"]))
        self.tokenizer = AutoTokenizer.from_pretrained(os.environ["BENCH_MODEL"])
        self.model = AutoModelForSeq2SeqLM.from_pretrained(os.environ["BENCH_MODEL"]).eval()

    def decode_request(self, request):
        return request["text"]

    def predict(self, batch):
        ids = self.tokenizer([PREFIX + text for text in batch], return_tensors="pt", padding=True)
        with torch.inference_mode():
            out = self.model.generate(**ids, do_sample=False, num_beams=1)
        return self.tokenizer.batch_decode(out, skip_special_tokens=True)

    def encode_response(self, output):
        return {"translation": output}


if __name__ == "__main__":
    api = Translator(max_batch_size=32, batch_timeout=0.02, api_path="/translate")
    server = litserve.LitServer(api, accelerator="cpu", timeout=120)
    server.run(host="127.0.0.1", port=int(os.environ["BENCH_PORT"]), generate_client_file=False)
