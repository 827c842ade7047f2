"""copier_sets/, copier.yml, tools/outdated.py: copies equal templates/ and take a new release."""

import os
import re
import shutil

import pytest
from helpers.copies import SETS, repository, run
from helpers.pages import commands, shows
from helpers.repository import ROOT, names


def change(path, old, new):
    text = path.read_text("utf-8")
    assert text.count(old) == 1, (path, old)
    path.write_text(text.replace(old, new), "utf-8")


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    """This repository as it is now, its release tagged."""
    folder = tmp_path_factory.mktemp("templates")
    for name in names():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name, follow_symlinks=False)
    repository(folder)
    run("git add --all; git commit --quiet --message first; git tag v0.1.0", folder)
    return folder


@pytest.fixture(scope="module")
def next_release(release, tmp_path_factory):
    """A clone with one more release: two lines of the flow differ, and one has braces."""
    folder = tmp_path_factory.mktemp("next") / "templates"
    run(f"git clone --quiet {release} {folder}", release)
    flow, serve = (
        folder / "templates" / name for name in ("template_flow.py", "template_ray_serve.py")
    )
    change(flow, "BATCH_SIZE = 64", "BATCH_SIZE = 96")
    flow.write_text(flow.read_text("utf-8") + "# ${{ github.sha }} {% raw %}\n", "utf-8")
    change(serve, "max_queue: int = Field(256,", "max_queue: int = Field(512,")
    for command, _ in commands(ROOT / "CONTRIBUTING.md")[3:]:
        run(command, folder)
    assert "version 0.2.0" in flow.read_text("utf-8")
    return folder


def test_sets_hold_every_template_as_a_link():
    assert set(SETS["all"]) == {
        path.name for path in (ROOT / "templates").iterdir() if path.is_file()
    } - {".env"}
    table = (
        (ROOT / "README.md").read_text("utf-8").split("## Copy what you need")[1].split("\n\n**")[0]
    )
    for name, files in SETS.items():
        (row,) = re.findall(rf"^\|[^|]*\| `{name}` \|(.*)\|$", table, re.MULTILINE)
        assert name == "all" or set(re.findall("`([^`]+)`", row)) == set(files), name
        for each in (ROOT / "copier_sets" / name).iterdir():
            target = (
                "../answers.jinja" if each.suffix == ".jinja" else f"../../templates/{each.name}"
            )
            assert os.readlink(each) == target and each.exists()


@pytest.mark.parametrize("what", SETS)
@pytest.mark.parametrize("place", ["plain", "with spaces and 'quotes'", "été/ファイル"])
def test_copier_copies_byte_by_byte(release, what, place, tmp_path):
    run(f'copier copy --defaults --data what={what} {release} "$FOLDER"', tmp_path, FOLDER=place)
    copied = {path.name: path for path in (tmp_path / place).iterdir()}
    assert set(copied) == {*SETS[what], ".copier-answers.yml"}
    for name in SETS[what]:
        assert copied[name].read_bytes() == (ROOT / "templates" / name).read_bytes()
        assert not copied[name].is_symlink()


def test_copier_asks_one_question_and_runs_nothing():
    text = (ROOT / "copier.yml").read_text("utf-8")
    assert re.findall(r"^(\w+):", text, re.MULTILINE) == [
        "_min_copier_version",
        "_subdirectory",
        "what",
    ]


def test_page_word_by_word(release, next_release, tmp_path):
    """docs/update.md: copy, edit, a new release, update; manual copies; from these to copier."""
    shown = commands(ROOT / "docs/update.md")[1:]  # without the installation
    assert len(shown) == 12
    folder, bare = repository(tmp_path / "mine"), tmp_path / "templates"
    run(f"git clone --quiet {release} {bare}", tmp_path)
    for command, expected in shown[:4]:
        assert shows(run(command, folder, TEMPLATES=str(bare)), expected)
    change(folder / "template_flow.py", "MAX_SCORED = 1000", "MAX_SCORED = 2000")
    (folder / ".env.example").unlink()
    (folder / ".env").write_text("WANDB_API_KEY=mine\n")
    run("git add --all; git commit --quiet --message mine", folder)
    assert ".env" not in run("git ls-files", folder).split()
    run(f"git pull --quiet --tags {next_release}", bare)
    for command, expected in shown[4:7]:
        assert shows(run(command, folder), expected)
    text = (folder / "template_flow.py").read_text("utf-8")
    assert (
        "MAX_SCORED = 2000" in text
        and "BATCH_SIZE = 96" in text
        and text.endswith("# ${{ github.sha }} {% raw %}\n")
    )
    assert "version 0.2.0" in text and not (folder / ".env.example").exists()

    by_hand = repository(tmp_path / "by hand")
    shutil.copy(ROOT / "templates/template_flow.py", by_hand / "flow.py")
    change(by_hand / "flow.py", "MAX_SCORED = 1000", "MAX_SCORED = 2000")
    (command, expected) = shown[7]
    output = run(command, by_hand, code=1, TEMPLATES=str(bare))
    assert shows(output, expected), output
    run(output.splitlines()[-1], by_hand)  # the line that it prints merges
    merged = (by_hand / "flow.py").read_text("utf-8")
    assert merged == text
    assert "flow.py: template_flow.py 0.2.0, changed\n" == run(
        f"python {bare}/tools/outdated.py .", by_hand
    )

    adopted = repository(tmp_path / "adopted")
    for name in SETS["serve"]:
        shutil.copy(ROOT / "templates" / name, adopted)
    change(
        adopted / "template_ray_serve.py",
        "max_batch_size: int = Field(32",
        "max_batch_size: int = Field(8",
    )
    for command, expected in shown[8:]:
        assert shows(run(command, adopted, TEMPLATES=str(bare)), expected)
    text = (adopted / "template_ray_serve.py").read_text("utf-8")
    assert "max_batch_size: int = Field(8" in text and "max_queue: int = Field(512," in text


