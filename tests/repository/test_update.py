"""copier.yml, tools/outdated.py: copies equal templates/ and take what is new."""

import re
import shutil
from pathlib import Path

import pytest
from helpers.copies import COPIER, FILES, SETS, repository, run
from helpers.pages import commands, shows
from helpers.repository import ROOT, names

# Git as on Windows: it makes no symbolic links, and other ends of lines.
WINDOWS = {
    "GIT_CONFIG_COUNT": "2",
    "GIT_CONFIG_KEY_0": "core.symlinks",
    "GIT_CONFIG_VALUE_0": "false",
    "GIT_CONFIG_KEY_1": "core.autocrlf",
    "GIT_CONFIG_VALUE_1": "true",
}


def change(path, old, new):
    text = path.read_text("utf-8")
    assert text.count(old) == 1, (path, old)
    path.write_text(text.replace(old, new), "utf-8")


def outdated(templates, folder, code, arguments=".", **more):
    return run(f"python {templates}/tools/outdated.py {arguments}", folder, code, **more)


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
    change(serve, "max_queue: int = Field(1000,", "max_queue: int = Field(1200,")
    for command, _ in commands(ROOT / "CONTRIBUTING.md")[4:]:
        run(command, folder)
    assert "version 0.2.0" in flow.read_text("utf-8")
    return folder


def test_sets_are_those_of_the_readme():
    assert SETS["all"] == FILES
    table = (
        (ROOT / "README.md").read_text("utf-8").split("## Copy what you need")[1].split("\n\n**")[0]
    )
    for name, files in SETS.items():
        (row,) = re.findall(rf"^\|[^|]*\| `{name}` \|(.*)\|$", table, re.MULTILINE)
        assert name == "all" or set(re.findall("`([^`]+)`", row)) == set(files), name


def test_only_the_answers_file_is_rendered():
    rendered = [path.name for path in (ROOT / "templates").glob("*.jinja")]
    # A dot in front: `cp templates/*` does not take it.
    assert rendered == [".{{ _copier_conf.sep }}{{ _copier_conf.answers_file }}.jinja"]
    assert not [path for path in (ROOT / "templates").iterdir() if path.is_symlink()]


@pytest.mark.parametrize(
    "what, place, git",
    [
        ("all", "plain", {}),
        ("train", "with spaces and 'quotes'", {}),
        ("serve", "été/ファイル", {}),
        ("image", "plain", {}),
        *((what, "windows", WINDOWS) for what in SETS),
    ],
)
def test_copier_copies_byte_by_byte(release, what, place, git, tmp_path):
    command = f'copier copy --defaults --data what={what} {release} "$FOLDER"'
    run(command, tmp_path, FOLDER=place, **git)
    copied = {path.name: path for path in (tmp_path / place).iterdir()}
    assert set(copied) == {*SETS[what], ".copier-answers.yml"}
    for name in SETS[what]:
        assert copied[name].read_bytes() == (ROOT / "templates" / name).read_bytes()
        assert not copied[name].is_symlink()


def test_copier_asks_one_question_and_runs_nothing():
    assert set(COPIER) == {"_min_copier_version", "_subdirectory", "what", "_exclude"}


def test_answers_file_of_another_name(release, tmp_path):
    """For a repository that another copier template has made."""
    (tmp_path / ".copier-answers.yml").write_text("_src_path: another\n")
    run(f"copier copy -a .copier-answers.ml.yml --defaults {release} .", tmp_path)
    assert (tmp_path / ".copier-answers.yml").read_text() == "_src_path: another\n"
    assert "what: all" in (tmp_path / ".copier-answers.ml.yml").read_text()


