"""List the copies of templates/ in another repository, and merge new versions into them.

    python tools/outdated.py ../my-repository
    python tools/outdated.py --merge ../my-repository

A copy is compared with the templates that this clone has checked out. What it was made from is
looked up in the history of this clone, without tags: of all states that the template had under
the version which the copy names, it is the one most like the copy.

Exit code 0: every copy is up to date, or merged. 1: a copy is outdated, or the merge left
conflicts. 2: a copy cannot be compared or merged, or there is none.
"""

import argparse
import io
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, NoReturn

ROOT = Path(__file__).resolve().parents[1]
# "# template_flow.py, version 0.1.0"; other lines may stand above it.
NAME = re.compile(r"^\ufeff?#.*?([\w.-]+), version (\d+\.\d+\.\d+)", re.MULTILINE)
# A file without such a line is a copy if it shares that many lines with a template, and half of
# all: 10 lines, or 3 if it has the template's name too.
SHARED, SHARED_BY_NAME = 10, 3
LONG_LINE = 12  # characters; shorter lines are in every file
MAX_SIZE = 1_000_000  # bytes; a larger file is no copy
MOST_CONFLICTS = 127  # that git merge-file counts; its other exit codes are errors


class State(NamedTuple):
    """A template as it is, or was once."""

    name: str
    version: str
    text: str


class Copy(NamedTuple):
    path: Path
    shown: str  # the path as it is printed
    text: str
    version: str | None  # that it names
    base: State  # what it was made from
    latest: State  # what it would be made from now


# -- Text ------------------------------------------------------------------------------------------


def decode(content: bytes) -> str:
    """Bytes of any encoding as text, which `encode` turns back into the same bytes."""
    return content.decode("utf-8", "surrogateescape")


def encode(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def plain(text: str) -> str:
    """Return the text without its release number and CR LF, which do not count as changes."""
    text = re.sub(r'(, version |image\.version=")\d+\.\d+\.\d+', r"\1", text)
    return text.removeprefix("\ufeff").replace("\r\n", "\n")


def long_lines(text: str) -> set[str]:
    return {line for line in plain(text).splitlines() if len(line) >= LONG_LINE}


def count_differences(one: str, other: str) -> int:
    """How many lines are only in one of two texts."""
    return distance(Counter(plain(one).splitlines()), Counter(plain(other).splitlines()))


def distance(one: Counter[str], other: Counter[str]) -> int:
    return (one - other).total() + (other - one).total()


def words_of(text: str) -> Counter[str]:
    """The words of a text, which no formatter changes."""
    return Counter(re.findall(r"\w+", plain(text)))


def without_first_line(state: State) -> State:
    return state._replace(text=state.text.partition("\n")[2])


# -- git -------------------------------------------------------------------------------------------


def fail(message: str) -> NoReturn:
    print(message, file=sys.stderr)
    sys.exit(2)


def git(folder: Path, *command: str, stdin: str = "") -> bytes:
    """What git prints; if it fails, exit with its own message."""
    environment = dict(os.environ)
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):  # a hook sets these
        environment.pop(name, None)
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *command],
            env=environment,
            input=stdin.encode(),
            capture_output=True,
        )
    except FileNotFoundError:
        fail("git is not installed")
    if done.returncode:
        message = decode(done.stderr).splitlines() or ["git failed"]
        fail(f"{folder}: {message[0]}")
    return done.stdout


def read_blobs(names: dict[str, str]) -> Iterator[State]:
    """The templates among objects of this repository, {id: file name}."""
    output = git(ROOT, "cat-file", "--batch", stdin="\n".join(names))
    for name in names.values():
        header, _, output = output.partition(b"\n")  # "ID blob SIZE", and below it the content
        size = int(header.split()[2])
        text = decode(output[:size])
        output = output[size + 1 :]
        if named := NAME.search(text):
            yield State(name, named[2], text)


