"""List the copies of templates/ in another repository: outdated, changed, and how to merge.

    python tools/outdated.py ../my-repository

Each template names itself and its release in its first line: a copy is found by that line, whatever
its file is called now. Exit code 0: every copy is of the latest release, 1: some are outdated,
2: they cannot be compared.
"""

import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NAME = re.compile(r"^#!?.*?([\w.-]+), version (\d+\.\d+\.\d+)", re.MULTILINE)


def git(folder: Path, *command: str) -> str:
    """What git prints; SystemExit with git's own message if it fails."""
    done = subprocess.run(
        ["git", "-C", str(folder), *command], capture_output=True, text=True, encoding="utf-8"
    )
    if done.returncode:
        print(f"{folder}: {(done.stderr.splitlines() or ['git failed'])[0]}", file=sys.stderr)
        sys.exit(2)
    return done.stdout


def released(tag: str, name: str) -> str | None:
    """A template as it was released; None if that release did not have it."""
    held = git(ROOT, "ls-tree", "--name-only", tag, f"templates/{name}")
    return git(ROOT, "show", f"{tag}:templates/{name}") if held else None


def plain(text: str | None) -> str | None:
    """Without the number of its release: a file in which nothing else differs is not outdated."""
    return text and re.sub(r'(, version |version=")\d+\.\d+\.\d+', r"\1", text)


def copies(repository: Path) -> list[tuple[str, str, str, str]]:
    """(path, text, name of the template, its release) of each copy that git does not ignore."""
    found = []
    for path in git(
        repository, "ls-files", "-z", "--cached", "--others", "--exclude-standard"
    ).split("\0"):
        try:
            text = (repository / path).read_text("utf-8")
        except (OSError, UnicodeDecodeError):  # a folder, a deleted file, a picture
            continue
        if named := NAME.match(text):
            found.append((path, text, *named.groups()))
    return found


def main(repository: Path) -> int:
    tags = git(ROOT, "tag", "--list", "v*", "--sort=-version:refname").split()
    if not tags:
        print(f"{ROOT}: no releases here; git fetch --tags", file=sys.stderr)
        return 2
    newest, outdated = tags[0], []
    for path, text, name, version in copies(repository):
        was, now = (released(tag, name) if tag in tags else None for tag in (f"v{version}", newest))
        if was is None and now is None:  # not one of ours
            continue
        if was is None:
            state = "no such release"
        else:
            state = "as released" if plain(text) == plain(was) else "changed"
            if now is None:
                state += f", no longer in {newest}"
            elif plain(was) != plain(now):
                state += f", outdated: {newest} differs"
                outdated.append(
                    (path, f"v{version}:templates/{name}", f"{newest}:templates/{name}")
                )
        print(f"{path}: {name} {version}, {state}")
    for path, was, now in outdated:
        show = f"git -C {shlex.quote(str(ROOT))} show"
        print(
            f"{show} {was} > was; {show} {now} > now; "
            f"git merge-file {shlex.quote(path)} was now; rm was now"
        )
    return 1 if outdated else 0


if __name__ == "__main__":
    if len(sys.argv) != 2:
        print("usage: python tools/outdated.py REPOSITORY", file=sys.stderr)
        sys.exit(2)
    sys.exit(main(Path(sys.argv[1])))
