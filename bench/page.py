"""Write what bench.py has measured into docs/benchmark.md, and draw it: docs/benchmark.svg."""

import json
import math
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
ENGINES = {  # the names of bench/engines.py, in the order of the page
    "float32": "torch, float32",
    "template int8": "torch, int8 as in this template",
    "torchao": "torchao, int8",
    "onnxruntime": "ONNX Runtime, int8",
    "openvino": "OpenVINO, int8",
    "ctranslate2": "CTranslate2, int8",
}
DRAWN = ("template", "litserve", "bentoml", "fastapi", "ray-docs")  # all in float32
LISTS = 4  # of 900 texts, beside single ones
BESIDE_LISTS = f"{LISTS} lists"
LOADED = "80 % load"
CLIENTS_EACH = 8  # of bench/replicas.py, for each replica


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


def growth(results):
    """Return the table of bench/replicas.py, and what follows from it for 1,000 requests/s."""
    measured = results.content.get("replicas")
    if not measured:
        return "Not measured in this run: `bench/replicas.py` needs Docker."
    rows = []
    for found in measured["results"]:
        count = found["replicas"]
        rate = found["requests_per_s"]
        cost = [f"{found[f'{part}_ms']:.1f}" for part in ("replica", "proxy", "other")]
        rows.append([count, f"{rate:.1f}", f"{rate / count:.1f}", *cost, found["MB"]])
    heads = ["replicas", "requests/s", "for each", "CPU ms: replica", "proxy", "other"]
    lines = [
        f"Each node has {measured['cpus']} CPUs, {CLIENTS_EACH} clients, a proxy and one replica:",
        table([*heads, "MB a replica"], rows),
        projection(results, measured["results"][-1]["proxy_ms"]),
    ]
    return "\n\n".join(lines)


def projection(results, proxy_ms):
    """Return what 1,000 requests/s of the model of this page would take, on paper."""
    rate = results.rate("template", 32)
    return (
        f"For 1,000 requests/s of the model of this page, on paper: {math.ceil(1000 / rate)} "
        f"replicas like the one above ({rate:.1f} requests/s each, in float32), whose proxies take "
        f"{proxy_ms:.1f} CPUs of all nodes together. A proxy is one process, so it serves at most "
        f"{1000 / proxy_ms:.0f} requests/s: with `proxy_location: HeadOnly`, that breaks first. "
        "With a proxy on every node, as configured, each has to serve only what its node gets."
    )


def engines(results):
    """Return the table of bench/engines.py."""
    measured = results.content.get("engines")
    if not measured:
        return "Not measured in this run."
    rows = []
    for name, found in measured["found"].items():
        rates = [f"{rate:.1f}" for rate in found["rates"].values()]
        rows.append([ENGINES[name], *rates, found["chrf"], found["other"], found["batch"]])
    sizes = measured["found"]["float32"]["rates"]
    heads = ["engine", *(f"texts/s, batch of {size}" for size in sizes)]
    heads += ["chrF", "differ from float32", "differ by batch"]
    return f"{table(heads, rows)}\n\nMeasured on {measured['date']}."


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
    "growth": growth,
    "engines": engines,
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


def text_of(results):
    """Return the text of the page."""
    tables = {name: make(results) for name, make in TABLES.items()}
    return EMPTY.read_text("utf-8").format(**tables)


def add(name, measured):
    """Keep what another program has measured, and write the page again."""
    content = json.loads(RESULTS.read_text("utf-8"))
    content[name] = measured
    RESULTS.write_text(json.dumps(content, indent=1) + "\n", "utf-8")
    main()


def main():
    results = Results(json.loads(RESULTS.read_text("utf-8")))
    text = text_of(results)
    PAGE.write_text(text, "utf-8")
    draw(results)
    print(text)


if __name__ == "__main__":
    main()
