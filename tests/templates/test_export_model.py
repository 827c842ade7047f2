"""export_model.py: the latest successful run becomes a folder to serve, complete or not at all."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from flow_testing import FLOW, artifacts, clean_environment, run, write_toy

EXPORT = FLOW.with_name("export_model.py")


def export(folder, *arguments, **environment):
    """Run export_model.py as a copy in `folder`; return (exit code, everything it printed)."""
    shutil.copy(EXPORT, folder)
    done = subprocess.run(
        [sys.executable, "export_model.py", *arguments],
        cwd=folder,
        timeout=400,
        text=True,
        encoding="utf-8",
        env={**clean_environment(folder), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    return done.returncode, done.stdout


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a run of the flow with a parameter that somebody has added."""
    folder = tmp_path_factory.mktemp("trained")
    seed = '    seed = Parameter("seed"'
    mine = '    my_own = Parameter("my-own", type=float, default=2.5)\n'
    flow = folder / FLOW.name
    text = FLOW.read_text("utf-8")
    assert text.count(seed) == 1
    flow.write_text(text.replace(seed, mine + seed), "utf-8")
    code, output = run(folder, "--epochs", "8", flow=flow)
    assert code == 0, output
    return folder


@pytest.fixture
def folder(trained):
    shutil.rmtree(trained / "model", ignore_errors=True)
    return trained


def run_id(folder):
    return max(
        int(path.name)
        for path in (folder / ".metaflow/TemplateFlow").iterdir()
        if path.name.isdigit()
    )


