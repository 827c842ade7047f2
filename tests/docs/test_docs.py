"""What docs/*.md says is true: commands run, diffs apply, messages are the real ones."""

import fnmatch
import re
import shutil
import subprocess

import boto3
import flow_testing
import pytest
from flow_testing import artifacts, toy_steps, with_toy
from helpers import recipes
from helpers.pages import NOT_RUN, blocks, commands, copy, not_run, run_all
from helpers.remote import pods
from helpers.repository import ROOT
from helpers.s3 import EXTENSION, KEYS
from helpers.shell import clean, run
from moto.server import ThreadedMotoServer

PAGES = sorted((ROOT / "docs").glob("*.md"))
OTHERWISE = {  # page: where its commands are run
    "train.md": "test_copy_out.py",
    "update.md": "test_update.py",
    "reliability.md": "test_reliability.py",
    "your-own-model.md": "the tests of the recipes",
    "languages.md": "it has none",
    "benchmark.md": "it has none",
}


TRAIN = [  # with which several pages begin
    ("python template_flow.py run --epochs 8", ["...", "Done!"]),
    ("python export_model.py --replace", ["model: the model of run TemplateFlow/..."]),
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder in which TRAIN was run."""
    folder = copy(tmp_path_factory.mktemp("trained"))
    assert run_all(TRAIN, folder) == len(TRAIN)
    return folder


@pytest.mark.slow
@pytest.mark.xdist_group("port 8000")
@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.name not in OTHERWISE], ids=lambda page: page.name
)
def test_commands_print_what_the_page_says(page, tmp_path, request):
    if page.name == "ship.md" and (not shutil.which("docker") or pods.docker("version").returncode):
        pytest.skip("no docker daemon answers")
    found = commands(page)
    todo = [each for each in found if each not in TRAIN]
    if len(todo) < len(found):
        shutil.copytree(request.getfixturevalue("trained"), tmp_path, dirs_exist_ok=True)
    else:
        copy(tmp_path)
    for name, script in re.findall(
        r"Save as `(\S+)`:\n\n```python\n(.*?)\n```", page.read_text("utf-8"), re.DOTALL
    ):
        (tmp_path / name).write_text(script)
    assert run_all(todo, tmp_path) >= 1


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
    flow = folder / "template_flow.py"
    source = with_toy(flow.read_text("utf-8"))
    mark = "            add_training_card(run, self.losses)\n"
    assert source.count(mark) == 1

    def run_toy(command, text):
        flow.write_text(text, "utf-8")
        options = (command, "--offline", "False") if command == "run" else (command,)
        return flow_testing.run(folder, command=options, flow=flow, WANDB_MODE="disabled")

    code, output = run_toy("run", source)
    assert code == 0 and len(toy_steps(output)) == 30, output
    whole = artifacts(folder, "best")
    # Seed 2 fails after its training: `resume` has to continue from the checkpoint of that seed.
    code, output = run_toy(
        "run", source.replace(mark, f"            assert self.input != 2, 'broken off'\n{mark}")
    )
    assert code != 0 and "broken off" in output, output
    code, output = run_toy("resume", source)
    # No seed is trained again: this one was done.
    assert code == 0 and toy_steps(output) == [], output
    resumed = artifacts(folder, "best")
    assert resumed["scores"] == whole["scores"]
    assert recipes.changed_files(resumed["model"], whole["model"]) == []
    environment = {**clean(folder), "METAFLOW_HOME": str(folder / "none"), "METAFLOW_USER": "test"}
    assert "model: the model of run" in run("python export_model.py", folder, environment)
    assert (folder / "model/toy.json").read_bytes() == resumed["model"]["toy.json"]


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
    "Step train not found for Run(...)": "Metaflow",
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
    "Failed to bind to address '127.0.0.1:8000'": "Ray",
    "No module named 'template_ray_serve'": "Python",
    "The current node timed out during startup": "Ray",
    "Proxy actor readiness check for proxy on ... didn't complete in 5.0s": "Ray",
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
