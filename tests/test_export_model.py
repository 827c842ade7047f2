"""export_model.py: the newest good run becomes a folder that can be served, all at once or not at all."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_template_flow import FLOW, artifacts, clean_environment, run

EXPORT = FLOW.with_name("export_model.py")


def export(folder, *arguments, **environment):
    """Run export_model.py as a copy in `folder`; return (exit code, everything it printed)."""
    shutil.copy(EXPORT, folder)
    done = subprocess.run(
        [sys.executable, "export_model.py", *arguments],
        cwd=folder,
        timeout=100,
        text=True,
        encoding="utf-8",
        env={**clean_environment(folder), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    return done.returncode, done.stdout


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    code, output = run(folder, "--epochs", "8")
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


def test_the_newest_run_becomes_a_transformers_folder(folder):
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    code, output = export(folder)
    assert (code, output) == (0, f"model: the model of run TemplateFlow/{run_id(folder)}\n")
    model = AutoModelForSeq2SeqLM.from_pretrained(folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    known = json.loads((folder / "model/known_answers.json").read_text("utf-8"))
    for text, answer in known.items():
        tokens = tokenizer("translate English to French: " + text, return_tensors="pt")
        assert (
            tokenizer.decode(
                model.generate(**tokens, max_new_tokens=64)[0], skip_special_tokens=True
            )
            == answer
        )
    readme = (folder / "model/README.md").read_text("utf-8")
    scores = artifacts(folder, "evaluate")["scores"]
    for fact in (
        f"TemplateFlow/{run_id(folder)}",
        "SHA-256",
        f"exact_match: {scores['exact_match']:.2f}",
        "transformers_version: 5.",
        "python_version: 3.",
    ):
        assert fact in readme
    assert [path.name for path in folder.iterdir() if path.name.startswith(".model")] == []


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
    code, output = run(folder, "--epochs", "1", "--min-chrf", "100")
    assert code != 0, output
    code, output = export(folder)
    assert code == 0 and str(good) in output
    code, output = export(folder, "--run", str(run_id(folder)), "--replace")
    assert code == 1 and "has not succeeded" in output


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
        process.wait(20)
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
