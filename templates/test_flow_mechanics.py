# test_flow_mechanics.py, version 0.1.0
"""Test everything in template_flow.py but your work. No network, no account; keep it unedited.

    pip install pytest; python -m pytest test_flow_mechanics.py

The tests put a toy task between `# YOUR CODE: begin` and `end`, in a copy of the flow, and run it
as you do, as a command. They use nothing of your task, so they pass whatever your task is.
"""

import ast
import importlib
import importlib.util
import json
import math
import re
import shlex
from pathlib import Path

import pytest
from flow_testing import (
    BEGIN,
    CLASS,
    END,
    FLOW,
    artifacts,
    assert_card_shows,
    assert_fails_in_one_line,
    cut,
    python,
    run,
    toy_steps,
    write_toy,
)

# isort: split
import template_flow as your_flow

METRIC = your_flow.METRIC
MINIMUM = your_flow.MINIMUM


def move_section(text, module):
    """Return (the flow, its marked section) with an import of the section in its place."""
    before, section, after = cut(text)
    statement = f"from {module} import *\n\n"
    return before + BEGIN + statement + END + after, section


def imports_without_metaflow(text):
    """Return the import statements above your section, but those of Metaflow."""
    before, _, _ = cut(text)
    imports = []
    for statement in ast.parse(before).body:
        source = ast.get_source_segment(before, statement)
        is_import = isinstance(statement, (ast.Import, ast.ImportFrom))
        if is_import and "metaflow" not in source:
            imports.append(source)
    return imports


ALL_STEPS = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]


def assert_finishes(code, output, steps):
    """Fail unless a run of the toy succeeded and did these training steps."""
    assert code == 0, output
    assert toy_steps(output) == steps, output


@pytest.fixture(scope="module")
def toy_flow(tmp_path_factory):
    """The path of the flow with the toy task."""
    return write_toy(tmp_path_factory.mktemp("toy"))


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
    folder = tmp_path_factory.mktemp("a finished run")
    nothing = {"WANDB_API_KEY": "", "WANDB_PROJECT": ""}
    code, output = run(folder, "--offline", "True", flow=toy_flow, **nothing)
    assert code == 0, output
    return folder, output


@pytest.fixture(scope="module")
def evaluated(finished):
    """The artifacts of the finished run."""
    folder, _ = finished
    return artifacts(folder, "evaluate")


def test_a_run_prints_what_came_out_and_what_comes_next(finished, evaluated):
    _, output = finished
    training = len(evaluated["training"])
    held_out = len(evaluated["held_out"])
    counts = f"{training} to train on, {held_out} held out"
    assert f"] examples: {counts}\n" in output
    assert evaluated["examples_used"].startswith(f"{counts}, SHA-256 ")
    assert toy_steps(output) == ALL_STEPS
    score = f"{METRIC} {MINIMUM + 1:#.4g}"
    baseline = f"baseline_{METRIC} {MINIMUM + 0.5:#.4g}"
    assert f"] held-out scores: {score}, {baseline}\n" in output
    assert "] next: python export_model.py" in output
    assert "Done!" in output
    assert "Traceback" not in output


def test_artifacts_are_plain_data(evaluated):
    examples = evaluated["examples"]
    assert examples == [(f"number {number}", number) for number in range(200)]
    sides = evaluated["training"] + evaluated["held_out"]
    assert sorted(sides) == sorted(examples)
    scores = evaluated["scores"]
    assert scores == {
        METRIC: MINIMUM + 1,
        f"baseline_{METRIC}": MINIMUM + 0.5,
    }
    losses = evaluated["losses"]
    assert len(losses) == 10
    assert losses[-1] == {"step": 10, "loss": 0.0}
    files = evaluated["model"]
    assert set(files) == {
        "toy.json",
        "parts/bytes.bin",
        "empty",
    }
    text, number = evaluated["held_out"][0]
    request, answer = evaluated["known_answers"][0]
    assert request == {"text": text}
    assert answer == {"number": number}


