"""Compare engines that compute in int8, in one process, without a server: speed and quality.

    python engines.py                                          all, in an environment of their own
    python engines.py ENGINE FOLDER TEXTS.json SECONDS THREADS   one, here

Speed is measured with the model of bench.py, quality on held-out texts with a translator that the
flow trains on the message catalogues of two packages.
"""

import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

HERE = Path(__file__).parent
ENGINES = {  # name, as in page.py: its virtual environment
    "float32": None,
    "template int8": None,
    "torchao": "torchao",
    "onnxruntime": "onnxruntime",
    "openvino": "openvino",
    "ctranslate2": "ctranslate2",
}
SIZES = (1, 8, 32)
PREFIX = "translate English to French: "


# -- The engines -----------------------------------------------------------------------------------


def load_torch(folder, threads):
    import transformers

    return transformers.AutoModelForSeq2SeqLM.from_pretrained(folder, dtype="float32").eval()


def load_template(folder, threads):
    from template_ray_serve import use_int8

    model = load_torch(folder, threads)
    use_int8(model)
    return model


def load_torchao(folder, threads):
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    model = load_torch(folder, threads)
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return model


def load_onnxruntime(folder, threads):
    import onnxruntime
    from optimum.onnxruntime import ORTModelForSeq2SeqLM, ORTQuantizer
    from optimum.onnxruntime.configuration import AutoQuantizationConfig

    exported, quantized = f"{folder}-onnx", f"{folder}-onnx-int8"
    ORTModelForSeq2SeqLM.from_pretrained(folder, export=True).save_pretrained(exported)
    config = AutoQuantizationConfig.avx512_vnni(is_static=False, per_channel=True)
    for file in Path(exported).glob("*.onnx"):
        quantizer = ORTQuantizer.from_pretrained(exported, file_name=file.name)
        quantizer.quantize(save_dir=quantized, quantization_config=config, file_suffix="")
    for file in Path(exported).glob("*.json"):
        shutil.copy(file, quantized)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return ORTModelForSeq2SeqLM.from_pretrained(quantized, session_options=options)


def load_openvino(folder, threads):
    from optimum.intel import OVModelForSeq2SeqLM

    settings = {"INFERENCE_NUM_THREADS": str(threads), "PERFORMANCE_HINT": "LATENCY"}
    return OVModelForSeq2SeqLM.from_pretrained(
        folder, export=True, load_in_8bit=True, ov_config=settings
    )


LOAD = {  # those that have `generate`
    "float32": load_torch,
    "template int8": load_template,
    "torchao": load_torchao,
    "onnxruntime": load_onnxruntime,
    "openvino": load_openvino,
}


def by_generate(model, tokenizer):
    """Return the function that translates texts with a model that has `generate`."""
    import torch

    def translate(texts):
        ids = tokenizer([PREFIX + text for text in texts], return_tensors="pt", padding=True)
        with torch.inference_mode():
            tokens = model.generate(**ids, do_sample=False, num_beams=1)
        return tokenizer.batch_decode(tokens, skip_special_tokens=True)

    return translate


def by_ctranslate2(folder, tokenizer, threads):
    import ctranslate2

    converter = ctranslate2.converters.TransformersConverter(folder)
    converted = Path(converter.convert(f"{folder}-ct2", quantization="int8", force=True))
    config = json.loads((converted / "config.json").read_text())
    config["unk_token"] = config["unk_token"] or "<pad>"  # the flow's tokenizer needs none
    (converted / "config.json").write_text(json.dumps(config))
    engine = ctranslate2.Translator(str(converted), "cpu", intra_threads=threads)
    generation = json.loads(Path(folder, "generation_config.json").read_text())

    def translate(texts):
        ids = tokenizer([PREFIX + text for text in texts])["input_ids"]
        done = engine.translate_batch(
            [tokenizer.convert_ids_to_tokens(tokens) for tokens in ids],
            beam_size=1,
            min_decoding_length=generation.get("min_new_tokens") or 1,
            max_decoding_length=generation["max_new_tokens"],
            suppress_sequences=[["<pad>"]] if generation.get("suppress_tokens") else None,
        )
        tokens = [tokenizer.convert_tokens_to_ids(result.hypotheses[0]) for result in done]
        return tokenizer.batch_decode(tokens, skip_special_tokens=True)

    return translate


