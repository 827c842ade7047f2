"""What docs/*.md says is true: commands run, diffs apply, messages are the real ones."""

import fnmatch
import re
import shutil
import subprocess
import sys

import boto3
import pytest
from flow_testing import artifacts
from helpers import recipes
from helpers.flows import epochs
from helpers.pages import NOT_RUN, blocks, commands, copy, not_run, run_all
from helpers.remote import pods
from helpers.repository import ROOT
from helpers.s3 import EXTENSION, KEYS
from helpers.shell import clean, run
from moto.server import ThreadedMotoServer

PAGES = sorted((ROOT / "docs").glob("*.md"))
# Run by test_update.py, test_reliability.py and the tests of the recipes; languages.md has tables.
OTHERWISE = ("update.md", "reliability.md", "your-own-model.md", "languages.md", "benchmark.md")


@pytest.mark.slow
@pytest.mark.parametrize(
    "page",
    [
        pytest.param(
            page,
            id=page.name,
            marks=pytest.mark.xdist_group("docker" if page.name == "ship.md" else "ray"),
        )
        for page in PAGES
        if page.name not in OTHERWISE
    ],
)
def test_commands_print_what_the_page_says(page, tmp_path):
    found = commands(page)
    for name, script in re.findall(
        r"Save as `(\S+)`:\n\n```python\n(.*?)\n```", page.read_text("utf-8"), re.DOTALL
    ):
        (tmp_path / name).write_text(script)
    if page.name == "ship.md" and (not shutil.which("docker") or pods.docker("version").returncode):
        pytest.skip("no docker daemon answers")
    assert found and run_all(found, copy(tmp_path)) >= 1


@pytest.mark.parametrize("page", [*ROOT.glob("*.md"), *PAGES], ids=lambda page: page.name)
def test_links_to_files_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#]+)", page.read_text("utf-8")):
        assert link.startswith("https://") or (page.parent / link).exists(), link


@pytest.mark.slow
def test_script_of_the_page_runs(tmp_path):
    (script,) = blocks("train.md", "python")
    folder = copy(tmp_path)
    (folder / "script.py").write_text(script)
    output = run("python script.py", folder, clean(folder))
    assert re.search(r"True \{'exact_match': .*'chrf': .*'baseline_chrf'", output), output


def changed(folder, number):
    """A copy of the templates with a change that docs/train.md shows."""
    copy(folder)
    (folder / "change.diff").write_text(blocks("train.md", "diff")[number])
    run("git init -q && git apply change.diff", folder, clean(folder))
    return folder