def test_training_card_draws_the_losses_of_this_run(finished, evaluated):
    folder, _ = finished
    losses = json.dumps(evaluated["losses"])
    assert_card_shows(folder, "train", losses, "W&B: offline")
    command = ("card", "view", "train", "--id", "losses")
    code, output = run(folder, command=command, BROWSER="echo %s")
    assert code == 0, output
    assert output.splitlines()[-1].startswith("file://"), output


def test_evaluation_card_shows_scores_and_tables(finished, evaluated):
    folder, _ = finished
    text, _ = evaluated["held_out"][0]
    assert_card_shows(folder, "evaluate", METRIC, "Toy samples", text)


def test_offline_run_keeps_what_wandb_is_missing(finished):
    folder, output = finished
    assert output.count("W&B mode: offline") == 2  # train and evaluate
    train, evaluate = re.findall("is missing: wandb sync (.+?) *\n", output)
    for step, quoted in {"train": train, "evaluate": evaluate}.items():
        (name,) = shlex.split(quoted)
        path = Path(name)
        assert path.parent == folder / "wandb"
        assert path.name.startswith("offline-run-")
        # offline-run-DATE_TIME-FLOW-RUN-STEP-TASK
        assert path.name.split("-")[-2] == step
        files = [file for file in path.rglob("*") if file.is_file()]
        content = b"".join(file.read_bytes() for file in files)
        assert CLASS.encode() in content
        assert b"/None/" not in content
        assert not re.search(rb"(project|key).{0,9}None", content)


def test_files_of_a_model_survive(toy):
    model = {"step": 10, "numbers": {"number 7": 7}, "losses": []}
    files = toy.pack(model)
    assert files["parts/bytes.bin"] == bytes(range(256))
    assert files["empty"] == b""
    assert toy.unpack(files) == model


def test_section_works_as_a_module_too(toy_flow, tmp_path):
    text = toy_flow.read_text("utf-8")
    flow_text, section = move_section(text, "my_work")
    assert "def fit" in section
    assert "def fit" not in flow_text
    flow = tmp_path / FLOW.name
    flow.write_text(flow_text, "utf-8")
    settings = f"METRIC = {METRIC!r}\nMINIMUM = {MINIMUM!r}\n"
    module = tmp_path / "my_work.py"
    module.write_text(settings + section, "utf-8")
    code, output = run(tmp_path, flow=flow)
    assert_finishes(code, output, ALL_STEPS)


def test_your_section_needs_no_metaflow(tmp_path):
    text = FLOW.read_text("utf-8")
    _, section, _ = cut(text)
    statements = [*imports_without_metaflow(text), section]
    module = tmp_path / "moved_work.py"
    module.write_text("\n".join(statements), "utf-8")
    script = "import sys; sys.modules['metaflow'] = None; from moved_work import *; print(fit, key)"
    code, output = python(tmp_path, "-c", script)
    assert code == 0, output
    assert "<function fit" in output, output


# -- What the settings decide ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, value",
    [
        ("METAFLOW_PROFILE", "local"),
        ("WANDB_MODE", "disabled"),
    ],
)
def test_check_passes_lint_in_any_setting(name, value, tmp_path):
    profile = tmp_path / "config_local.json"
    profile.write_text("{}")
    environment = {
        "METAFLOW_HOME": str(tmp_path),
        name: value,
    }
    code, output = python(tmp_path, str(FLOW), "check", seconds=400, **environment)
    assert code == 0, output
    assert "Pylint is happy" in output, output


def test_importing_the_flow_loads_nothing_heavy(tmp_path):
    heavy = {"torch", "transformers", "wandb", "ray"}
    script = f"import sys, {FLOW.stem}; print(sorted({heavy} & set(sys.modules)))"
    code, output = python(tmp_path, "-c", script, seconds=400)
    assert code == 0, output
    assert output == "[]\n"


@pytest.mark.parametrize(
    "mistake, message",
    [
        ("read", "the toy cannot read this"),
        ("new_model", "the toy has no such base"),
    ],
)
def test_a_user_error_is_one_line(mistake, message, run_toy):
    code, output = run_toy(TOY_MISTAKE=mistake)
    assert_fails_in_one_line(code, output, message)
    assert output.count(message) == 1, output
    assert "UserError" not in output, output