@pytest.mark.parametrize("tags", ["--tags", "--no-tags"])
def test_page_word_by_word(release, next_release, tags, tmp_path):
    """docs/update.md: copy, edit, a new release, update; manual copies; from these to copier."""
    shown = commands(ROOT / "docs/update.md")[1:]  # without the installation
    assert len(shown) == 13
    folder, bare = repository(tmp_path / "mine"), tmp_path / "templates"
    run(f"git clone --quiet {tags.replace('--tags', '')} {release} {bare}", tmp_path)
    for command, expected in shown[:4]:
        assert shows(run(command, folder, TEMPLATES=str(bare)), expected)
    change(folder / "template_flow.py", "MAX_SCORED = 1000", "MAX_SCORED = 2000")
    (folder / ".env.example").unlink()
    (folder / ".env").write_text("WANDB_API_KEY=mine\n")
    run("git add --all; git commit --quiet --message mine", folder)
    assert ".env" not in run("git ls-files", folder).split()
    run(f"git pull --quiet {tags} {next_release}", bare)
    assert (run("git tag", bare) == "") == (tags == "--no-tags")
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
    run("git add --all; git commit --quiet --message mine", by_hand)
    for (command, expected), code in zip(shown[7:9], (1, 0)):
        output = run(command, by_hand, code, TEMPLATES=str(bare))
        assert shows(output, expected), output
    assert (by_hand / "flow.py").read_text("utf-8") == text
    assert "flow.py: template_flow.py 0.2.0, changed\n" == outdated(bare, by_hand, 0)

    adopted = repository(tmp_path / "adopted")
    for name in SETS["serve"]:
        shutil.copy(ROOT / "templates" / name, adopted)
    app = adopted / "template_ray_serve.py"
    change(app, "timeout_s: float = Field(50,", "timeout_s: float = Field(20,")
    run("git add --all; git commit --quiet --message mine", adopted)
    for command, expected in shown[9:]:
        assert shows(run(command, adopted, TEMPLATES=str(bare)), expected)
    change(bare / "templates/template_ray_serve.py", "= Field(1200,", "= Field(1500,")
    run("git commit --quiet --all --message third", bare)
    if tags == "--tags":
        run("git tag v0.3.0", bare)
    run("copier update --defaults", adopted)
    text = app.read_text("utf-8")
    assert "timeout_s: float = Field(20," in text and "max_queue: int = Field(1500," in text
    assert "<<<<<<<" not in text
    assert run("git status --short", adopted).split()[1::2] == [
        ".copier-answers.yml",
        "template_ray_serve.py",
    ]


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


def test_newer_than_the_newest_tag(next_release, tmp_path):
    templates, folder = tmp_path / "templates", repository(tmp_path / "mine")
    run(f"git clone --quiet {next_release} {templates}", tmp_path)
    run("git tag --delete v0.2.0", templates)
    run(f"copier copy --defaults --vcs-ref HEAD --data what=train {templates} .", folder)
    run("git add --all; git commit --quiet --message mine", folder)
    assert "You are downgrading from" in run("copier update --defaults", folder, code=1)
    run("copier update --defaults --vcs-ref HEAD", folder)
    assert run("git status --porcelain", folder) == ""


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


# -- This repository's own history -----------------------------------------------------------------


@pytest.fixture(scope="module", params=["no tags", "tags"])
def history(request, tmp_path_factory):
    """This repository with its history and what is not committed yet, and where 0.1.0 was set."""
    folder = tmp_path_factory.mktemp("history") / "templates"
    try:
        run(f"git clone --quiet --no-tags {ROOT} {folder}", ROOT)
        first = run("git log --reverse --format=%h -S'## 0.1.0' -- CHANGELOG.md", folder).split()[0]
        run(f"git cat-file -e {first}^ --", folder)
    except (AssertionError, IndexError):
        pytest.skip("needs the history of this repository")
    for path in folder.iterdir():
        if path.name != ".git":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for name in names():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)
    run("git add --all; git commit --quiet --allow-empty --message now", folder)
    folders = run("git log -1 --format=%p --diff-filter=D -- copier_sets", folder).strip()
    if request.param == "tags":
        run(f"git tag v0.1.0 {first}; git tag v0.1.1 {folders}; git tag v0.2.0", folder)
    return folder, {"0.1.0": first, "folders of links": folders}


def edit(path):
    path.write_text(edited(path.read_text("utf-8")), "utf-8")


def edited(text):
    """With the user's change, where no release changes anything."""
    return f"{text}\n# mine\n"


