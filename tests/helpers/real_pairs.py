"""Write real English-French pairs as a training file.

    python tests/helpers/real_pairs.py OUT.tsv [--limit N] [--longest N]

Source: the French message catalogues of two packages from requirements-dev.txt. Nothing of theirs
is imported or copied into the repository. Under a header stands one pair a line, as it is in the
catalogue, quotes included. Left out: what is untranslated, fuzzy or obsolete, plurals with a form
missing, text of more than one line or with a tab (TSV cannot hold it), and exact duplicates.
"""

import argparse
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

import polib

PACKAGES = ("Django", "gramps")  # web texts (.po), genealogy texts (.mo)


def catalogues(package: str) -> list[Path]:
    """The package's French catalogues; a compiled one only where its source is not shipped."""
    try:
        shipped = files(package) or []
    except PackageNotFoundError:
        raise SystemExit(
            f"{package} is not installed: pip install -r requirements-dev.txt"
        ) from None
    paths = {
        Path(str(f.locate())).resolve() for f in shipped if f.parts[-3:-1] == ("fr", "LC_MESSAGES")
    }
    return sorted(
        p
        for p in paths
        if p.suffix == ".po" or (p.suffix == ".mo" and p.with_suffix(".po") not in paths)
    )


def entries(path: Path) -> Iterator[tuple[str, str]]:
    """Every finished translation of a catalogue, singular and plural as two pairs."""
    if path.suffix == ".mo":  # compiling has already left out fuzzy and obsolete messages
        messages = list(polib.mofile(str(path)))
    else:
        messages = [m for m in polib.pofile(str(path)) if not (m.fuzzy or m.obsolete)]
    for message in messages:
        if not message.msgid_plural:
            yield message.msgid, message.msgstr
        elif all(message.msgstr_plural.values()):
            forms = message.msgstr_plural  # French: one, (millions,) other
            yield message.msgid, forms[min(forms)]
            yield message.msgid_plural, forms[max(forms)]


def one_line(text: str) -> bool:
    """True for text that a TSV field can hold and that says something."""
    return bool(text.strip()) and "\t" not in text and text.splitlines() == [text]


def pairs() -> list[tuple[str, str]]:
    """All pairs, always in the same order."""
    found = (pair for package in PACKAGES for path in catalogues(package) for pair in entries(path))
    return list(dict.fromkeys(pair for pair in found if all(map(one_line, pair))))


def write(path: Path, limit: int | None = None, longest: int = 1_000_000) -> int:
    """Write the pairs as `--data` takes them, up to so many characters; return how many."""
    chosen = [pair for pair in pairs() if max(map(len, pair)) <= longest][:limit]
    lines = ["source\ttarget", *("\t".join(pair) for pair in chosen)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")
    return len(chosen)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write real English-French pairs as a TSV file.")
    parser.add_argument("out", type=Path, metavar="OUT.tsv")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N pairs")
    parser.add_argument(
        "--longest", type=int, default=1_000_000, metavar="N", help="characters of a text"
    )
    args = parser.parse_args()
    print(write(args.out, args.limit, args.longest), "pairs")


if __name__ == "__main__":
    main()