@pytest.mark.parametrize(
    "missing",
    [
        ["WANDB_API_KEY", "WANDB_PROJECT"],
        ["WANDB_PROJECT"],
    ],
)
def test_tracking_without_a_key_is_one_line(missing, run_toy):
    environment = {
        "WANDB_API_KEY": "x" * 40,
        "WANDB_PROJECT": "mine",
        "WANDB_MODE": "online",
    }
    for name in missing:
        environment[name] = ""
    code, output = run_toy(**environment)
    names = " and ".join(missing)
    expected = f"--offline False needs {names}, before"
    assert_fails_in_one_line(code, output, expected)
    assert "/train/" not in output, output


@pytest.mark.parametrize("offline", ["True", "False"])
def test_a_project_that_wandb_refuses_is_one_line(offline, run_toy):
    environment = {
        "WANDB_PROJECT": "my-team/translator",
        "WANDB_API_KEY": "x" * 40,
        "WANDB_BASE_URL": "http://127.0.0.1:9",
        "WANDB_MODE": "online",
    }
    code, output = run_toy(command=("run", "--offline", offline), **environment)
    assert_finishes(code, output, ALL_STEPS)
    assert "Traceback" not in output, output
    refused = "W&B refuses its settings, continuing offline without them: Invalid project name"
    assert output.count(refused) == 2, output  # train and evaluate


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_minimum_that_nothing_exceeds_is_one_line(value, run_toy):
    code, output = run_toy("--minimum", value)
    assert_fails_in_one_line(code, output, "--minimum has to be from ")
    assert "/prepare/" not in output, output


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
    message = "not good enough: .* with --minimum 0.5"
    with pytest.raises(toy.MetaflowException, match=message):
        toy.require_quality(scores, 0.5)


def test_a_score_that_is_missing_is_named(toy):
    scores = {"this": 1.0, "that": 2.0}
    message = f"METRIC is '{METRIC}', but score.. returned this, that"
    with pytest.raises(toy.MetaflowException, match=message):
        toy.require_quality(scores, 0.5)


@pytest.mark.parametrize(
    "arguments, environment",
    [
        ([f"--minimum={MINIMUM + 1}"], {}),
        ([], {"TOY_SCORE": "nan"}),
    ],
    ids=["minimum", "NaN"],
)
def test_a_bad_model_ends_the_run_in_one_line(arguments, environment, run_toy, tmp_path):
    code, output = run_toy(*arguments, **environment)
    assert_fails_in_one_line(code, output, "not good enough: ")
    assert "] held-out scores: " in output
    assert "] next: " not in output
    # What tells why is kept: the scores, the card and the model.
    found = artifacts(tmp_path, "evaluate")
    assert METRIC in found["scores"]
    assert "toy.json" in found["model"]
    assert_card_shows(tmp_path, "evaluate", METRIC, "Toy samples")


# -- The split -------------------------------------------------------------------------------------


def numbered_examples(count):
    """Return so many examples; every text comes again after a thousand others."""
    return [(f"text {number % 1000}", number) for number in range(count)]


def test_split_never_leaks_and_does_not_move_when_data_grows(toy):
    examples = numbered_examples(3000)
    training, held_out = toy.split(examples)
    training_texts = {text for text, _ in training}
    held_out_texts = {text for text, _ in held_out}
    assert training_texts.isdisjoint(held_out_texts)
    assert sorted(training + held_out) == sorted(examples)
    share = len(held_out) / len(examples)
    assert 0.05 < share < 0.2
    fewer = examples[:500]
    _, held_out_of_fewer = toy.split(fewer)
    expected = set(held_out) & set(fewer)
    assert set(held_out_of_fewer) == expected
    again = toy.split(examples)
    assert again == (training, held_out)


def test_tiny_data_still_holds_something_out(toy):
    for count in range(2, 40):
        examples = numbered_examples(count)
        training, held_out = toy.split(examples)
        assert training
        assert held_out
        assert len(training) + len(held_out) == count


