"""docs/your-own-model.md: it lists the contract of the files, and its rename command works."""

import re
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
import template_flow
import template_ray_serve
import torch
from helpers import recipes
from helpers.pages import commands, copy, shows
from helpers.repository import ROOT
from helpers.shell import clean, run

PAGE = ROOT / "docs/your-own-model.md"


def section(title):
    """Return the text below a heading of the page."""
    text = PAGE.read_text("utf-8")
    return text.partition(f"## {title}\n")[2].partition("\n## ")[0]


def marked(module):
    """Return the source between the marks of a template."""
    text = (ROOT / "templates" / f"{module.__name__}.py").read_text("utf-8")
    return text.partition("# YOUR CODE: begin\n")[2].partition("# YOUR CODE: end\n")[0]


def test_page_lists_the_functions_that_the_flow_calls():
    listed = re.findall(r"`(\w+)\(([\w, ]+)\)`", section("In the flow").split("\n\n")[0])
    assert len(listed) == 9
    for name, parameters in listed:
        function = getattr(template_flow, name)
        names = function.__code__.co_varnames[: function.__code__.co_argcount]
        assert ", ".join(names) == parameters
        assert f"\ndef {name}(" in marked(template_flow) and function.__doc__


def test_page_lists_the_names_that_the_server_uses():
    table = section("In the server").split("\n\n")[0]
    names = set(re.findall(r"^\| `(\w+)|, `(\w+)` \|", table, re.MULTILINE))
    found = {first or second for first, second in names}
    assert {"ModelRequest", "EXAMPLE", "COUNTERS", "Model", "model"} <= found
    work = marked(template_ray_serve)
    methods = {"plan", "size", "answer", "same", "__call__", "__init__"}
    assert all(re.search(rf"^    def {method}\(", work, re.MULTILINE) for method in methods)
    assert all(method in table for method in ("plan", "size", "answer", "same"))


@pytest.mark.parametrize("module", [template_flow, template_ray_serve])
def test_work_names_nothing_of_the_mechanics(module):
    words = r"\b(?:metaflow|current|FlowSpec|MetaflowException|ray|serve|fastapi|HTTPException)\b"
    code = re.sub(r'""".*?"""|#.*', "", marked(module), flags=re.DOTALL)
    code = re.sub(r"#[^\n]*", "", code)
    assert not re.findall(words, code)


@pytest.mark.slow
def test_rename_then_run_everything(tmp_path):
    folder = copy(tmp_path)
    environment = {**clean(folder), "METAFLOW_USER": "test", "RAY_TMPDIR": "/tmp"}
    for command, expected in commands(PAGE):
        if "YOUR CODE" in command:
            assert shows(run(command, folder, environment), expected)
        elif command.startswith("perl"):
            run(command, folder, environment)
    left = [
        path.name
        for path in folder.iterdir()
        if path.is_file()
        and re.search(
            r"TemplateFlow|template_flow\.py|template_ray_serve|translator_app", after_line_1(path)
        )
    ]
    assert left == []
    assert (folder / "reviews_flow.py").read_text().startswith("# template_flow.py, version ")
    run("python reviews_flow.py --no-pylint run --epochs 4", folder, environment)
    run("python export_model.py", folder, environment)
    assert "valid" in run("python check_serve_config.py serve_config.yaml", folder, environment)
    names = (
        "test_flow_mechanics.py test_serve_mechanics.py test_reviews_flow.py test_reviews_serve.py"
    )
    collected = run(f"python -m pytest -q --collect-only {names}", folder, environment)
    assert re.search(r"\d+ tests collected", collected)
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:xdist",
            "test_serve_mechanics.py",
            "-k",
            "url",
        ],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout


def after_line_1(path):
    """Return the text of a file without the line that names the template."""
    return path.read_text("utf-8").partition("\n")[2]


def test_table_counts_the_lines_of_each_change():
    rows = re.findall(r"^\| \[(.*)\]\(#\S+\) \| (\d+) \| (\d+) \|$", PAGE.read_text(), re.MULTILINE)
    assert len(rows) == 4
    for title, added, removed in rows:
        counted = [
            file for file, _, _ in recipes.changes(title) if not recipes.UNCOUNTED.fullmatch(file)
        ]
        assert int(added) == len(counted) <= recipes.MAX_ADDED
        assert int(removed) <= len(recipes.removed_lines(title))


def test_loop_with_checkpoints_continues(tmp_path):
    """An interrupted run of the loop on the page ends like an uninterrupted one."""
    (loop,) = re.findall(r"^```python\n(.*?)^```", section("In the flow"), re.DOTALL | re.MULTILINE)
    code = "def fit(network, optimizer, examples, settings, folder, save_checkpoint):\n"
    scope = {"Path": Path, "torch": torch, "train_one_epoch": train_one_epoch}
    exec(code + textwrap.indent(loop, "    "), scope)  # noqa: S102

    def train(folder, epochs):
        folder.mkdir(exist_ok=True)
        torch.manual_seed(0)
        network = torch.nn.Linear(2, 1)
        optimizer = torch.optim.Adam(network.parameters(), lr=0.1)
        saved = []
        settings = SimpleNamespace(epochs=epochs)
        losses = scope["fit"](network, optimizer, None, settings, folder, lambda: saved.append(1))
        return losses, network.weight.tolist(), len(saved)

    whole = train(tmp_path / "whole", 6)
    train(tmp_path / "parts", 4)
    losses, weights, saved = train(tmp_path / "parts", 6)
    assert (losses, weights) == whole[:2]
    assert len(losses) == 6
    assert saved == 2


def train_one_epoch(network, optimizer, examples):
    """Fit a line to two points; return the loss."""
    inputs = torch.tensor([[1.0, 2.0], [3.0, 1.0]])
    loss = (network(inputs) - torch.tensor([[1.0], [0.0]])).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()
