"""Measure training and serving on a GPU, in at most 8 minutes.

    PYTHONPATH=templates:tests python bench/gpu.py [--device cpu] [--seconds 1]

Trains the demo and exports it; then, with the model of the benchmark: what generate() alone does in
batches of 1, 32 and 128, what the server does for as many clients, how many answers differ between
a batch and alone, and the memory. With `--device cpu` it can be tried without a GPU.
"""

import argparse
import asyncio
import tempfile
import time
from pathlib import Path

import model as bench_model
import torch
import yaml
from flow_testing import python, run
from helpers.repository import TEMPLATES
from template_ray_serve import ModelRequest, Settings, load_model

import bench

SIZES = (1, 32, 128)


def train(folder):
    """Train the demo and export it; return the seconds of both."""
    begin = time.perf_counter()
    export = str(TEMPLATES / "export_model.py")
    for code, output in (run(folder), python(folder, export, "--output", "exported")):
        assert code == 0, output
    return time.perf_counter() - begin


def limit(model, size, seconds):
    """Return the texts per second that the model alone translates in batches of this size."""
    inputs = model.plan(ModelRequest(text=bench_model.texts("equal")[:size]))
    model(inputs)
    calls = 0
    begin = time.perf_counter()
    while time.perf_counter() - begin < seconds:
        model(inputs)
        calls += 1
    return calls * size / (time.perf_counter() - begin)


def different(model):
    """Return how many of 128 texts of mixed lengths get another answer in a batch than alone."""
    inputs = model.plan(ModelRequest(text=bench_model.texts("mixed")[:128]))
    alone = [model([sentence])[0] for sentence in inputs]
    together = [
        output for start in range(0, 128, 32) for output in model(inputs[start : start + 32])
    ]
    return sum(one != other for one, other in zip(alone, together))


def server(precision, gpus):
    """Return what bench.Server starts: the template, with a GPU if there is one."""

    def config(folder):
        arguments, where = bench.template(precision)(folder)
        file = Path(arguments[-1])
        content = yaml.safe_load(file.read_text())
        application = content["applications"][0]
        application["args"]["max_batch_size"] = max(SIZES)
        application["deployments"][0]["ray_actor_options"]["num_gpus"] = gpus
        file.write_text(yaml.safe_dump(content))
        return arguments, where

    return None, config


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--seconds", type=float, default=10, help="of each measurement")
    arguments = parser.parse_args()
    on_gpu = arguments.device == "cuda"
    name = torch.cuda.get_device_name() if on_gpu else "CPU"
    print(f"{name}, torch {torch.__version__}", flush=True)
    with tempfile.TemporaryDirectory(prefix="gpu.", dir="/tmp") as scratch:
        folder = Path(scratch)
        print(f"demo trained and exported in {train(folder):.0f} s", flush=True)
        bench_model.main(folder / "model")
        for precision in ("float32", "bfloat16"):
            settings = Settings(
                model=str(folder / "model"),
                device=arguments.device,
                precision=precision,
                max_new_tokens=20,
            )
            model = load_model(settings, threads=bench.THREADS)
            limits = {size: limit(model, size, arguments.seconds) for size in SIZES}
            wrong = different(model)
            memory = torch.cuda.max_memory_allocated() / 1e6 if on_gpu else 0
            del model
            print(f"{precision}: {wrong} of 128 answers depend on the batch, {memory:.0f} MB")
            with bench.Server("template", folder, server(precision, int(on_gpu))):
                for size, most in limits.items():
                    loop = bench.closed_loop("template", size, "equal", arguments.seconds)
                    rate = asyncio.run(loop)["requests_per_s"]
                    share = rate / most
                    print(
                        f"  {size} clients: {rate:.1f}/s of {most:.1f}/s ({share:.2f})", flush=True
                    )


if __name__ == "__main__":
    main()
