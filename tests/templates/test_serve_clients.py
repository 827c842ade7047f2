"""Requests as real clients send them, and lists next to single texts."""

import contextlib
import gzip
import http.client
import http.server
import json
import re
import shutil
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import rayserve_entrypoint
from serve_testing import Server, write_toy

ROUTE = "/v1/toy"

# The toy writes down when a request is planned, and each batch.
TRACE = """
    def trace(self, *line):
        with open("trace.txt", "ab", buffering=0) as file:
            file.write(json.dumps(line).encode() + b"\\n")
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The toy with a trace; a batch takes 20 ms."""
    folder = tmp_path_factory.mktemp("clients")
    write_toy(folder)
    app = folder / "template_ray_serve.py"
    text = app.read_text("utf-8")
    for old, new in (
        ("    def plan(self, request):\n", f"{TRACE}\n    def plan(self, request):\n"),
        ("        if len(texts) > 100:", '        self.trace("plan", texts)\n        if False:'),
        (
            "    def __call__(self, texts):\n",
            '    def __call__(self, texts):\n        self.trace("batch", texts)\n'
            "        time.sleep(0.02)\n",
        ),
    ):
        assert text.count(old) == 1
        text = text.replace(old, new)
    app.write_text(text, "utf-8")
    (folder / "trace.txt").touch()
    command = ["run", "template_ray_serve:build", "max_queue=20000", "max_body_bytes=500000"]
    with Server(folder, *command, "--route-prefix", ROUTE, dashboard=True) as running:
        running.folder = folder
        yield running.wait()


# -- Metrics ---------------------------------------------------------------------------------------


def trace(server):
    """Return [("plan" or "batch", texts), ...] in the order in which they came."""
    whole_lines = (server.folder / "trace.txt").read_text().rpartition("\n")[0]
    lines = whole_lines.splitlines()
    return [tuple(json.loads(line)) for line in lines]


def metrics(server):
    """Return {name: sum over all that report it}."""
    found = {}
    for name, value in re.findall(r"^(\w+)\{.*\} (\S+)$", server.metrics(), re.MULTILINE):
        found[name] = found.get(name, 0) + float(value)
    return found


def check_counters(server):
    """Wait until the counters say what the trace says; those of the load do not count."""
    begun = [texts for kind, texts in trace(server) if kind == "batch" and texts != ["<hello>"]]
    inputs = [text for texts in begun for text in texts]
    right = {
        "batches": len(begun),
        "inputs": len(inputs),
        "input_size": len("".join(inputs)),
        "long_texts": sum(len(text) > 20 for text in inputs),
    }
    end = time.monotonic() + 100
    told = None
    while told != right:
        assert time.monotonic() < end, (told, right)
        time.sleep(1)
        found = metrics(server)
        told = {name: found.get(f"ray_translator_{name}_total") for name in right}


def test_every_counter_is_there_before_the_first_request(server):
    check_counters(server)


def test_inputs_and_batches_are_counted_exactly(server):
    for text in ("hi", ["hi"] * 50, ["a text that is long enough to be counted"] * 3):
        for _ in range(8):
            status, _ = server.ask(body={"text": text})
            assert status == 200
    check_counters(server)


# -- Requests as clients send them -----------------------------------------------------------------

