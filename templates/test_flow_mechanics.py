# test_flow_mechanics.py, version 0.1.0
"""Test everything in template_flow.py but your work. No network, no account; keep it unedited.

    pip install pytest; python -m pytest test_flow_mechanics.py

The tests put a toy task between `# YOUR CODE: begin` and `end`, in a copy of the flow, and run it
as you do, as a command. They use nothing of your task, so they pass whatever your task is.
"""

import ast
import base64
import importlib
import importlib.util
import json
import math
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest

FLOW = Path(__file__).with_name("template_flow.py")
CLASS = "TemplateFlow"
for setting in list(os.environ):
    if re.match("_*(METAFLOW|WANDB|REMOTE_CONFIG)", setting):
        del os.environ[setting]  # your settings must not change what is tested
os.environ.update({"METAFLOW_USER": "test", "HF_HUB_OFFLINE": "1"})
your_flow = importlib.import_module(FLOW.stem)  # not earlier: Metaflow reads the environment
METRIC = your_flow.METRIC
MINIMUM = your_flow.MINIMUM

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
    Path(folder, "bytes.bin").write_bytes(bytes(range(256)))
    Path(folder, "empty").touch()


def load(folder):
    assert Path(folder, "bytes.bin").read_bytes() == bytes(range(256))
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


def with_toy(text):
    """Return the text of the flow with the toy task in place of yours."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    # The toy runs without your parameters.
    return before.replace("required=True", "required=False") + BEGIN + TOY + END + after


def move_section(text, module):
    """Return (the flow, its marked section) with an import of the section in its place."""
    before, _, rest = text.partition(BEGIN)
    section, _, after = rest.partition(END)
    return f"{before}{BEGIN}from {module} import *\n\n{END}{after}", section


def clean_environment(folder):
    """Return the environment in which everything that Metaflow writes goes to `folder`."""
    return {
        **os.environ,
        "METAFLOW_HOME": str(folder / "none"),
        "METAFLOW_CLIENT_CACHE_PATH": str(folder / "cache"),
        "PYTHONPATH": os.pathsep.join([str(FLOW.parent), os.environ.get("PYTHONPATH", "")]),
    }


def python(folder, *arguments, seconds=300, **environment):
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


def run(folder, *arguments, command=("run",), flow=FLOW, seconds=300, **environment):
    """Run the flow in `folder`; return (exit code, everything it printed)."""
    command = [str(flow), "--no-pylint", *command, *arguments]
    return python(folder, *command, seconds=seconds, **environment)


def artifacts(folder, step):
    """Return the artifacts of the newest task of a step, read in a process of its own."""
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
        env=clean_environment(folder),
        timeout=100,
        check=True,
        stdout=subprocess.PIPE,
    )
    return pickle.loads(done.stdout)


def cards(folder, step):
    """Return what the HTML cards of the newest run's step show, as JSON."""
    runs = (folder / f".metaflow/mf.cards/{CLASS}/runs").iterdir()
    newest = max(runs, key=lambda path: int(path.name))
    shown = []
    for file in newest.glob(f"steps/{step}/tasks/*/cards/*.html"):
        # <script>... window.__MF_DATA__["CARD"] = "BASE64" ...</script>
        for data in re.findall(r'__MF_DATA__\["[^"]+"\] = "([^"]+)"', file.read_text("utf-8")):
            content = json.loads(base64.b64decode(data))
            shown.append(json.dumps(content, ensure_ascii=False))
    return shown


def toy_steps(output):
    """Return the numbers of the training steps that were done, in order."""
    return [int(number) for number in re.findall(r"toy step (\d+)", output)]


@pytest.fixture(scope="module")
def toy_flow(tmp_path_factory):
    """The path of the flow with the toy task."""
    path = tmp_path_factory.mktemp("toy") / FLOW.name
    path.write_text(with_toy(FLOW.read_text("utf-8")), "utf-8")
    return path


