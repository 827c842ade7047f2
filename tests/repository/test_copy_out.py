"""Each set of files, copied into another repository: its commands run there, undisturbed."""

import os
import shutil
import subprocess
import sys

import pytest
from helpers.copies import FILES, SETS, repository
from helpers.pages import commands, not_run, run_all
from helpers.remote import pods
from helpers.repository import ROOT
from tiny_translator import PAIRS, make_model

README, SHIP, TRAIN = commands(), commands(ROOT / "docs/ship.md"), commands(ROOT / "docs/train.md")
ASK = README[-2:]  # serve run, curl
CHECK = ("python check_serve_config.py serve_config.yaml", ["serve_config.yaml: valid"])
ROWS = {"train": TRAIN, "serve": [CHECK, *ASK], "image": [CHECK, *SHIP[3:6]], "all": README[1:]}
OWN = {
    "pyproject.toml": '[project]\nname = "mine"\nversion = "1"\n'
    '[tool.pytest.ini_options]\ntestpaths = ["tests"]\n'
    'addopts = "--strict-markers"\nfilterwarnings = ["error::pytest.PytestWarning"]\n',
    "src/mine/__init__.py": "",
    "src/mine/model.py": "raise SystemExit('not this one')\n",
    "tests/test_mine.py": "def test_mine():\n    import mine.model\n",
    ".env": "DATABASE_URL=postgres://mine\n",
    "model.py": "raise SystemExit('not this one')\n",
    "README.md": "# Mine\n",
}


def own(folder, files):
    """A repository with a package, tests, settings of its own, and an older copy of the files."""
    for name, text in OWN.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    (folder / "older").mkdir()
    for name in files:
        text = (
            (ROOT / "templates" / name).read_text("utf-8").replace(", version 0.1", ", version 0.0")
        )
        (folder / "older" / name).write_text(text + "\n# changed\n", "utf-8")


@pytest.mark.parametrize(
    "what",
    [
        pytest.param("all", marks=pytest.mark.xdist_group("port 8000")),
        pytest.param("train", marks=[pytest.mark.slow]),
        pytest.param("serve", marks=[pytest.mark.slow, pytest.mark.xdist_group("port 8000")]),
        pytest.param("image", marks=[pytest.mark.slow, pytest.mark.xdist_group("port 8000")]),
    ],
)
def test_commands_of_a_set(what, tmp_path):
    if what == "image" and (not shutil.which("docker") or pods.docker("version").returncode):
        pytest.skip("no docker daemon answers")
    folder = repository(tmp_path)
    own(folder, SETS[what])
    for name in SETS[what]:
        shutil.copy(ROOT / "templates" / name, folder)
    if "all" != what != "train":  # somebody's model: these sets do not train one
        make_model(folder / "model", PAIRS)
    row = ROWS[what]
    assert run_all(row, folder) == sum(not not_run(command) for command, _ in row)
    assert all((folder / name).read_text() == text for name, text in OWN.items())
    # As somebody has it who installed pytest and nothing for it.
    tests = sorted(path.name for path in folder.glob("test_*.py"))
    collected = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", *tests],
        cwd=folder,
        env={**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        timeout=400,
        text=True,
        capture_output=True,
    )
    assert collected.returncode == 0, collected.stdout[-2000:]


def test_every_file_is_in_a_row_that_runs():
    assert set(ROWS) == set(SETS)
    assert {name for names in SETS.values() for name in names} == set(FILES)
