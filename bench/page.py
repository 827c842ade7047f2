"""Write what bench.py has measured into docs/benchmark.md, and draw it: docs/benchmark.svg."""

import json
from pathlib import Path

import matplotlib

HERE = Path(__file__).parent
EMPTY = HERE / "page.md"  # docs/benchmark.md without figures
RESULTS = HERE / "results.json"
PAGE = HERE.parent / "docs/benchmark.md"
CHART = PAGE.with_suffix(".svg")
LABELS = {  # the names of bench.py, in the order of the page
    "template": "this template",
    "template HAProxy": "this template, behind HAProxy",
    "template bfloat16": "this template, bfloat16",
    "template int8": "this template, int8",
    "litserve": "LitServe",
    "bentoml": "BentoML",
    "fastapi": "FastAPI alone",
    "ray-docs": "Ray Serve's tutorial",
    "ctranslate2": "CTranslate2 (int8) behind FastAPI",
}
DRAWN = ("template", "litserve", "bentoml", "fastapi", "ray-docs")  # all in float32
LISTS = 4  # of 900 texts, beside single ones
BESIDE_LISTS = f"{LISTS} lists"
LOADED = "80 % load"


def limit_of(server):
    """Return the name of the limit in the precision of a server of the template."""
    precision = server.removeprefix("template ")
    return f"limit {precision if precision in ('bfloat16', 'int8') else 'float32'}"


class Results:
    """The measurements of one whole run: medians of its rounds."""

    def __init__(self, content):
        self.content = content
        self.found = {}
        for result in content["results"]:
            self.found[result["server"], result["clients"], result["mix"]] = result

    def rate(self, server, clients, mix="equal"):
        """Return requests/s; the limit at 128 clients is that of the largest batch, 32."""
        if server.startswith("limit"):
            clients = min(clients, 32)
        return self.found[server, clients, mix]["requests_per_s"]

    def milliseconds(self, server, clients, mix, percentile):
        """Return how long answers took, such as the percentile "p99"."""
        return self.found[server, clients, mix][f"{percentile}_ms"]


def table(heads, rows):
    """Return a table in Markdown; figures stand on the right."""
    lines = [heads, ["---"] + ["--:"] * (len(heads) - 1), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def clients(count):
    return "1 client" if count == 1 else f"{count} clients"


def rates(results):
    """Return the table of requests/s of all servers."""
    counts = (1, 8, 32, 128)
    rows = []
    for name, label in {"limit float32": "limit, float32", **LABELS}.items():
        for mix in ("equal", "mixed"):
            figures = [f"{results.rate(name, count, mix):.1f}" for count in counts]
            p99 = f"{results.milliseconds(name, 32, mix, 'p99'):.0f}"
            rows.append([label, mix, *figures, p99])
    heads = ["server", "lengths", *map(clients, counts), "p99 ms at 32"]
    return table(heads, rows)


def parts_of_limit(results):
    """Return the table of the share of the limit that the template reaches."""
    counts = (8, 32, 128)
    rows = []
    for name, label in LABELS.items():
        if name.startswith("template"):
            limit = limit_of(name)
            parts = [f"{results.rate(name, n) / results.rate(limit, n):.2f}" for n in counts]
            call = results.milliseconds(limit, 1, "equal", "p50")
            added = results.milliseconds(name, 1, "equal", "p50") - call
            rows.append([label, *parts, f"{added:.0f}"])
    heads = ["of its limit", *map(clients, counts), "ms added at 1 client"]
    return table(heads, rows)


def against_peers(results):
    """Return the table of the template's requests/s, divided by those of a peer."""
    counts = (1, 8, 32, 128)
    rows = []
    for name, label in LABELS.items():
        if not name.startswith("template"):
            ratios = [results.rate("template", n) / results.rate(name, n) for n in counts]
            rows.append([label, *(f"{ratio:.2f}" for ratio in ratios)])
    heads = ["this template against", *map(clients, counts)]
    return table(heads, rows)


def waits(results):
    """Return the table of the times of single texts, under load and beside lists."""
    full_batch = 32_000 / results.rate("limit float32", 32)  # in ms
    cases = {"at 80 % load": (0, LOADED), f"beside {LISTS} lists of 900": (1, BESIDE_LISTS)}
    rows = []
    for label, (count, mix) in cases.items():
        times = [results.milliseconds("template", count, mix, part) for part in ("p50", "p99")]
        batches = [f"{time / full_batch:.1f}" for time in times]
        rows.append([label, *(f"{time:.0f}" for time in times), *batches])
    heads = ["a text", "p50 ms", "p99 ms", "p50 in full batches", "p99 in full batches"]
    return table(heads, rows)


def how(results):
    content = results.content
    rounds = f"the median of {content['rounds']} rounds of {content['seconds']:g} s"
    return f"{content['date']}, {content['machine']}, {content['versions']}; {rounds}."


TABLES = {  # {name in page.md: what makes it}
    "how": how,
    "rates": rates,
    "limit": parts_of_limit,
    "peers": against_peers,
    "waits": waits,
}


def draw(results):
    """Write a chart of the servers in float32, at 8 and at 32 clients, with the limit as a line."""
    matplotlib.use("svg")
    from matplotlib import pyplot

    pyplot.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "benchmark", "font.size": 10})
    figure, panels = pyplot.subplots(1, 2, figsize=(8, 2.4), sharey=True, layout="constrained")
    names = DRAWN[::-1]  # from below
    for axes, count in zip(panels, (8, 32)):
        values = [results.rate(name, count) for name in names]
        colours = ["#54aeff" if name == "template" else "#d0d7de" for name in names]
        bars = axes.barh([LABELS[name] for name in names], values, color=colours)
        axes.bar_label(bars, fmt="%.1f", label_type="center")
        limit = results.rate("limit float32", count)
        axes.axvline(limit, linestyle="--", color="#57606a")
        axes.set_title(f"{count} clients, limit {limit:.1f}", fontsize=10)
        axes.set(xlabel="requests/s", xlim=(0, 1.12 * max(limit, *values)))
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(CHART, metadata={"Date": None})
    pyplot.close(figure)


def main():
    results = Results(json.loads(RESULTS.read_text("utf-8")))
    tables = {name: make(results) for name, make in TABLES.items()}
    text = EMPTY.read_text("utf-8").format(**tables)
    PAGE.write_text(text, "utf-8")
    draw(results)
    print(text)


if __name__ == "__main__":
    main()