@pytest.fixture(scope="module")
def toy(toy_flow):
    """The flow with the toy task as a module."""
    spec = importlib.util.spec_from_file_location("toy_flow", toy_flow)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run_toy(toy_flow, tmp_path):
    """A function that runs the toy in a folder of this test, by default without W&B."""

    def run_it(*arguments, command=("run", "--offline", "False"), **environment):
        environment = {"WANDB_MODE": "disabled", **environment}
        return run(tmp_path, *arguments, command=command, flow=toy_flow, **environment)

    return run_it


# -- A run from start to end -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(toy_flow, tmp_path_factory):
    """A finished run, offline: (its folder, what it printed)."""
    folder = tmp_path_factory.mktemp("finished")
    nothing = {"WANDB_API_KEY": "", "WANDB_PROJECT": ""}
    code, output = run(folder, "--offline", "True", flow=toy_flow, **nothing)
    assert code == 0, output
    return folder, output


def test_a_run_prints_what_came_out_and_what_comes_next(finished):
    folder, output = finished
    found = artifacts(folder, "evaluate")
    counts = f"{len(found['training'])} to train on, {len(found['held_out'])} held out"
    assert f"] examples: {counts}\n" in output
    assert found["examples_used"].startswith(f"{counts}, SHA-256 ")
    assert toy_steps(output) == list(range(1, 11))
    scores = f"{METRIC} {MINIMUM + 1:#.4g}, baseline_{METRIC} {MINIMUM + 0.5:#.4g}"
    assert f"] held-out scores: {scores}\n" in output
    assert "] next: python export_model.py" in output
    assert "Done!" in output and "Traceback" not in output


def test_artifacts_are_plain_data(finished):
    found = artifacts(finished[0], "evaluate")
    assert found["examples"] == [(f"number {number}", number) for number in range(200)]
    assert sorted(found["training"] + found["held_out"]) == sorted(found["examples"])
    assert found["scores"] == {METRIC: MINIMUM + 1, f"baseline_{METRIC}": MINIMUM + 0.5}
    assert len(found["losses"]) == 10 and found["losses"][-1] == {"step": 10, "loss": 0.0}
    assert set(found["model"]) == {"toy.json", "bytes.bin", "empty"}
    text, number = found["held_out"][0]
    assert found["known_answers"][0] == ({"text": text}, {"number": number})


def test_training_card_draws_the_losses_of_this_run(finished):
    losses = json.dumps(artifacts(finished[0], "train")["losses"])
    shown = cards(finished[0], "train")
    assert any(losses in card and "W&B: offline" in card for card in shown)


def test_evaluation_card_shows_scores_and_tables(finished):
    text, _ = artifacts(finished[0], "evaluate")["held_out"][0]
    shown = cards(finished[0], "evaluate")
    assert any(all(word in card for word in (METRIC, "Toy samples", text)) for card in shown)


def test_offline_run_keeps_what_wandb_is_missing(finished):
    folder, output = finished
    assert output.count("W&B mode: offline") == 2  # train and evaluate
    kept = [Path(name) for name in re.findall("is missing: wandb sync (.+?) *\n", output)]
    assert [path.name.split("-")[-2] for path in kept] == ["train", "evaluate"]
    for path in kept:
        assert path.parent == folder / "wandb" and path.name.startswith("offline-run-")
        content = b"".join(file.read_bytes() for file in path.rglob("*") if file.is_file())
        assert CLASS.encode() in content
        assert not re.search(rb"/None/|(project|key).{0,9}None", content)


def test_files_of_a_model_survive(toy):
    model = {"step": 10, "numbers": {"number 7": 7}, "losses": []}
    files = toy.pack(model)
    assert files["bytes.bin"] == bytes(range(256)) and files["empty"] == b""
    assert toy.unpack(files) == model


def test_section_works_as_a_module_too(toy_flow, tmp_path):
    text, section = move_section(toy_flow.read_text("utf-8"), "my_work")
    assert "def fit" in section and "def fit" not in text
    (tmp_path / FLOW.name).write_text(text, "utf-8")
    settings = f"METRIC = {METRIC!r}\nMINIMUM = {MINIMUM!r}\n"
    (tmp_path / "my_work.py").write_text(settings + section, "utf-8")
    code, output = run(tmp_path, flow=tmp_path / FLOW.name)
    assert code == 0 and toy_steps(output) == list(range(1, 11)), output