HI = '{"text": "hi"}'
JSON = ["-H", "Content-Type: application/json"]
FILES = {
    "mark": b"\xef\xbb\xbf" + HI.encode(),
    "utf-16": HI.encode("utf-16"),
    "utf-16-le": HI.encode("utf-16-le"),
    "utf-32": HI.encode("utf-32"),
    "latin-1": '{"text": "é"}'.encode("latin-1"),
    "gzip": gzip.compress(HI.encode()),
    "surrogate": b'{"text": "\xed\xa0\xbd"}',
    "large": json.dumps({"text": "hi", "more": "a" * 600_000}).encode(),
    "lines": f"\n {HI}\n\n".encode(),
}
GZIP = ["-H", "Content-Encoding: gzip"]
NOT_JSON = (415, "header Content-Type: application/json")
NOT_UTF8 = (422, "The body is not UTF-8.")
REQUESTS = {
    "plain": ([*JSON, "-d", HI], 200),
    "HTTP/1.0": (["-0", *JSON, "-d", HI], 200),
    "HTTP/2 offered": (["--http2", *JSON, "-d", HI], (400, "without the header Upgrade")),
    "HTTP/2 offered, without a body": (["--http2", "{url}/health"], 200),
    "byte order mark": ([*JSON, "--data-binary", "@mark"], 200),
    "UTF-16": ([*JSON, "--data-binary", "@utf-16"], 200),
    "UTF-16 without a mark": ([*JSON, "--data-binary", "@utf-16-le"], 200),
    "UTF-32": ([*JSON, "--data-binary", "@utf-32"], 200),
    "charset": (["-H", "Content-Type: application/json; charset=UTF-8", "-d", HI], 200),
    "Latin-1": ([*JSON, "--data-binary", "@latin-1"], NOT_UTF8),
    "bytes of half a pair": ([*JSON, "--data-binary", "@surrogate"], NOT_UTF8),
    "half a pair": ([*JSON, "-d", '{"text": "\\ud83d"}'], (422, "Invalid JSON: ")),
    "gzip": ([*JSON, *GZIP, "--data-binary", "@gzip"], (415, "without Content-Encoding")),
    "identity": ([*JSON, "-H", "Content-Encoding: Identity", "-d", HI], 200),
    "chunked": ([*JSON, "-H", "Transfer-Encoding: chunked", "-d", HI], 200),
    "expect": ([*JSON, "-H", "Expect: 100-continue", "-d", HI], 200),
    "expect, too large": (
        [*JSON, "-H", "Expect: 100-continue", "--data-binary", "@large"],
        (413, "larger than 500000 bytes"),
    ),
    "no kind": (["-H", "Content-Type:", "-d", HI], 200),
    "curl's own kind": (["-d", HI], NOT_JSON),
    "form": (["-F", "text=hi"], NOT_JSON),
    "lines around": ([*JSON, "--data-binary", "@lines"], 200),
    "same key twice": ([*JSON, "-d", '{"text": "a", "text": "hi"}'], 200),
    "NaN": ([*JSON, "-d", '{"text": NaN}'], (422, "text: Input should be a valid string")),
    "quotes of Python": ([*JSON, "-d", "{'text': 'hi'}"], (422, "Invalid JSON: ")),
    "JSON in JSON": ([*JSON, "-d", json.dumps(HI)], (422, "Input should be an object")),
    "no body": ([*JSON, "-X", "POST"], (422, "Invalid JSON: EOF")),
    "PUT": ([*JSON, "-X", "PUT", "-d", HI], (405, "Method Not Allowed")),
    "OPTIONS": (["-X", "OPTIONS"], (405, "Method Not Allowed")),
    "HEAD": (["-I", "{url}/health"], 200),
    "a question": ([*JSON, "-d", HI, "{url}?a=b"], 200),
}


@pytest.mark.skipif(not shutil.which("curl"), reason="no curl")
@pytest.mark.parametrize("name", REQUESTS)
def test_a_request_is_answered_or_told_the_true_cause(server, tmp_path, name):
    options, right = REQUESTS[name]
    for file, content in FILES.items():
        (tmp_path / file).write_bytes(content)
    url = f"http://127.0.0.1:{server.port}{ROUTE}"
    options = [option.format(url=url) if "{url}" in option else option for option in options]
    if not any(option.startswith("http://") for option in options):
        options.append(url)
    command = ["curl", "-sS", "--max-time", "100", "-o", "answer", "-w", "%{http_code}", *options]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    answer = (tmp_path / "answer").read_text()
    if right == 200:
        assert done.stdout == "200", answer
        assert "health" in options[-1] or json.loads(answer) == {"loud": "HI!"}
    else:
        status, cause = right
        error = json.loads(answer)["error"]
        assert (done.stdout, error["code"]) == (str(status), status)
        assert cause in error["message"]


@pytest.mark.parametrize(
    "kind",
    [
        "application/vnd.api+json",
        "application/ld+json; charset=utf-8",
        "Application/Problem+JSON",
        "text/json",
        "application/json; charset=ISO-8859-1",  # means nothing: JSON is UTF-8
    ],
)
def test_json_under_its_other_names(server, kind):
    assert server.ask(body='{"text": "é"}'.encode(), kind=kind) == (200, {"loud": "É!"})


@pytest.mark.parametrize("kind", ["application/jsonl", "application/json-seq", "json", "+json/a"])
def test_what_is_not_json_is_told_the_header(server, kind):
    status, answer = server.ask(body={"text": "hi"}, kind=kind)
    assert status == 415 and "Content-Type: application/json" in answer["error"]["message"]


