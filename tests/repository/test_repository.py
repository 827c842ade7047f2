"""What holds for the whole repository: versions that agree, forbidden words, files of tools."""

import re
import sys
from pathlib import Path

import pytest
import yaml
from helpers.repository import ROOT, check_for_github, names

BIN = Path(sys.executable).parent


NAMES = sorted(names())
TEXTS = {
    name: (ROOT / name).read_text("utf-8")
    for name in NAMES
    if (ROOT / name).is_file()
    and not (ROOT / name).is_symlink()
    and name != "LICENSE"
    and not name.endswith((".png", ".svg"))
}
SELF = str(Path(__file__).relative_to(ROOT))


def pins(name):
    """{package: version} of a requirements file."""
    lines = re.findall(r"^([\w.-]+)(?:\[[\w,]+\])?==(\S+)", TEXTS[name], re.MULTILINE)
    assert len(lines) == len(re.findall(r"^[^#\n]", TEXTS[name], re.MULTILINE)), (
        f"{name} has a line without =="
    )
    return dict(lines)


def test_versions_are_said_in_one_place():
    flow, serve = (
        pins(f"templates/{name}")
        for name in ("requirements.outerbounds.txt", "requirements-rayserve.txt")
    )
    assert all(serve[name] == version for name, version in flow.items() if name in serve)
    every = {**flow, **serve}
    said = re.compile(
        rf"\b({'|'.join(every)})(?:\[\w+\])?(?:==|Version: \"| )v?(\d+\.\d+(?:\.\d+)?)",
        re.IGNORECASE,
    )
    found = [
        (name, *each)
        for name, text in TEXTS.items()
        if name != SELF and not name.startswith("bench/")
        for each in said.findall(text)
    ]
    wrong = [each for each in found if not f"{every[each[1].lower()]}.".startswith(f"{each[2]}.")]
    assert len(found) > len(every) and not wrong
    assert ("templates/rayservice.yaml", "ray", every["ray"]) in found


def test_one_base_image():
    images = {
        each
        for name, text in TEXTS.items()
        for each in re.findall(r"\bpython:(3[\w.]+-[\w-]+)", text)
    }
    assert images == {"3.11-slim-bookworm"}


def test_python_versions_agree():
    workflow = yaml.safe_load(TEXTS[".github/workflows/test.yml"])
    matrix = workflow["jobs"]["templates"]["strategy"]["matrix"]["python"]
    low, high = matrix[0], matrix[-1]
    assert (
        f"Python {low} to {high}" in TEXTS["README.md"]
        and f"Python {low} to {high}" in TEXTS["Makefile"]
    )
    bounds = [f"({each.replace('.', ', ')})" for each in (low, high)]
    assert f"{bounds[0]} <= sys.version_info[:2] <= {bounds[1]}" in TEXTS["Makefile"]
    assert (
        f'"py{low.replace(".", "")}"' in TEXTS["pyproject.toml"]
        and f"--python-version {low} " in TEXTS["Makefile"]
    )


FORBIDDEN = {
    "an internal host": r"desertowl|mozilla-hub|atlassian\.net",
    "a moving tag": r":latest\b",
    "a key": r"(?i)key['\"]?\s*[=:]\s*['\"]?[0-9a-f]{40}|-----BEGIN [A-Z ]*PRIVATE KEY"
    r"|\bAKIA[0-9A-Z]{16}|\bghp_\w{36}",
    "somebody's own image": r"(?:docker\.io|docker push|FROM|image:) ?/?"
    r"(?!python|rayproject|\$)[a-z0-9]+/[\w-]+:",
    "a path of one machine": r"(?<![\w.])/(?:work|home/\w+|Users/\w+|opt/wheels)/",
}
ALLOWED = {
    ("docs/mozilla.md", "an internal host"),
    ("templates/rayservice.yaml", "somebody's own image"),
}


@pytest.mark.parametrize("what", FORBIDDEN)
def test_words_that_must_not_occur(what):
    found = [
        (name, each.group())
        for name, text in TEXTS.items()
        if name != SELF
        for each in re.finditer(FORBIDDEN[what], text)
        if (name, what) not in ALLOWED
    ]
    assert not found


def test_they_would_be_found():
    bad = (
        "https://ui.desertowl.example",
        "FROM ray:latest",
        f"WANDB_API_KEY={'0a' * 20}",
        "image: somebody/ray:2",
        "/home/me/x",
    )
    assert all(re.search(pattern, text) for pattern, text in zip(FORBIDDEN.values(), bad))


@pytest.mark.parametrize(
    "name, schema",
    [(".github/workflows/test.yml", "github-workflows"), (".github/dependabot.yml", "dependabot")],
)
def test_files_of_github_are_in_order(name, schema):
    check_for_github(ROOT / name, schema)
    for directory in re.findall(r"director(?:y|ies): (.*)", TEXTS[name]):
        assert all((ROOT / each.strip("[] /")).is_dir() for each in directory.split(","))


def test_files_end_and_indent_as_the_editor_config_says():
    for name, text in TEXTS.items():
        assert text.endswith("\n") and "\r" not in text, name
        assert name.endswith((".md", ".diff")) or not re.search(r"[ \t]+$", text, re.MULTILINE), (
            name
        )


def test_no_test_imports_a_test():
    for name, text in TEXTS.items():
        if name.endswith(".py"):
            assert not re.search(r"^\s*(from|import) test_", text, re.MULTILINE), name