def test_your_section_needs_no_metaflow(tmp_path):
    text = FLOW.read_text("utf-8")
    _, section = move_section(text, "moved_work")
    imports = []
    for statement in ast.parse(text.partition(BEGIN)[0]).body:
        source = ast.get_source_segment(text, statement)
        if isinstance(statement, (ast.Import, ast.ImportFrom)) and "metaflow" not in source:
            imports.append(source)
    (tmp_path / "moved_work.py").write_text("\n".join([*imports, section]), "utf-8")
    script = "import sys; sys.modules['metaflow'] = None; from moved_work import *; print(fit, key)"
    code, output = python(tmp_path, "-c", script)
    assert code == 0 and "<function fit" in output, output


# -- What the settings decide ----------------------------------------------------------------------


@pytest.mark.parametrize("name, value", [("METAFLOW_PROFILE", "local"), ("WANDB_MODE", "disabled")])
def test_check_passes_lint_in_any_setting(name, value, tmp_path):
    (tmp_path / "config_local.json").write_text("{}")
    environment = {"METAFLOW_HOME": str(tmp_path), name: value}
    code, output = python(tmp_path, str(FLOW), "check", seconds=60, **environment)
    assert code == 0 and "Pylint is happy" in output, output


def test_importing_the_flow_loads_nothing_heavy(tmp_path):
    heavy = {"torch", "transformers", "wandb", "ray"}
    script = f"import sys, {FLOW.stem}; print(sorted({heavy} & set(sys.modules)))"
    assert python(tmp_path, "-c", script, seconds=60) == (0, "[]\n")


@pytest.mark.parametrize(
    "mistake, message",
    [("read", "the toy cannot read this"), ("new_model", "the toy has no such base")],
)
def test_a_user_error_is_one_line(mistake, message, run_toy):
    code, output = run_toy(TOY_MISTAKE=mistake)
    assert code != 0 and output.count(message) == 1, output
    assert "Traceback" not in output and "UserError" not in output


@pytest.mark.parametrize("missing", [["WANDB_API_KEY", "WANDB_PROJECT"], ["WANDB_PROJECT"]])
def test_tracking_without_a_key_is_one_line(missing, run_toy):
    environment = {"WANDB_API_KEY": "x" * 40, "WANDB_PROJECT": "mine", "WANDB_MODE": "online"}
    environment |= dict.fromkeys(missing, "")
    code, output = run_toy(**environment)
    assert code != 0 and f"--offline False needs {' and '.join(missing)}, before" in output, output
    assert "Traceback" not in output and "/train/" not in output


# -- The gate --------------------------------------------------------------------------------------

NAN = math.nan
BASELINE = f"baseline_{METRIC}"
GOOD = [
    {METRIC: 0.51},
    {METRIC: math.inf},
    {METRIC: 0.51, BASELINE: 0.5},
    {METRIC: 0.51, BASELINE: -1.0, "another": NAN},
]
BAD = [
    {METRIC: 0.49},
    {METRIC: 0.5},
    {METRIC: NAN},
    {METRIC: 0.9, BASELINE: 0.91},
    {METRIC: 0.9, BASELINE: 0.9},
    {METRIC: 0.9, BASELINE: NAN},
]


@pytest.mark.parametrize("scores", GOOD, ids=str)
def test_a_good_model_passes(scores, toy):
    toy.require_quality(scores, 0.5)


@pytest.mark.parametrize("scores", BAD, ids=str)
def test_a_bad_model_fails(scores, toy):
    with pytest.raises(toy.MetaflowException, match="not good enough: .* with --minimum 0.5"):
        toy.require_quality(scores, 0.5)


def test_a_score_that_is_missing_is_named(toy):
    message = f"METRIC is '{METRIC}', but score.. returned this, that"
    with pytest.raises(toy.MetaflowException, match=message):
        toy.require_quality({"this": 1.0, "that": 2.0}, 0.5)