def test_the_same_line_changed_twice_is_shown_and_nothing_is_lost(release, next_release, tmp_path):
    folder = repository(tmp_path)
    run(f"copier copy --defaults --vcs-ref v0.1.0 --data what=train {next_release} .", folder)
    change(folder / "template_flow.py", "BATCH_SIZE = 64", "BATCH_SIZE = 8")
    run("git add --all; git commit --quiet --message mine", folder)
    run("copier update --defaults", folder)
    found = re.search(
        r"<<<<<<<.*?\n(.*?)=======\n(.*?)>>>>>>>",
        (folder / "template_flow.py").read_text("utf-8"),
        re.S,
    )
    assert "BATCH_SIZE = 8" in found[1] and "BATCH_SIZE = 96" in found[2]
    run("git diff --check", folder, code=2)


def test_in_a_folder_of_a_larger_repository(next_release, tmp_path):
    repository(tmp_path)
    run(
        f"copier copy --defaults --vcs-ref v0.1.0 --data what=train {next_release} ml/translator",
        tmp_path,
    )
    run(
        "git add --all; git commit --quiet --message mine; copier update --defaults ml/translator",
        tmp_path,
    )
    assert "BATCH_SIZE = 96" in (tmp_path / "ml/translator/template_flow.py").read_text("utf-8")


def outdated(next_release, folder, code):
    return run(f"python {next_release}/tools/outdated.py .", folder, code)


def test_outdated_tells_apart(release, next_release, tmp_path):
    """A copy as released, a changed one, one that differs only in its release, and others."""
    folder = repository(tmp_path)
    (folder / "notes.md").write_text("# notes.md, version 0.1.0\n")
    (folder / "picture.png").write_bytes(b"\x89PNG\xff")
    shutil.copy(release / "templates/export_model.py", folder / "export.py")
    assert outdated(next_release, folder, 0) == "export.py: export_model.py 0.1.0, as released\n"
    change(folder / "export.py", "import argparse", "import argparse  # mine")
    assert outdated(next_release, folder, 0) == "export.py: export_model.py 0.1.0, changed\n"
    shutil.copy(release / "templates/template_ray_serve.py", folder / "app.py")
    assert (
        "app.py: template_ray_serve.py 0.1.0, as released, outdated: v0.2.0 differs\n"
        in outdated(next_release, folder, 1)
    )
    change(folder / "app.py", ", version 0.1.0", ", version 0.1.9")
    assert "app.py: template_ray_serve.py 0.1.9, no such release\n" in outdated(
        next_release, folder, 0
    )


@pytest.mark.parametrize(
    "arguments, said",
    [
        ("", "usage: python tools/outdated.py REPOSITORY"),
        ("{nowhere}", "cannot change to"),
        ("{folder}", "not a git repository"),
    ],
)
def test_outdated_says_what_it_cannot_do(next_release, arguments, said, tmp_path):
    arguments = arguments.format(folder=tmp_path, nowhere=tmp_path / "none")
    output = run(f"python {next_release}/tools/outdated.py {arguments}", tmp_path, code=2)
    assert said in output and len(output.splitlines()) == 1


def test_without_releases(tmp_path):
    shutil.copytree(ROOT / "tools", repository(tmp_path) / "tools")
    assert "no releases here; git fetch --tags" in run(
        "python tools/outdated.py .", tmp_path, code=2
    )


def test_every_template_carries_its_name_and_the_newest_release():
    newest = re.search(r"^## (\d\S*)$", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)[1]
    for name in SETS["all"]:
        text = (ROOT / "templates" / name).read_text("utf-8")
        assert f"{name}, version {newest}" in text.splitlines()[0], name
        assert set(re.findall(r'image\.version="(\S+)"', text)) <= {newest}