def checked_out() -> Iterator[State]:
    """Each template, as this clone has it now."""
    names = {}
    for line in decode(git(ROOT, "ls-tree", "-z", "HEAD", "templates/")).split("\0")[:-1]:
        details, path = line.split("\t")  # "MODE blob ID"
        names[details.split()[2]] = Path(path).name
    return read_blobs(names)


def all_states() -> list[State]:
    """Each template as it was in each commit up to this one, the oldest first."""
    names = {}
    for line in decode(git(ROOT, "rev-list", "--objects", "HEAD", "--", "templates")).splitlines():
        identifier, _, path = line.partition(" ")
        if "templates/" in path:  # a file, not a commit or a folder
            names[identifier] = Path(path).name
    return list(read_blobs(names))[::-1]


def find_files(where: Path) -> Iterator[tuple[Path, str]]:
    """(path, path as printed) of a file, or of all in a folder that git does not ignore."""
    if where.is_file():
        yield where, str(where)
        return
    listed = git(where, "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    for name in dict.fromkeys(decode(listed).split("\0")[:-1]):
        path = where / name
        if path.is_symlink():
            continue
        if path.is_dir():
            print(f"{name}: a repository of its own, not searched")
        elif path.is_file() and path.stat().st_size <= MAX_SIZE:
            yield path, name


# -- Which template a file is a copy of ------------------------------------------------------------


class Templates:
    """The templates of this clone, and all that they were."""

    def __init__(self) -> None:
        if git(ROOT, "rev-parse", "--is-shallow-repository").strip() == b"true":
            fail(f"{ROOT}: this clone lacks the history: git fetch --unshallow")
        self.states = all_states()
        if not self.states:
            fail(f"{ROOT}: no templates here; run this file in a clone of their repository")
        self.now = {state.name: state for state in checked_out()}
        self.newest = {state.name: state for state in self.states}
        self.lines: dict[str, set[str]] = {}
        for state in self.states:
            self.lines.setdefault(state.name, set()).update(long_lines(state.text))

    def find_copy(self, path: Path, shown: str) -> Copy | None:
        try:
            text = decode(path.read_bytes())
        except OSError as error:
            print(f"{shown}: {error.strerror}, not compared")
            return None
        for name, version in NAME.findall(text):
            if name in self.lines:
                base = self.find_base(text, name, version)
                return Copy(path, shown, text, version, base, self.find_latest(base))
        if name := self.find_alike(text, self.lines, path.name):
            base = self.find_base(text, name)
            latest = self.find_latest(base)
            return Copy(path, shown, text, None, *map(without_first_line, (base, latest)))
        if path.name in self.lines:
            print(f"{shown}: not compared, it has the name of a template but not its lines")
        return None

    def find_alike(self, text: str, names: Iterable[str], file_name: str = "") -> str | None:
        """The name of the template that a text without a name was made from."""
        lines = long_lines(text)
        shared = {name: len(lines & self.lines[name]) for name in names}
        name = max(shared, key=lambda each: shared[each])
        half = min(len(lines), len(long_lines(self.newest[name].text))) / 2
        enough = SHARED_BY_NAME if name == file_name else SHARED
        return name if shared[name] >= max(half, enough) else None

    def find_base(self, text: str, name: str, version: str | None = None) -> State:
        """The state of a template that is most like a text; of several, the oldest."""
        states = [state for state in self.states if state.name == name]
        of_version = [state for state in states if state.version == version]
        words = words_of(text)
        return min(of_version or states, key=lambda state: distance(words_of(state.text), words))

    def find_latest(self, base: State) -> State:
        """The template as it is now, maybe under another name; `base` if there is none."""
        if base.name in self.now:
            return self.now[base.name]
        name = self.find_alike(base.text, self.now)
        return self.now[name] if name else base


# -- What is said, and done ------------------------------------------------------------------------


def is_unknown(copy: Copy) -> bool:
    """Whether the copy names a version that the history does not have."""
    return copy.version not in (None, copy.base.version)


def is_outdated(copy: Copy) -> bool:
    return not is_unknown(copy) and plain(copy.base.text) != plain(copy.latest.text)


def describe(copy: Copy, names: Iterable[str]) -> str:
    """One line; `names` are those of the templates."""
    base, latest = copy.base, copy.latest
    start = f"{copy.shown}: {base.name} {copy.version or f'{base.version} by its lines'}"
    if is_unknown(copy):
        return f"{start}, no such version in {ROOT}: git pull there"
    state = "changed" if count_differences(copy.text, base.text) else "unchanged"
    if latest.name not in names:
        return f"{start}, {state}, no longer a template"
    if not is_outdated(copy):
        return f"{start}, {state}"
    renamed = f"{latest.name} " if latest.name != base.name else ""
    newer = "a newer " if latest.version == base.version else ""
    return f"{start}, {state}, outdated: there is {newer}{renamed}{latest.version}"


def renumber(text: str, old: State, new: State) -> str:
    """With the new number, so that the number is never a conflict."""
    text = text.replace(f"{old.name}, version {old.version}", f"{new.name}, version {new.version}")
    return text.replace(f'image.version="{old.version}"', f'image.version="{new.version}"')


def merge(copy: Copy) -> int:
    """Merge what is new into a copy, which keeps its ends of lines; the number of conflicts."""
    base, latest = copy.base, copy.latest
    mark = "\ufeff" if copy.text.startswith("\ufeff") else ""
    mine = renumber(copy.text.removeprefix(mark), base, latest)
    was, now = renumber(base.text, base, latest), latest.text
    is_windows = copy.text.count("\r\n") * 2 > copy.text.count("\n")
    mine = mine.replace("\r\n", "\n")
    labels = [copy.shown, f"{base.name} {base.version}", f"{latest.name} {latest.version}"]
    with tempfile.TemporaryDirectory() as folder:
        command = ["git", "merge-file", "-p"]
        for label in labels:
            command += ["-L", label]
        for name, text in (("mine", mine), ("was", was), ("now", now)):
            (Path(folder) / name).write_bytes(encode(text))
            command.append(name)
        done = subprocess.run(command, cwd=folder, capture_output=True)
    if not 0 <= done.returncode <= MOST_CONFLICTS:
        fail(f"{copy.shown}: {decode(done.stderr).strip()}")
    merged = done.stdout.replace(b"\n", b"\r\n") if is_windows else done.stdout
    copy.path.write_bytes(encode(mark) + merged)
    return done.returncode


def try_merge(copy: Copy) -> int:
    """Merge, unless that could lose something, and say so; the exit code."""
    if git(copy.path.parent, "--literal-pathspecs", "status", "--porcelain", "--", copy.path.name):
        print(f"{copy.shown}: not merged, commit your changes to it first")
        return 2
    conflicts = merge(copy)
    found = f", conflicts: {conflicts}, search for <<<<<<<" if conflicts else ""
    print(f"{copy.shown}: merged {copy.latest.name} {copy.latest.version}{found}")
    return 1 if conflicts else 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--merge", action="store_true", help="merge what is new into the copies")
    parser.add_argument("path", type=Path, help="a git repository, a folder in it, or one file")
    arguments = parser.parse_args()
    if isinstance(sys.stdout, io.TextIOWrapper):  # file names that the terminal cannot show
        sys.stdout.reconfigure(errors="backslashreplace")
    templates = Templates()
    codes = []
    for path, shown in find_files(arguments.path):
        copy = templates.find_copy(path, shown)
        if copy is None:
            continue
        if arguments.merge and not is_unknown(copy) and copy.base.text != copy.latest.text:
            codes.append(try_merge(copy))  # a new number too
            continue
        print(describe(copy, templates.now))
        codes.append(2 if is_unknown(copy) else int(is_outdated(copy)))
    if not codes:
        fail(f"{arguments.path}: no copy of a template found")
    if 1 in codes and not arguments.merge:
        command = [sys.executable, str(Path(__file__).resolve())]
        quote = subprocess.list2cmdline if os.name == "nt" else shlex.join
        print(quote([*command, "--merge", str(arguments.path.resolve())]))
    return max(codes)


if __name__ == "__main__":
    sys.exit(main())
