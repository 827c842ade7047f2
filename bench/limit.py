"""What the hardware can do: generate() in this process, in batches of 1, 8 and 32.

python limit.py FOLDER SECONDS THREADS
"""

import json
import sys
import time

import torch
from helpers.arrivals import percentile
from model import PREFIX, texts
from template_ray_serve import use_int8
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer


def main(folder, seconds, threads):
    torch.set_num_threads(int(threads))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for precision in ("float32", "bfloat16", "int8"):
        model = AutoModelForSeq2SeqLM.from_pretrained(
            folder, dtype=precision.replace("int8", "float32")
        ).eval()
        if precision == "int8":
            use_int8(model)
        for size in (1, 8, 32):
            for mix in ("equal", "mixed"):
                many, times, end = texts(mix), [], time.perf_counter() + float(seconds)
                while time.perf_counter() < end or len(times) < 2:
                    begin, at = time.perf_counter(), len(times) * size % len(many)
                    batch = [PREFIX + text for text in many[at : at + size]]
                    ids = tokenizer(batch, return_tensors="pt", padding=True)
                    with torch.inference_mode():
                        out = model.generate(**ids, do_sample=False, num_beams=1)
                    tokenizer.batch_decode(out, skip_special_tokens=True)
                    times.append(time.perf_counter() - begin)
                times = [1000 * took for took in times[1:]]
                print(
                    json.dumps(
                        {
                            "server": f"limit {precision}",
                            "clients": size,
                            "mix": mix,
                            "requests_per_s": 1000 * size * len(times) / sum(times),
                            "p50_ms": percentile(times, 50),
                            "p99_ms": percentile(times, 99),
                            "errors": 0,
                        }
                    ),
                    flush=True,
                )


if __name__ == "__main__":
    main(*sys.argv[1:])