@pytest.mark.parametrize("arguments, score", [([f"--minimum={MINIMUM + 1}"], None), ([], "nan")])
def test_a_bad_model_ends_the_run_in_one_line(arguments, score, run_toy, tmp_path):
    environment = {"TOY_SCORE": score} if score else {}
    code, output = run_toy(*arguments, **environment)
    assert code != 0 and "not good enough: " in output and "Traceback" not in output, output
    assert "held-out scores" not in output
    assert METRIC in artifacts(tmp_path, "evaluate")["scores"]


# -- The split -------------------------------------------------------------------------------------


def test_split_never_leaks_and_does_not_move_when_data_grows(toy):
    examples = [(f"text {number % 1000}", number) for number in range(3000)]
    training, held_out = toy.split(examples)
    assert not {text for text, _ in training} & {text for text, _ in held_out}
    assert sorted(training + held_out) == sorted(examples)
    assert 0.05 < len(held_out) / len(examples) < 0.2
    fewer = examples[:500]
    assert set(toy.split(fewer)[1]) == set(held_out) & set(fewer)
    assert toy.split(examples) == (training, held_out)


def test_tiny_data_still_holds_something_out(toy):
    for count in range(2, 40):
        examples = [(f"text {number}", number) for number in range(count)]
        training, held_out = toy.split(examples)
        assert training and held_out and len(training) + len(held_out) == count


@pytest.mark.parametrize("keys", [[], ["same"], ["same"] * 100])
def test_too_few_examples_to_hold_any_out(keys, toy):
    examples = [(key, number) for number, key in enumerate(keys)]
    with pytest.raises(toy.MetaflowException, match=f"^{len(keys)} examples are too few to train"):
        toy.split(examples)


def test_large_data_is_scored_evenly(toy):
    for count in (1, 9, 10, 11, 19, 99, 1000):
        chosen = toy.at_most(10, range(count))
        assert min(count, 5) <= len(chosen) <= 10
        assert chosen[0] == 0 and chosen[-1] >= count * 0.8 - 1


# -- Interrupted runs ------------------------------------------------------------------------------


def run_id(output):
    return re.search(r"run-id (\d+)", output)[1]


def test_resume_continues_from_the_last_checkpoint(run_toy, finished, tmp_path):
    code, output = run_toy(TOY_DIES_AFTER="4")  # kill -9
    assert code != 0 and toy_steps(output) == [1, 2, 3, 4], output
    code, output = run_toy(command=("resume",))
    assert code == 0 and toy_steps(output) == [5, 6, 7, 8, 9, 10], output
    unbroken = artifacts(finished[0], "evaluate")
    resumed = artifacts(tmp_path, "evaluate")
    assert resumed["model"] == unbroken["model"] and resumed["losses"] == unbroken["losses"]


def test_resume_continues_the_run_of_another_user(run_toy):
    code, broken = run_toy(TOY_DIES_AFTER="4", METAFLOW_USER="somebody")
    assert code != 0, broken
    resume = ("resume", "--origin-run-id", run_id(broken))
    code, output = run_toy(command=resume, METAFLOW_USER="another")
    assert code == 0 and toy_steps(output) == [5, 6, 7, 8, 9, 10], output


def test_retry_continues_from_the_last_checkpoint(run_toy):
    retry = ("--with", "retry:times=1,minutes_between_retries=0")
    code, output = run_toy(*retry, TOY_DIES_AFTER="4")
    assert code == 0 and toy_steps(output) == list(range(1, 11)), output


@pytest.mark.parametrize("mistake", ["read", "new_model"])
def test_resume_of_a_run_without_a_checkpoint_starts_at_the_first_step(mistake, run_toy):
    code, output = run_toy(TOY_MISTAKE=mistake)
    assert code != 0, output
    code, output = run_toy(command=("resume",))
    assert code == 0 and toy_steps(output) == list(range(1, 11)), output


def test_a_new_run_takes_nothing_from_an_older_one(run_toy):
    code, output = run_toy(TOY_DIES_AFTER="4")
    assert code != 0, output
    code, output = run_toy()
    assert code == 0 and toy_steps(output) == list(range(1, 11)), output