def test_the_latest_run_becomes_a_transformers_folder(folder):
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    code, output = export(folder)
    assert (code, output) == (0, f"model: the model of run TemplateFlow/{run_id(folder)}\n")
    model = AutoModelForSeq2SeqLM.from_pretrained(folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    assert tokenizer.model_max_length == model.generation_config.max_new_tokens == 128
    prefix = model.config.task_specific_params["translation_en_to_fr"]["prefix"]
    assert prefix == "translate English to French: "
    known = json.loads((folder / "model/known_answers.json").read_text("utf-8"))
    assert 2 < len(known) <= 5
    for answer in known:
        assert set(answer) == {"request", "answer"} and set(answer["request"]) == {"text"}
        tokens = tokenizer(prefix + answer["request"]["text"], return_tensors="pt")
        output = model.generate(**tokens)[0]
        assert answer["answer"] == {
            "translation": tokenizer.decode(output, skip_special_tokens=True)
        }
    assert [path.name for path in folder.iterdir() if path.name.startswith(".model")] == []


def test_the_readme_tells_where_the_model_comes_from(folder):
    export(folder)
    readme = (folder / "model/README.md").read_text("utf-8")
    found = artifacts(folder, "evaluate")
    counts = f"{len(found['training'])} to train on, {len(found['held_out'])} held out"
    for fact in (
        f"# Model of run TemplateFlow/{run_id(folder)}",
        f"- examples: {counts}, SHA-256 ",
        f"- exact_match: {found['scores']['exact_match']:.2f}",
        f"- baseline_chrf: {found['scores']['baseline_chrf']:.2f}",
        "- epochs: 8\n",
        "- my_own: 2.5\n",
        "- base_model: ''\n",
        "- minimum: 0.0\n",
        "- offline: True\n",
        "- transformers_version: 5.",
        "- metaflow_version: 2.",
        "- python_version: 3.",
    ):
        assert fact in readme, readme
    assert "requirements" not in readme


def test_a_missing_artifact_is_one_line(tmp_path):
    line = "        self.known_answers = known_answers(examples, outputs)\n"
    flow = write_toy(tmp_path)
    text = flow.read_text("utf-8")
    assert text.count(line) == 1
    flow.write_text(text.replace(line, ""), "utf-8")
    code, output = run(tmp_path, flow=flow)
    assert code == 0, output
    code, output = export(tmp_path)
    assert code == 1 and "has no artifact `known_answers`" in output, output
    assert output.count("\n") == 1 and not (tmp_path / "model").exists()


TEXTS = [
    "Hello world!",
    "Price <s>20 euros</s> now 21",
    "a</s>b",
    "</s>",
    "<pad> is <pad>",
    "<unk> <extra_id_0>",
    " two  spaces ",
    "déjà vu \u00a0 \U0001f600",
]


def test_text_has_the_same_tokens_in_training_and_where_it_is_served(folder):
    import template_flow
    import template_ray_serve

    export(folder)
    settings = template_ray_serve.Settings()
    served = template_ray_serve.Model(str(folder / "model"), settings, threads=1)
    model = template_flow.unpack(artifacts(folder, "evaluate")["model"])
    _, tokenizer = model
    for text in TEXTS:
        (trained,) = template_flow.encode(model, [text])
        assert served.encode(text) == trained, text
        assert trained.count(tokenizer.eos_token_id) == 1  # "</s>" in a text ends nothing
        assert tokenizer.pad_token_id not in trained


def test_a_folder_that_is_there_stays_unless_replaced(folder):
    (folder / "model").mkdir()
    (folder / "model/mine.txt").write_text("mine")
    code, output = export(folder)
    assert (
        code == 1
        and "model is there already; --replace overwrites it" in output
        and output.count("\n") == 1
    )
    assert (folder / "model/mine.txt").read_text() == "mine"
    assert export(folder, "--replace")[0] == 0
    assert not (folder / "model/mine.txt").exists() and (folder / "model/config.json").exists()


def test_a_run_by_its_id_and_another_place(folder):
    code, output = export(folder, "--run", str(run_id(folder)), "--output", "deep/er")
    assert code == 0 and (folder / "deep/er/model.safetensors").exists(), output
    shutil.rmtree(folder / "deep")


@pytest.mark.parametrize(
    "arguments, user, expected",
    [
        (("--run", "77"), "test", "no run 77 of TemplateFlow"),
        ((), "stranger", "no successful run of TemplateFlow in the namespace user:stranger"),
        (("--output", "/dev/null/model"), "test", "cannot write /dev/null/model"),
    ],
)
def test_mistakes_get_one_line_and_write_nothing(folder, arguments, user, expected):
    code, output = export(folder, *arguments, METAFLOW_USER=user)
    assert code == 1 and expected in output and output.count("\n") == 1, output
    assert not (folder / "model").exists()


def test_somebody_elses_run_with_their_namespace(folder):
    code, output = export(folder, "--run", str(run_id(folder)), METAFLOW_USER="stranger")
    assert code == 1 and 'in the namespace user:stranger; add --namespace ""' in output, output
    code, output = export(folder, "--namespace", "", METAFLOW_USER="stranger")
    assert code == 0, output


def test_where_nothing_has_run(tmp_path):
    code, output = export(tmp_path)
    assert (
        code == 1 and "no successful run" in output and "python template_flow.py run" in output
    ), output


def test_a_failed_run_is_passed_over(folder):
    good = run_id(folder)
    (folder / "toy").mkdir()
    code, output = run(folder, "--minimum", "100", flow=write_toy(folder / "toy"))
    assert code != 0, output
    code, output = export(folder)
    assert code == 0 and str(good) in output
    code, output = export(folder, "--run", str(run_id(folder)), "--replace")
    assert code == 1 and "has not succeeded" in output


@pytest.mark.slow
def test_killed_at_any_time_it_leaves_no_half_model(folder):
    complete = None
    for delay in (0.3, 0.6, 0.9, 1.2, 1.5, 1.8, 2.1):
        shutil.copy(EXPORT, folder)
        process = subprocess.Popen(
            [sys.executable, "export_model.py", "--replace"],
            cwd=folder,
            env=clean_environment(folder),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait(400)
        if (folder / "model").exists():
            files = sorted(
                (path.name, path.stat().st_size) for path in Path(folder / "model").iterdir()
            )
            complete = complete or files
            assert [name for name, _ in files] == [
                name for name, _ in complete
            ] and "config.json" in dict(files)
    for path in folder.glob(".model-*"):
        shutil.rmtree(path)
    assert os.path.exists(folder / "export_model.py")
