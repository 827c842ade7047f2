# flow_testing.py, version 0.1.0
"""What the tests of the flow share: runs as a command in a temporary folder, and a toy task.

code, output = run(folder, "--epochs", "2")
scores = artifacts(folder, "evaluate")["scores"]
"""

import base64
import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

FLOW = Path(__file__).with_name("template_flow.py")
CLASS = "TemplateFlow"
for setting in list(os.environ):
    if re.match("_*(METAFLOW|WANDB|REMOTE_CONFIG)", setting):
        del os.environ[setting]  # your settings must not change what is tested
os.environ.update({"METAFLOW_USER": "test", "HF_HUB_OFFLINE": "1"})


def clean_environment(folder):
    """Return the environment in which everything that Metaflow writes goes to `folder`."""
    import_path = [str(FLOW.parent), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "METAFLOW_HOME": str(folder / "none"),
        "METAFLOW_CLIENT_CACHE_PATH": str(folder / "cache"),
        "NETRC": str(folder / "none"),  # of `wandb login`
        "PYTHONPATH": os.pathsep.join(import_path),
    }


def python(folder, *arguments, seconds=400, **environment):
    """Run Python in `folder`; return (exit code, everything it printed)."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        timeout=seconds,
        env={**clean_environment(folder), **environment},
        text=True,
        encoding="utf-8",
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    return done.returncode, done.stdout


def run(folder, *arguments, command=("run",), flow=FLOW, seconds=400, **environment):
    """Run the flow in `folder`; return (exit code, everything it printed)."""
    return python(
        folder,
        str(flow),
        "--no-pylint",
        *command,
        *arguments,
        seconds=seconds,
        **environment,
    )


def artifacts(folder, step, **environment):
    """Return the artifacts of the newest task of a step, read in a separate process."""
    script = f"""
import pickle, sys
for heavy in ("torch", "transformers", "wandb"):
    sys.modules[heavy] = None  # artifacts are plain data: none of these is needed to read them
from metaflow import Flow
task = next(iter(Flow({CLASS!r})))["{step}"].task
sys.stdout.buffer.write(pickle.dumps({{artifact.id: artifact.data for artifact in task}}))
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=folder,
        env={**clean_environment(folder), **environment},
        timeout=400,
        check=True,
        stdout=subprocess.PIPE,
    )
    return pickle.loads(done.stdout)


def cards(folder, step):
    """Return what the HTML cards of the newest run's step show, as JSON."""
    runs = folder / f".metaflow/mf.cards/{CLASS}/runs"
    newest = max(runs.iterdir(), key=lambda path: int(path.name))
    shown = []
    for file in newest.glob(f"steps/{step}/tasks/*/cards/*.html"):
        # <script>... window.__MF_DATA__["CARD"] = "BASE64" ...</script>
        html = file.read_text("utf-8")
        for data in re.findall(r'__MF_DATA__\["[^"]+"\] = "([^"]+)"', html):
            content = json.loads(base64.b64decode(data))
            shown.append(json.dumps(content, ensure_ascii=False))
    return shown


def assert_card_shows(folder, step, *texts):
    """Fail unless one card of the newest run's step shows all of these texts."""
    shown = cards(folder, step)
    assert any(all(text in card for text in texts) for card in shown), shown


def assert_fails_in_one_line(code, output, expected):
    """Fail unless a command failed with the expected message and without a traceback."""
    assert code != 0, output
    assert expected in output, output
    assert "Traceback" not in output, output


# -- A toy in place of your work -------------------------------------------------------------------

BEGIN = "# YOUR CODE: begin\n"
END = "# YOUR CODE: end\n"

# The toy learns numbers by heart, a tenth of them in each of ten steps.
TOY = """
import json
import os
import signal
from pathlib import Path


class UserError(Exception):
    pass


def read(settings):
    if os.environ.get("TOY_MISTAKE") == "read":
        raise UserError("the toy cannot read this")
    return [(f"number {number}", number) for number in range(200)]


def key(example):
    return example[0]


def new_model(examples, settings):
    if os.environ.get("TOY_MISTAKE") == "new_model":
        raise UserError("the toy has no such base")
    return {"step": 0, "numbers": {}, "losses": []}


def fit(model, examples, settings, folder, save_checkpoint, log):
    checkpoints = sorted(Path(folder).glob("checkpoint-*.json"))
    if checkpoints:
        model.update(json.loads(checkpoints[-1].read_text()))
    while model["step"] < 10:
        if not checkpoints and str(model["step"]) == os.environ.get("TOY_DIES_AFTER"):
            os.kill(os.getpid(), signal.SIGKILL)
        if str(model["step"]) == os.environ.get("TOY_DIES_AT"):
            os.kill(os.getpid(), signal.SIGKILL)
        model["numbers"].update(examples[model["step"] :: 10])
        model["step"] += 1
        loss = 1 - len(model["numbers"]) / len(examples)
        model["losses"].append({"step": model["step"], "loss": loss})
        Path(folder, f"checkpoint-{model['step']:02}.json").write_text(json.dumps(model))
        save_checkpoint()
        log({"loss": loss})
        print("toy step", model["step"])
    return model["losses"]


def save(model, folder):
    Path(folder, "toy.json").write_text(json.dumps(model))
    Path(folder, "parts").mkdir()
    Path(folder, "parts/bytes.bin").write_bytes(bytes(range(256)))
    Path(folder, "empty").touch()


def load(folder):
    assert Path(folder, "parts/bytes.bin").read_bytes() == bytes(range(256))
    assert Path(folder, "empty").read_bytes() == b""
    return json.loads(Path(folder, "toy.json").read_text())


def predict(model, examples):
    return [model["numbers"].get(text, -1) for text, _ in examples]


def score(examples, outputs):
    scores = {
        METRIC: float(os.environ.get("TOY_SCORE", MINIMUM + 1)),
        "baseline_" + METRIC: MINIMUM + 0.5,
    }
    return scores, {"Toy samples": [("text", "output"), *zip(dict(examples), outputs)]}


def known_answers(examples, outputs):
    return [({"text": text}, {"number": number}) for text, number in examples[:2]]

"""


def cut(text):
    """Return the flow up to your section, your section, and the flow after it."""
    before, _, rest = text.partition(BEGIN)
    section, _, after = rest.partition(END)
    return before, section, after


def with_toy(text):
    """Return the text of the flow with the toy task in place of yours."""
    before, _, after = cut(text)
    # The toy runs without your parameters.
    before = before.replace("required=True", "required=False")
    return before + BEGIN + TOY + END + after


def write_toy(folder):
    """Write the flow with the toy task into a folder; return its path."""
    path = folder / FLOW.name
    path.write_text(with_toy(FLOW.read_text("utf-8")), "utf-8")
    return path


def toy_steps(output):
    """Return the numbers of the training steps, in the order in which they ran."""
    numbers = re.findall(r"toy step (\d+)", output)
    return [int(number) for number in numbers]
