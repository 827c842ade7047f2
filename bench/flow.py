"""What Metaflow and W&B cost a training: the same functions in the flow and in a plain script.

    PYTHONPATH=templates:tests python bench/flow.py [--times 1,10,100]

Trains one epoch on the demo's sentences, and on 10 and 100 times as many. Prints a table.
"""

import argparse
import os
import re
import tempfile
import time
from pathlib import Path

import template_flow as flow
from flow_testing import python, run
from helpers.repository import TEMPLATES

PLAIN = """
import sys
from types import SimpleNamespace
import template_flow as flow
settings = SimpleNamespace(data=sys.argv[1], base_model="", source_language="", target_language="",
    epochs=1, learning_rate=5e-3, tuning_rate=0, seconds=0, seed=0)
training, _ = flow.split(flow.read(settings))
model = flow.new_model(training, settings)
flow.fit(model, training, settings, sys.argv[2], lambda: None, lambda numbers: None)
sources = [source for source, _ in training]
print("counted:", len(training), sum(map(len, flow.encode(model, sources))))
"""


def write_pairs(path, times):
    """Write the demo's pairs `times` times, numbered so that all of them are different."""
    lines = ["source\ttarget"]
    for number in range(times):
        for source, target in flow.demo_pairs():
            lines.append(
                f"{number} {source}\t{number} {target}" if number else f"{source}\t{target}"
            )
    path.write_text("\n".join(lines) + "\n", "utf-8")


def seconds_of(command, folder):
    """Return how long a command takes, and what it prints."""
    begin = time.perf_counter()
    code, output = python(folder, *command)
    assert code == 0, output
    return time.perf_counter() - begin, output


def starts(folder):
    """Print how long it takes until training begins."""
    script = str(TEMPLATES / "template_flow.py")
    print("| before the training | s |\n|---|---|")
    imports, _ = seconds_of(["-c", "import template_flow"], folder)
    print(f"| import of template_flow.py | {imports:.1f} |")
    without, _ = seconds_of([script, "--no-pylint", "check"], folder)
    print(f"| `check` without lint | {without:.1f} |")
    lint, _ = seconds_of([script, "--pylint", "check"], folder)
    print(f"| `check` with lint, as each `run` does | {lint:.1f} |", flush=True)
    packages, _ = seconds_of(["-c", "from transformers import Trainer"], folder)
    print(f"| import of torch and transformers, in `train` and in `evaluate` | {packages:.1f} |\n")


def loop_seconds(output):
    """Return how long the training loop took, as the Trainer reports it."""
    return float(re.search(r"'train_runtime': '([\d.]+)'", output)[1])


def trainings(folder, times):
    """Print the times of a training in the flow and without it."""
    print(
        "| sentences | loop, s: script | flow | tokens/s: script | flow | whole, s: script | flow |"
    )
    print("|---|---|---|---|---|---|---|")
    for number in times:
        data = folder / f"{number}.tsv"
        write_pairs(data, number)
        with tempfile.TemporaryDirectory() as scratch:
            script, output = seconds_of(["-c", PLAIN, str(data), scratch], folder)
        count, tokens = map(int, re.search(r"counted: (\d+) (\d+)", output).groups())
        plain = loop_seconds(output)
        begin = time.perf_counter()
        _, output = run(folder, "--data", str(data), "--epochs", "1", seconds=3000)
        whole = time.perf_counter() - begin  # with all other steps
        loop = loop_seconds(output)
        print(
            f"| {count} | {plain:.1f} | {loop:.1f} | {tokens / plain:.0f} | {tokens / loop:.0f} "
            f"| {script:.0f} | {whole:.0f} |",
            flush=True,
        )


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--times", default="1,10,100")
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count()))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        starts(folder)
        trainings(folder, [int(number) for number in arguments.times.split(",")])


if __name__ == "__main__":
    main()