@pytest.mark.parametrize(
    "keys",
    [
        [],
        ["same"],
        ["same"] * 100,
    ],
)
def test_too_few_examples_to_hold_any_out(keys, toy):
    examples = [(key, number) for number, key in enumerate(keys)]
    message = f"^{len(keys)} examples are too few to train"
    with pytest.raises(toy.MetaflowException, match=message):
        toy.split(examples)


def test_large_data_is_scored_evenly(toy):
    for count in (1, 9, 10, 11, 19, 99, 1000):
        chosen = toy.at_most(10, range(count))
        assert len(chosen) >= min(count, 5)
        assert len(chosen) <= 10
        assert chosen[0] == 0
        assert chosen[-1] >= count * 0.8 - 1


# -- Interrupted runs ------------------------------------------------------------------------------

REMAINING_STEPS = [5, 6, 7, 8, 9, 10]


@pytest.fixture
def break_toy(run_toy):
    """A function that runs the toy, which dies after four steps (kill -9); returns its output."""

    def break_it(**environment):
        code, output = run_toy(TOY_DIES_AFTER="4", **environment)
        assert code != 0, output
        assert toy_steps(output) == [1, 2, 3, 4], output
        return output

    return break_it


@pytest.fixture
def resume_toy(run_toy):
    """A function that resumes the newest run, or the one that its options name."""

    def resume_it(*options, **environment):
        command = ("resume", *options)
        return run_toy(command=command, **environment)

    return resume_it


def test_resume_continues_from_the_last_checkpoint(break_toy, resume_toy, evaluated, tmp_path):
    break_toy()
    code, output = resume_toy()
    assert_finishes(code, output, REMAINING_STEPS)
    resumed = artifacts(tmp_path, "evaluate")
    assert resumed["model"] == evaluated["model"]
    assert resumed["losses"] == evaluated["losses"]


def test_resume_continues_the_run_of_another_user(break_toy, resume_toy):
    broken = break_toy(METAFLOW_USER="somebody")
    run_id = re.search(r"run-id (\d+)", broken)[1]
    code, output = resume_toy("--origin-run-id", run_id, METAFLOW_USER="another")
    assert_finishes(code, output, REMAINING_STEPS)
    assert f"continuing from the last checkpoint of run {run_id}" in output


def test_resume_of_a_resume_continues_from_its_checkpoint(break_toy, resume_toy):
    break_toy()
    code, output = resume_toy(TOY_DIES_AT="7")
    assert code != 0, output
    assert toy_steps(output) == [5, 6, 7], output
    run_id = re.search(r"run-id (\d+)", output)[1]
    code, output = resume_toy("--origin-run-id", run_id)
    assert_finishes(code, output, [8, 9, 10])


def test_resume_of_a_run_that_is_older_than_a_parameter(
    break_toy, toy_flow, tmp_path_factory, tmp_path
):
    break_toy()
    line = '    newest = Parameter("newest", type=int, default=3, help="came with an update")\n'
    text = toy_flow.read_text("utf-8")
    first = re.search(r"^    \w+ = Parameter\(", text, re.MULTILINE).start()
    newer = tmp_path_factory.mktemp("newer") / FLOW.name
    newer.write_text(text[:first] + line + text[first:], "utf-8")
    code, output = run(tmp_path, command=("resume",), flow=newer, WANDB_MODE="disabled")
    assert_finishes(code, output, REMAINING_STEPS)


def test_retry_continues_from_the_last_checkpoint(run_toy):
    retry = "retry:times=1,minutes_between_retries=0"
    code, output = run_toy("--with", retry, TOY_DIES_AFTER="4")
    assert_finishes(code, output, ALL_STEPS)


@pytest.mark.parametrize("mistake", ["read", "new_model"])
def test_resume_of_a_run_without_a_checkpoint_starts_at_the_first_step(
    mistake, run_toy, resume_toy
):
    code, output = run_toy(TOY_MISTAKE=mistake)
    assert code != 0, output
    code, output = resume_toy()
    assert_finishes(code, output, ALL_STEPS)


def test_a_new_run_takes_nothing_from_an_older_one(break_toy, run_toy):
    break_toy()
    code, output = run_toy()
    assert_finishes(code, output, ALL_STEPS)