@pytest.mark.slow
def test_trainings_side_by_side_keep_the_best_and_resume_each_its_own(tmp_path):
    folder = changed(tmp_path, 0)
    environment = {**clean(folder), "METAFLOW_HOME": str(folder / "none"), "METAFLOW_USER": "test"}
    flow, mark = folder / "template_flow.py", "            add_training_card(run, self.losses)\n"
    source = flow.read_text("utf-8")
    assert source.count(mark) == 1
    run("python template_flow.py --no-pylint run --epochs 4", folder, environment)
    whole = artifacts(folder, "best")
    # Seed 2 fails after its training: `resume` has to continue from the checkpoint of that seed.
    flow.write_text(
        source.replace(mark, f"            assert self.input != 2, 'broken off'\n{mark}"), "utf-8"
    )
    broken = subprocess.run(
        [sys.executable, flow, "--no-pylint", "run", "--epochs", "4"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert broken.returncode != 0 and "broken off" in broken.stdout + broken.stderr
    flow.write_text(source, "utf-8")
    again = run("python template_flow.py --no-pylint resume", folder, environment)
    # No other seed is trained again, and this one was nearly done.
    assert len(epochs(again)) < 5
    resumed = artifacts(folder, "best")
    assert resumed["scores"] == whole["scores"]
    assert recipes.changed_files(resumed["model"], whole["model"]) == []
    assert "model: the model of run" in run("python export_model.py", folder, environment)
    exported = (folder / "model/model.safetensors").read_bytes()
    assert exported == resumed["model"]["model.safetensors"]


@pytest.mark.slow
def test_pairs_from_s3(tmp_path):
    folder = changed(tmp_path, 1)
    pairs = [(f"text {number}", f"texte {number}") for number in range(200)]
    moto = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    moto.start()
    try:
        url = "http://{}:{}".format(*moto.get_host_and_port())
        s3 = boto3.client(
            "s3",
            endpoint_url=url,
            **dict(
                zip(("aws_access_key_id", "aws_secret_access_key", "region_name"), KEYS.values())
            ),
        )
        s3.create_bucket(Bucket="bucket")
        lines = ["source\ttarget", *("\t".join(pair) for pair in pairs)]
        s3.put_object(Bucket="bucket", Key="pairs.tsv", Body="\n".join(lines).encode())
        environment = {
            **clean(folder),
            **KEYS,
            "METAFLOW_S3_ENDPOINT_URL": url,
            "METAFLOW_USER": "test",
            "METAFLOW_HOME": str(folder / "none"),
            "PYTHONPATH": str(EXTENSION),
            "METAFLOW_DATATOOLS_S3ROOT": "s3://bucket/data",
            "STAND_IN_CLUSTER": "http://127.0.0.1:9",
        }
        command = "python template_flow.py --no-pylint run --epochs 1 --data s3://bucket/{}"
        for name, expected in (
            ("none.tsv", "s3://bucket/none.tsv"),
            ("pairs.tsv", "not good enough"),
        ):
            done = subprocess.run(
                ["bash", "-c", command.format(name)],
                cwd=folder,
                env=environment,
                timeout=400,
                capture_output=True,
                text=True,
            )
            output = done.stdout + done.stderr
            assert done.returncode != 0 and expected in output and "Traceback" not in output, output
        found = artifacts(folder, "prepare")
        assert sorted(found["training"] + found["held_out"]) == sorted(pairs)
    finally:
        moto.stop()


EVERY = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PAGES]
RUN_AS = {
    "console": "by this file, test_readme.py and test_update.py",
    "python": "saved, and run",
    "diff": "applied, and run",
    "yaml": "checked by test_rayservice.py",
    "text": "data of the form that a test writes",
}


def test_every_block_is_run_or_it_is_said_why_not():
    ran = total = 0
    for page in EVERY:
        text = page.read_text("utf-8")
        for language, block in re.findall(r"^```(\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
            if block.startswith("templates/ "):  # the tree in the README
                continue
            assert language in RUN_AS, (page, block)
            total += 1
            typed = re.findall(r"^\$ (.*)", block, re.MULTILINE)
            ran += language != "console" or not all(map(not_run, typed))
        for block in re.findall(
            r"(?:^    \S.*\n)+", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.M), re.M
        ):
            total += 1
            assert all(not_run(line.strip()) for line in block.splitlines()), (page, block)
    commanded = [command for page in EVERY for command, _ in commands(page)]
    typed = [command for command in commanded if not not_run(command)]
    print(f"{ran} of {total} blocks are run, {len(typed)} of {len(commanded)} commands")
    used = [
        pattern
        for pattern in NOT_RUN
        if any(
            fnmatch.fnmatch(line.strip().removeprefix("$ "), pattern)
            for page in EVERY
            for line in page.read_text("utf-8").splitlines()
        )
    ]
    assert used == list(NOT_RUN)
    assert ran >= 20


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.name[0] in "stu"], ids=lambda page: page.name
)
def test_pages_are_made_alike(page):
    text = page.read_text("utf-8")
    parts = [
        text.find(part)
        for part in ("# ", "\nGoal: ", "```console", "## What goes wrong", "\nNext: ")
    ]
    assert -1 not in parts and parts == sorted(parts) and "**where your code goes" in text.lower()


# Messages of others, which no source here holds: who says it.
FOREIGN = {
    "Unable to locate METAFLOW_PROFILE 'local'": "Metaflow",
    "Unknown user": "Metaflow",
    "Timed out finishing run": "wandb",
    "... wasn't read/writable": "wandb",
    "Destination repository is dirty; cannot continue.": "copier",
    "Unknown revision: 'v0.1.0'": "copier",
    "You are downgrading from": "copier",
    "This template requires Copier version": "copier",
    "not a git repository": "git",
    "COPY failed: ... model: file does not exist": "Docker",
    "Invalid HTTP request received.": "uvicorn",
    "Bind for 127.0.0.1:8000 failed: port is already allocated": "Docker",
    "The node with node id: ... has been marked dead": "Ray",
    "Version mismatch: The cluster was started with: ...": "Ray",
    "Failed to connect to GCS": "Ray",
}


def test_messages_are_those_of_the_files():
    sources = "".join(
        path.read_text("utf-8")
        for path in [*(ROOT / "templates").glob("*.py"), ROOT / "tools/outdated.py"]
    )
    for page in PAGES:
        table = page.read_text("utf-8").partition("## What goes wrong")[2].partition("\n## ")[0]
        for message in re.findall(r"^\| `([^`]+)`", table, re.MULTILINE):
            if message not in FOREIGN:
                longest = max(
                    re.split(r"\.\.\.|\{.*?\}|\d+(?:\.\d+)?|: |<TAB>", message), key=len
                ).strip()
                assert len(longest) > 8 and longest in sources, (page.name, message)
