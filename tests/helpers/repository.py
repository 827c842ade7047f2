"""Where things are in this repository."""

import fnmatch
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
TEMPLATES = ROOT / "templates"


def template_files():
    """Return the paths of the templates: no folders, no key of yours, no answers file of copier."""
    found = [path for path in TEMPLATES.iterdir() if path.is_file()]
    return [path for path in found if path.name != ".env" and path.suffix != ".jinja"]


IGNORED = [".git", *(line.rstrip("/") for line in (ROOT / ".gitignore").read_text().splitlines())]


def names():
    """The files of this repository, as git would list them; there need not be a git."""

    def kept(path):
        return not any(
            fnmatch.fnmatch(each, pattern)
            for each in (path, Path(path).name)
            for pattern in IGNORED
        )

    for folder, folders, files in os.walk(ROOT):
        here = Path(folder).relative_to(ROOT)
        folders[:] = [name for name in folders if kept(str(here / name))]
        yield from (str(here / name) for name in files if kept(str(here / name)))


def check_for_github(path, schema):
    """Fail unless a file is what GitHub takes, and zizmor finds nothing in it."""
    folder = Path(sys.executable).parent
    for command in (
        ["check-jsonschema", "--builtin-schema", f"vendor.{schema}"],
        ["zizmor", "--offline", "--persona=pedantic"],
    ):
        done = subprocess.run(
            [folder / command[0], *command[1:], path], capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stdout + done.stderr