# The history may be missing, as in a shallow clone: nobody else has it.
@pytest.mark.needs_file
@pytest.mark.parametrize("made, what", [("0.1.0", "all"), ("folders of links", "train")])
def test_copier_updates_what_this_repository_once_gave(history, made, what, tmp_path):
    templates, commits = history
    folder = repository(tmp_path)
    was = f"--vcs-ref {commits[made]} --data what={what}"
    run(f"copier copy --defaults {was} {templates} .", folder)
    edit(folder / "template_flow.py")
    run("git add --all; git commit --quiet --message mine; copier update --defaults", folder)
    for name in SETS[what]:
        now = (ROOT / "templates" / name).read_text("utf-8")
        expected = edited(now) if name == "template_flow.py" else now
        assert (folder / name).read_text("utf-8") == expected, name
    head = run("git describe --tags --always", templates)
    assert f"_commit: {head}" in (folder / ".copier-answers.yml").read_text()


@pytest.mark.needs_file
def test_outdated_merges_into_what_this_repository_once_gave(history, tmp_path):
    templates, commits = history
    folder = repository(tmp_path)
    listed = run(f"git ls-tree --name-only {commits['0.1.0']} templates/", templates)
    for path in listed.splitlines():
        run(f"git -C {templates} show {commits['0.1.0']}:{path} > {Path(path).name}", folder)
    edit(folder / "template_flow.py")
    run("git add --all; git commit --quiet --message mine", folder)
    found = outdated(templates, folder, 1).splitlines()
    assert len(found) == len(listed.splitlines()) + 1  # and the command
    assert sum("0.1.0, unchanged" in line for line in found) == len(found) - 2
    outdated(templates, folder, 0, "--merge .")
    for path in listed.splitlines():
        name, now = Path(path).name, (ROOT / path).read_text("utf-8")
        expected = edited(now) if name == "template_flow.py" else now
        assert (folder / name).read_text("utf-8") == expected, name
    assert "outdated" not in outdated(templates, folder, 0)


# -- Copies by hand --------------------------------------------------------------------------------


def test_outdated_tells_apart(release, next_release, tmp_path):
    """A copy as it was copied, a changed one, one that differs only in its release, and others."""
    folder = repository(tmp_path)
    (folder / "notes.md").write_text("# notes.md, version 0.1.0\n")
    (folder / "picture.png").write_bytes(b"\x89PNG\xff\0")
    shutil.copy(release / "templates/export_model.py", folder / "export.py")
    assert outdated(next_release, folder, 0) == "export.py: export_model.py 0.1.0, unchanged\n"
    change(folder / "export.py", "import argparse", "import argparse  # mine")
    assert outdated(next_release, folder, 0) == "export.py: export_model.py 0.1.0, changed\n"
    shutil.copy(release / "templates/template_ray_serve.py", folder / "app.py")
    assert "app.py: template_ray_serve.py 0.1.0, unchanged, outdated: there is 0.2.0\n" in outdated(
        next_release, folder, 1
    )
    change(folder / "app.py", ", version 0.1.0", ", version 0.1.9")
    assert "app.py: template_ray_serve.py 0.1.9, no such version in" in outdated(
        next_release, folder, 2
    )


def as_it_is(text):
    return text.encode()


# How a copy can look: how it is made of the text of a template.
LOOKS = {
    "as it is": as_it_is,
    "CR LF": lambda text: text.replace("\n", "\r\n").encode(),
    "byte order mark": lambda text: b"\xef\xbb\xbf" + text.encode(),
    "both": lambda text: b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode(),
    "licence above": lambda text: f"# Copyright: mine\n#\n{text}".encode(),
    "no first line": lambda text: text.partition("\n")[2].encode(),
    "no first line, CR LF": lambda text: text.partition("\n")[2].replace("\n", "\r\n").encode(),
    "another encoding": lambda text: "# été\n".encode("latin-1") + text.encode(),
}
PLACES = [
    "template_flow.py",
    "src/flow.py",
    'a folder/it\'s "mine" [1].py',
    "-x.py",
    "été/ファイル.py",
]


