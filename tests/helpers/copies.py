"""Repositories of users: git, copier, and the sets of files that copier copies."""

import os
import sys
from pathlib import Path

from helpers import shell
from helpers.repository import ROOT

SETS = {
    path.name: sorted(each.name for each in path.iterdir() if each.suffix != ".jinja")
    for path in sorted((ROOT / "copier_sets").iterdir())
    if path.is_dir()
}
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
        **GIT,
        **more,
    }
    return shell.run(command, folder, environment, code, seconds=400)


def repository(folder):
    folder.mkdir(parents=True, exist_ok=True)
    run("git init --quiet", folder)
    return folder
