"""Write the results into docs/reliability.md."""

import os
import platform
import re
from datetime import date

import ray
from helpers.repository import ROOT

PAGE = ROOT / "docs/reliability.md"
HEADS = {
    "load": [
        "arrivals",
        "s",
        "requests/s",
        "requests",
        "p50 ms",
        "p99 ms",
        "refused (503)",
        "lost",
        "wrong",
    ],
    "faults": [
        "fault",
        "times",
        "in flight",
        "lost",
        "lost with retry",
        "wrong",
        "recovered after s",
    ],
    "long run": ["process, figure", "minutes", "after a fifth", "at the end", "requests", "wrong"],
}


def write(tables, names):
    """Put the rows between their marks in the page, in place of earlier ones of their names."""
    python = platform.python_version()
    how = f"{date.today()}, {os.cpu_count()} CPUs, Python {python}, Ray {ray.__version__}"
    text = re.sub(
        r"(<!-- how -->\n).*?\n(<!-- end -->)",
        rf"\g<1>{how}\n\2",
        PAGE.read_text("utf-8"),
        flags=re.DOTALL,
    )
    for name, rows in tables.items():
        before, _, rest = text.partition(f"<!-- {name} -->\n")
        old, end, after = rest.partition("<!-- end -->")
        kept = {line.split(" | ")[0][2:]: line for line in old.splitlines()[2:]}
        kept.update((str(row[0]), f"| {' | '.join(map(str, row))} |") for row in rows)
        ranked = sorted(kept, key=lambda each: names.index(each) if each in names else 0)
        lines = [f"| {' | '.join(cells)} |" for cells in (HEADS[name], ["---"] * len(HEADS[name]))]
        lines += [kept[each] for each in ranked]
        text = before + f"<!-- {name} -->\n" + "\n".join(lines) + "\n" + end + after
    PAGE.write_text(text, "utf-8")
    print(f"{how}: written to {PAGE}")