def test_every_copy_is_found_and_merged_from_anywhere(next_release, tmp_path):
    """The line that is printed, pasted elsewhere, merges and keeps the user's files."""
    folder, elsewhere = repository(tmp_path / "it's mine"), tmp_path / "elsewhere"
    was, now = (
        run(f"git show {commit}:templates/template_flow.py", next_release).replace(
            "MAX_SCORED = 1000", "MAX_SCORED = 2000"
        )
        for commit in ("v0.1.0", "v0.2.0")
    )
    copies = {folder / f"{look}/flow.py": look for look in LOOKS}
    copies |= {folder / place: "as it is" for place in PLACES}
    users = [place / name for place in (folder, elsewhere) for name in ("was", "now", "mine")]
    for path in (*copies, *users):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(LOOKS[copies[path]](was) if path in copies else b"mine\n")
    run("git add --all; git commit --quiet --message mine", folder)
    *found, line = outdated(next_release, folder, 1).splitlines()
    assert len(found) == len(copies) and all("outdated: there is 0.2.0" in each for each in found)
    merged = run(line, elsewhere).splitlines()
    assert len(merged) == len(copies)
    assert all(each.endswith(": merged template_flow.py 0.2.0") for each in merged)
    for path, look in copies.items():
        assert path.read_bytes() == LOOKS[look](now), path
    assert all(path.read_bytes() == b"mine\n" for path in users)
    assert len(run("git status --porcelain", folder).splitlines()) == len(copies)
    assert "outdated" not in outdated(next_release, folder, 0)


def test_a_copy_with_mixed_ends_of_lines_and_other_quotes_is_merged(next_release, tmp_path):
    folder = repository(tmp_path)
    was = run("git show v0.1.0:templates/template_flow.py", next_release)
    begin, mark, end = was.replace('"', "'").partition("BATCH_SIZE")
    (folder / "flow.py").write_bytes((begin + mark + end.replace("\n", "\r\n", 3)).encode())
    run("git add --all; git commit --quiet --message mine", folder)
    *_, line = outdated(next_release, folder, 1).splitlines()
    assert run(line, tmp_path) == "flow.py: merged template_flow.py 0.2.0\n"
    merged = (folder / "flow.py").read_bytes()
    assert b"\r" not in merged and b"BATCH_SIZE = 96" in merged


@pytest.mark.parametrize("look", ["as it is", "both"])
def test_only_what_both_changed_is_a_conflict(release, next_release, look, tmp_path):
    folder, text = repository(tmp_path), (release / "templates/template_flow.py").read_text("utf-8")
    mine = text.replace("BATCH_SIZE = 64", "BATCH_SIZE = 8")
    (folder / "flow.py").write_bytes(LOOKS[look](mine))
    run("git add --all; git commit --quiet --message mine", folder)
    *_, line = outdated(next_release, folder, 1).splitlines()
    assert "flow.py: merged template_flow.py 0.2.0, conflicts: 1, search for <<<<<<<\n" == run(
        line, tmp_path, code=1
    )
    merged = (folder / "flow.py").read_bytes()
    ends = b"\r\n" if look == "both" else b"\n"
    assert merged.count(ends) == merged.count(b"\n")
    (found,) = re.findall(r"<<<<<<<.*?\n(.*?)=======\s+(.*?)>>>>>>>", merged.decode(), re.S)
    assert "BATCH_SIZE = 8" in found[0] and "BATCH_SIZE = 96" in found[1]


def test_what_is_not_committed_is_not_touched(release, next_release, tmp_path):
    folder = repository(tmp_path)
    for name in ("template_flow.py", "template_ray_serve.py"):
        shutil.copy(release / "templates" / name, folder)
    run("git add --all; git commit --quiet --message mine", folder)
    change(folder / "template_flow.py", "MAX_SCORED = 1000", "MAX_SCORED = 2000")
    text = (folder / "template_flow.py").read_text("utf-8")
    output = outdated(next_release, folder, 2, "--merge .")
    assert "template_flow.py: not merged, commit your changes to it first\n" in output
    assert "template_ray_serve.py: merged template_ray_serve.py 0.2.0\n" in output
    assert (folder / "template_flow.py").read_text("utf-8") == text


def test_what_is_no_copy_or_not_searched_is_said(release, next_release, tmp_path):
    folder, other = repository(tmp_path / "mine"), repository(tmp_path / "other")
    (folder / "Dockerfile").write_text("FROM debian\nCMD mine\n")
    (folder / "main.py").write_text("import argparse\nfrom pathlib import Path\n")
    (folder / "gone.py").write_text("gone\n")
    (folder / "link.py").symlink_to(release / "templates/template_flow.py")
    (folder / ".gitignore").write_text("ignored\n")
    (folder / "ignored").mkdir()
    shutil.copy(release / "templates/template_flow.py", folder / "ignored/flow.py")
    run("git commit --quiet --allow-empty --message other", other)
    run(f"git -c protocol.file.allow=always submodule --quiet add {other} sub", folder)
    run("git add --all; git commit --quiet --message mine; rm gone.py", folder)
    said = [
        "Dockerfile: not compared, it has the name of a template but not its lines",
        "sub: a repository of its own, not searched",
        ".: no copy of a template found",
    ]
    assert sorted(outdated(next_release, folder, 2).splitlines()) == sorted(said)
    named = outdated(next_release, folder, 1, "ignored/flow.py").splitlines()[0]
    assert named.startswith("ignored/flow.py: template_flow.py 0.1.0, unchanged, outdated")


