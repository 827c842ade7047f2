"""Repositories of users: git, copier, and the sets of files that copier copies."""

import os
import sys
import tempfile
from pathlib import Path

import jinja2
import yaml
from helpers import shell
from helpers.repository import ROOT, template_files

COPIER = yaml.safe_load((ROOT / "copier.yml").read_text("utf-8"))
FILES = sorted(path.name for path in template_files())


def files_of(what):
    """Return the files that copier copies for an answer, by what copier.yml leaves out."""
    left_out = {jinja2.Template(pattern).render(what=what) for pattern in COPIER["_exclude"]}
    return [name for name in FILES if name not in left_out]


SETS = {what: files_of(what) for what in COPIER["what"]["choices"].values()}
BIN = Path(sys.executable).parent
GIT = {name: "test@example.com" for name in ("GIT_AUTHOR_EMAIL", "GIT_COMMITTER_EMAIL")} | {
    name: "Test" for name in ("GIT_AUTHOR_NAME", "GIT_COMMITTER_NAME")
}


def run(command, folder, code=0, **more):
    """What a shell command prints, as somebody runs it who has git and the packages."""
    environment = {
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "HOME": str(folder),
        "LANG": "C.UTF-8",
        "TMPDIR": tempfile.gettempdir(),
        **GIT,
        **more,
    }
    return shell.run(command, folder, environment, code, seconds=400)


def repository(folder):
    folder.mkdir(parents=True, exist_ok=True)
    run("git init --quiet", folder)
    return folder
