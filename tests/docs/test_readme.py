"""Every command in README.md is run as it stands, and prints what README.md says."""

import re
import time
from pathlib import Path

import pytest
from helpers.loopback import alone
from helpers.pages import commands, shows
from helpers.repository import ROOT, template_files
from helpers.shell import clean, run


@pytest.mark.xdist_group("ray")
def test_make_demo_twice(tmp_path):
    ((command, expected),) = [each for each in commands() if each[0] == "make demo"]
    curl, answer = next(each for each in commands() if each[0].startswith("curl"))
    for _ in range(2):
        begin = time.monotonic()
        with alone(8000):
            output = run(command, ROOT, clean(tmp_path))
        assert shows(output, expected) and shows(output, [f"$ {curl}", *answer]), output
        assert time.monotonic() - begin < 300
        assert list(Path("/tmp").glob("demo.*")) == []  # it cleans up


def test_files_that_the_readme_names_are_there():
    tree = (ROOT / "README.md").read_text("utf-8").split("## What is here")[1].split("```")[1]
    names, files = (
        r"[\w-]*\.[\w.-]+\w|Dockerfile[\w-]*",
        tree.split("templates/ ")[1].split("\ndocs/ ")[0],
    )
    described = set(re.findall(names, files))
    assert {path.name for path in template_files()} == described