def test_a_template_that_is_gone_or_has_a_new_name(release, next_release, tmp_path):
    templates, folder = tmp_path / "templates", repository(tmp_path / "mine")
    run(f"git clone --quiet {next_release} {templates}", tmp_path)
    run("git mv template_flow.py flow.py; git rm --quiet Dockerfile", templates / "templates")
    change(templates / "templates/flow.py", "# template_flow.py,", "# flow.py,")
    run("git commit --quiet --all --message third", templates)
    for name in ("template_flow.py", "Dockerfile"):
        shutil.copy(release / "templates" / name, folder)
    run("git add --all; git commit --quiet --message mine", folder)
    output = outdated(templates, folder, 1)
    assert "Dockerfile: Dockerfile 0.1.0, unchanged, no longer a template\n" in output
    assert "template_flow.py 0.1.0, unchanged, outdated: there is flow.py 0.2.0\n" in output
    outdated(templates, folder, 0, "--merge .")
    now = (templates / "templates/flow.py").read_text("utf-8")
    assert (folder / "template_flow.py").read_text("utf-8") == now


def test_in_a_hook_and_on_a_narrow_terminal(release, next_release, tmp_path):
    folder = repository(tmp_path)
    shutil.copy(release / "templates/export_model.py", folder / "é.py")
    hook = {"GIT_DIR": str(folder / ".git"), "PYTHONIOENCODING": "ascii"}
    output = outdated(next_release, folder, 0, **hook)
    assert output == "\\xe9.py: export_model.py 0.1.0, unchanged\n"


@pytest.mark.parametrize(
    "arguments, said",
    [
        ("", "the following arguments are required: path"),
        ("{nowhere}", "cannot change to"),
        ("{folder}", "not a git repository"),
    ],
)
def test_outdated_says_what_it_cannot_do(next_release, arguments, said, tmp_path):
    arguments = arguments.format(folder=tmp_path, nowhere=tmp_path / "none")
    output = run(f"python {next_release}/tools/outdated.py {arguments}", tmp_path, code=2)
    assert said in output.splitlines()[-1] and "Traceback" not in output


def test_without_the_history(release, next_release, tmp_path):
    """A shallow clone: both say what is missing; a download, and the tool alone."""
    folder, shallow = repository(tmp_path / "mine"), tmp_path / "shallow"
    run(f"copier copy --defaults --vcs-ref v0.1.0 {next_release} .", folder)
    run("git add --all; git commit --quiet --message mine", folder)
    run(f"git clone --quiet --depth 1 --no-tags file://{next_release} {shallow}", tmp_path)
    assert "this clone lacks the history: git fetch --unshallow" in outdated(shallow, folder, 2)
    answers = folder / ".copier-answers.yml"
    answers.write_text(answers.read_text().replace(str(next_release), str(shallow)))
    run("git commit --quiet --all --message mine", folder)
    assert "Unknown revision: 'v0.1.0'" in run("copier update --defaults", folder, code=1)
    assert run("git status --porcelain", folder) == ""

    alone = tmp_path / "alone"
    shutil.copytree(ROOT / "tools", alone / "tools")
    assert "not a git repository" in outdated(alone, folder, 2)
    run("git add --all; git commit --quiet --message mine", repository(alone))
    assert "no templates here; run this file in a clone" in outdated(alone, folder, 2)


def test_every_template_carries_its_name_and_the_newest_release():
    newest = re.search(r"^## (\d\S*)$", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)[1]
    for name in SETS["all"]:
        text = (ROOT / "templates" / name).read_text("utf-8")
        assert f"{name}, version {newest}" in text.splitlines()[0], name
        assert set(re.findall(r'image\.version="(\S+)"', text)) <= {newest}