def load(engine, folder, threads):
    """Return the function that translates a list of texts."""
    if engine == "openvino":
        sys.modules["torchvision"] = None  # which it requires, does not use, and cannot import
    from transformers import PreTrainedTokenizerFast  # transformers 4 does not know its new name

    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    if engine == "ctranslate2":
        return by_ctranslate2(folder, tokenizer, threads)
    return by_generate(LOAD[engine](folder, threads), tokenizer)


# -- One engine ------------------------------------------------------------------------------------


def speed(translate, texts, size, seconds):
    """Return texts/s in batches of this size."""
    batches = itertools.cycle(range(0, len(texts) - size + 1, size))
    translate(texts[:size])  # the first batch is slower
    done, begin = 0, time.perf_counter()
    while time.perf_counter() < begin + seconds:
        start = next(batches)
        done += len(translate(texts[start : start + size]))
    return done / (time.perf_counter() - begin)


def run(engine, folder, file, seconds, threads):
    """Write {"rates": {size: texts/s}, "alone": translations, "together": translations}."""
    import torch

    torch.set_num_threads(int(threads))
    given = json.loads(Path(file).read_text("utf-8"))
    translate = load(engine, f"{folder}/fast", int(threads))
    rates = {
        size: round(speed(translate, given["fast"], size, float(seconds)), 1) for size in SIZES
    }
    translate = load(engine, f"{folder}/trained", int(threads))
    texts = given["trained"]
    alone = [translate([text])[0] for text in texts]
    together = []
    for start in range(0, len(texts), 32):
        together += translate(texts[start : start + 32])
    Path(f"{file}.{engine}").write_text(
        json.dumps({"rates": rates, "alone": alone, "together": together}), "utf-8"
    )


# -- All of them -----------------------------------------------------------------------------------


def train(folder):
    """Train the translator; write it to a folder, and return held-out pairs."""
    from flow_testing import artifacts
    from flow_testing import run as run_flow
    from helpers import real_pairs

    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        real_pairs.write(scratch / "pairs.tsv", longest=40)
        options = ("--data", "pairs.tsv", "--epochs", "30")
        code, output = run_flow(scratch, *options, seconds=3000)
        assert code == 0, output
        for name, content in artifacts(scratch, "train")["model"].items():
            folder.mkdir(exist_ok=True)
            (folder / name).write_bytes(content)
        return artifacts(scratch, "evaluate")["held_out"][:200]


def main():
    import page
    from model import texts
    from sacrebleu.metrics import CHRF

    import bench

    folder = Path(tempfile.mkdtemp(prefix="bench.", dir="/tmp"))
    try:
        subprocess.run([sys.executable, HERE / "model.py", folder / "fast"], check=True)
        sources, targets = zip(*train(folder / "trained"))
        file = folder / "texts.json"
        file.write_text(json.dumps({"fast": texts("equal"), "trained": sources}), "utf-8")
        found = {}
        for engine, venv in ENGINES.items():
            python = HERE / f".venv-{venv}/bin/python" if venv else sys.executable
            command = [python, __file__, engine, folder, file, "5", str(bench.THREADS)]
            environment = {**os.environ, "OMP_NUM_THREADS": str(bench.THREADS)}
            log = folder / "log"
            with log.open("w") as output:
                done = subprocess.run(
                    command, env=environment, stdout=output, stderr=subprocess.STDOUT
                )
            if done.returncode:
                raise SystemExit(f"{engine} failed:\n{log.read_text()[-3000:]}")
            found[engine] = json.loads(Path(f"{file}.{engine}").read_text("utf-8"))
            print(engine, found[engine]["rates"], flush=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    right = found["float32"]["alone"]
    rows = {}
    for engine, of in found.items():
        rows[engine] = {
            "rates": of["rates"],
            "chrf": round(CHRF().corpus_score(of["together"], [targets]).score, 2),
            "other": sum(map(str.__ne__, of["together"], right)),
            "batch": sum(map(str.__ne__, of["together"], of["alone"])),
        }
        print(engine, rows[engine], flush=True)
    page.add("engines", {"date": str(date.today()), "found": rows})


if __name__ == "__main__":
    run(*sys.argv[1:]) if len(sys.argv) > 1 else main()