@pytest.mark.parametrize("path", ["", "/", "/health", "/docs", "/openapi.json"])
def test_head_gives_the_headers_of_get(server, path):
    told = {}
    for method in ("GET", "HEAD"):
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        with contextlib.closing(connection):
            connection.request(method, ROUTE + path)
            reply = connection.getresponse()
            headers = [reply.getheader(name) for name in ("Content-Type", "Content-Length")]
            told[method] = (reply.status, *headers)
            assert bool(reply.read()) == (method == "GET")
    assert told["GET"] == told["HEAD"]
    assert told["GET"][0] == 200


@pytest.mark.parametrize("path", ["/health/", "/docs/", "/openapi.json/"])
def test_a_slash_at_the_end_redirects_nowhere(server, path):
    headers = {"Host": "t.example", "X-Forwarded-Proto": "https"}
    status, _ = server.ask(ROUTE + path, method="GET", **headers)
    assert status == 404


def test_the_docs_name_the_description_below_the_route(server):
    _, page = server.ask(ROUTE + "/docs", method="GET")
    assert f"'{ROUTE}/openapi.json'" in page
    _, described = server.ask(ROUTE + "/openapi.json", method="GET")
    assert described["servers"] == [{"url": ROUTE}]


# -- Lists next to single texts --------------------------------------------------------------------


def batches_waited(events, text):
    """Return how many batches began after a text was planned, up to the one that has it."""
    planned = events.index(("plan", [text]))
    waited = 0
    for kind, texts in events[planned:]:
        if kind == "batch":
            waited += 1
            if text in texts:
                return waited
    raise AssertionError(f"{text} is in no batch")


@contextlib.contextmanager
def lists(server, number):
    """Let so many clients send lists of 900 texts, one after the other, until the block ends."""
    over = threading.Event()
    begin = len(trace(server))

    def work(client):
        texts = [f"list {client} " + "a" * (index % 40) for index in range(900)]
        while not over.is_set():
            server.ask(body={"text": texts}, timeout=5)  # then it leaves, and comes again

    with ThreadPoolExecutor(number) as pool:
        for client in range(number):
            pool.submit(work, client)
        try:
            planned = set()
            end = time.monotonic() + 200
            while len(planned) < number:
                assert time.monotonic() < end
                time.sleep(0.1)
                events = trace(server)[begin:]
                planned = {texts[0] for _, texts in events if len(texts) == 900}
            yield
        finally:
            over.set()


@pytest.mark.parametrize("number", [1, 4, 16])
def test_a_text_beside_lists_is_in_one_of_the_next_two_batches(server, number):
    texts = [f"single {index} of {number}" for index in range(10)]
    with lists(server, number):
        for text in texts:
            assert server.ask(body={"text": text}) == (200, {"loud": f"{text.upper()}!"})
    events = trace(server)
    waited = [batches_waited(events, text) for text in texts]
    print(f"{number} lists of 900 texts: single texts waited for {waited} batches")
    assert max(waited) <= 2


def test_a_busy_server_is_healthy(server, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(
        f"http_options: {{port: {server.port}}}\napplications: [{{route_prefix: {ROUTE}}}]\n"
    )
    with lists(server, 4):
        for _ in range(10):
            rayserve_entrypoint.check_health(str(config))


@pytest.mark.parametrize("status", [401, 503, 504])
def test_a_server_that_has_no_time_for_the_example_may_be_healthy(status, tmp_path):
    post = {"requestBody": {"content": {"application/json": {"example": {"text": "hello"}}}}}

    class Busy(http.server.BaseHTTPRequestHandler):
        def answer(self, code, body=b"{}"):
            self.send_response(code)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self):
            self.answer(200, json.dumps({"paths": {"/": {"post": post}}}).encode())

        def do_POST(self):
            self.answer(status)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Busy) as busy:
        threading.Thread(target=busy.serve_forever).start()
        config = tmp_path / "config.yaml"
        config.write_text(
            f"http_options: {{port: {busy.server_port}}}\napplications: [{{route_prefix: }}]\n"
        )
        rayserve_entrypoint.check_health(str(config))
        busy.shutdown()


def test_a_list_that_can_never_fit_is_refused_at_once_with_the_limit(server):
    status, answer = server.ask(body={"text": ["a"] * 20_001})
    message = "The request has 20001 inputs; the limit is 20000."
    assert (status, answer["error"]["message"]) == (413, message)
