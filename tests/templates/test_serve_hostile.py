"""The server against hostile clients: any bytes, any JSON, any header, any size, slow clients."""

import http.client
import json
import re
import shutil
import socket
import time

import psutil
import pytest
from helpers.app import log_files, sizes
from helpers.repository import TEMPLATES
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from serve_testing import Server
from tiny_translator import PAIRS, make_model

pytestmark = pytest.mark.slow
BODY_TIMEOUT = 3


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The app with short limits, so that many inputs and slow clients take little time."""
    folder = tmp_path_factory.mktemp("hostile")
    shutil.copy(TEMPLATES / "template_ray_serve.py", folder)
    make_model(folder / "model", PAIRS)
    with Server(
        folder,
        "run",
        "template_ray_serve:build",
        "max_new_tokens=16",
        f"body_timeout_s={BODY_TIMEOUT}",
        "--route-prefix",
        "/translate",
    ) as running:
        yield running.wait()


def serves(server):
    begin = time.monotonic()
    answer = server.ask(body={"text": "Hello world!"}, timeout=100)
    assert answer == (200, {"translation": "Bonjour le monde !"}), answer
    return time.monotonic() - begin


class Line:
    """One connection that is kept open, as long as the server does."""

    def __init__(self, port):
        self.port, self.connection = port, None

    def ask(self, method, path, body, headers):
        for fresh in (False, True):
            if self.connection is None or fresh:
                self.connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=100)
            try:
                self.connection.request(method, path, body, headers)
                reply = self.connection.getresponse()
                return reply.status, reply.read()
            except (http.client.RemoteDisconnected, BrokenPipeError, ConnectionResetError):
                if fresh:
                    raise
        return None


def right(status, content, sent):
    """An answer as promised: a translation, or an error that repeats nothing of the text."""
    answer = json.loads(content)
    if status == 200:
        assert set(answer) <= {"translation", "cut_sentences"}
        assert isinstance(answer["translation"], (str, list))
    else:
        assert status in (404, 405, 408, 413, 415, 422), (status, content)
        assert set(answer) == {"error"} and set(answer["error"]) == {"code", "message"}
        assert answer["error"]["code"] == status and len(content) < 300
        assert b"secret-42" not in content
        assert not (len(sent) > 40 and sent in content)


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=30)
    | st.just("secret-42"),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8) | st.just("text"), inner)
    ),
    max_leaves=12,
)
anything = st.text(st.characters(), max_size=60)  # surrogates too
questions = st.fixed_dictionaries({"text": anything | st.lists(anything, max_size=5) | values})
as_json = st.builds(
    lambda value, ascii: json.dumps(value, ensure_ascii=ascii).encode("utf-8", "surrogatepass"),
    values | questions,
    st.booleans(),
)
cut = st.builds(lambda body, at: body[: at % (len(body) + 1)], as_json, st.integers(0, 200))
flipped = st.builds(
    lambda body, at, byte: body[: at % len(body)] + bytes([byte]) + body[at % len(body) + 1 :],
    as_json,
    st.integers(0, 200),
    st.integers(0, 255),
)
good = st.builds(
    lambda text: json.dumps({"text": text}).encode(),
    st.text(st.characters(codec="utf-8"), max_size=60),
)
bodies = good | as_json | cut | flipped | st.binary(max_size=200)
quick = settings(
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def test_any_body(server):
    line, seen = Line(server.port), {}

    @settings(quick, max_examples=2500)
    @given(bodies)
    @example(b'{"text":"\\ud83d"}')
    @example(b'{"text":NaN}')
    @example(b'{"text":1e999}')
    @example(b'{"text":[' + b"1," * 999 + b"1]}")
    @example(b'{"text":-0}')
    @example(b'{"text":' + b"9" * 5000 + b"}")
    @example(b'{"text":["a",' + b"9" * 5000 + b"]}")
    @example(b'{"text":"a","id":' + b"9" * 200_000 + b"}")
    @example(b'{"' + b"9" * 5000 + b'":"a"}')
    @example(b'{"text":"a","text":"b"}')
    @example(b'{"text":"a\\u0000b"}')
    @example(b'{"text":' + b"[" * 10_000 + b"]" * 10_000 + b"}")
    @example(b'{"text":' + b'{"a":' * 10_000 + b"1" + b"}" * 10_000 + b"}")
    @example(b"\xef\xbb\xbf" + b'{"text":"a"}')
    @example('{"text":"a"}'.encode("utf-16"))
    def fuzz(body):
        status, content = line.ask("POST", "/translate", body, {"Content-Type": "application/json"})
        seen[status] = seen.get(status, 0) + 1
        right(status, content, body)

    fuzz()
    print("answers by status:", seen)
    assert sum(seen.values()) >= 2000 and seen[200] > 100 and seen[422] > 100
    serves(server)


names = st.sampled_from(
    [
        "Accept",
        "Host",
        "X-Request-ID",
        "Content-Encoding",
        "Cookie",
        "Via",
        "X-Forwarded-For",
        "Origin",
        "Range",
        "X-Request-Timeout-Seconds",
        "X-Request-Disconnect-Disabled",
        "Serve-Multiplexed-Model-Id",
        "X-Session-Id",
        "Authorization",
        "If-None-Match",
        "Accept-Language",
        "X-Y",
    ]
)
printable = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=40)
kinds = st.sampled_from(
    [
        "application/json",
        "application/json; charset=utf-16",
        "APPLICATION/JSON",
        "text/plain",
        "a/b",
        "",
        ";",
        "json",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
    ]
)


def test_any_header_method_and_path(server):
    line, seen = Line(server.port), {}
    methods = st.sampled_from(
        ["POST", "POST", "POST", "GET", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "FOO"]
    )
    paths = st.sampled_from(
        [
            "/translate",
            "/translate/",
            "/translate/x",
            "/translate//",
            "/translate/%00",
            "/translate?a=b",
            "/translate/../translate",
            "/translate/%2e%2e/",
            "/translate/health",
        ]
    )

    @settings(quick, max_examples=1000)
    @given(methods, paths, st.dictionaries(names, printable, max_size=3), kinds)
    @example("POST", "/translate", {"Host": "evil/?x="}, "application/json")
    def fuzz(method, path, headers, kind):
        body = b'{"text": "secret-42"}'
        status, content = line.ask(method, path, body, {**headers, "Content-Type": kind})
        seen[status] = seen.get(status, 0) + 1
        assert status < 500 or status == 503, (status, content, method, path, headers)
        if status >= 400 and content.startswith(b"{"):
            assert b"secret-42" not in content and json.loads(content)["error"]["code"] == status

    fuzz()
    print("answers by status:", seen)
    assert 500 not in seen and seen[200] > 50
    serves(server)


def test_raw_bytes_instead_of_http(server):
    @settings(quick, max_examples=300)
    @given(
        st.binary(max_size=300)
        | st.builds(lambda b: b"POST /translate HTTP/1.1\r\n" + b, st.binary(max_size=200))
    )
    @example(b"POST /translate HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n")
    @example(
        b"POST /translate HTTP/1.1\r\nHost: a\r\nContent-Length: 99999999999999999999\r\n\r\n{"
    )
    @example(b"POST /translate HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n")
    @example(b"POST /translate HTTP/1.1\r\nHost: a\r\n" + b"A: b\r\n" * 20_000 + b"\r\n")
    @example(b"POST /translate HTTP/1.1\r\nHost: a\r\nX: " + b"a" * 200_000 + b"\r\n\r\n")
    @example(
        b"POST /translate HTTP/1.1\r\nHost: a\r\nX-Odd: \xff\xfe\r\nContent-Length: 2\r\n\r\n{}"
    )
    def fuzz(data):
        with socket.create_connection(("127.0.0.1", server.port), timeout=100) as line:
            try:
                line.sendall(data)
                line.shutdown(socket.SHUT_WR)
                answer = line.recv(1000)
            except (ConnectionResetError, BrokenPipeError):
                answer = b""
        assert not answer.startswith(b"HTTP/1.1 5"), answer

    fuzz()
    serves(server)


# A request in what is the body for whoever reads it in another way.
HIDDEN = b"GET /translate/health HTTP/1.1\r\nHost: a\r\n\r\n"
CHUNKED, FIVE = b"0\r\n\r\n" + HIDDEN, b"Content-Length: 5\r\n"
WHOLE = b"Content-Length: %d\r\n" % len(CHUNKED)
SMUGGLED = {
    "both lengths, short": (FIVE + b"Transfer-Encoding: chunked\r\n", CHUNKED),
    "both lengths, long": (b"Transfer-Encoding: chunked\r\n" + WHOLE, CHUNKED),
    "two lengths": (FIVE + WHOLE, CHUNKED),
    "unknown encoding": (b"Transfer-Encoding: xchunked\r\n" + WHOLE, CHUNKED),
    "space before the colon": (b"Transfer-Encoding : chunked\r\n" + WHOLE, CHUNKED),
    "folded line": (b"Transfer-Encoding:\r\n chunked\r\n" + WHOLE, CHUNKED),
    "encoding twice": (
        b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n" + WHOLE,
        CHUNKED,
    ),
    "line end in a chunk's extension": (
        b"Transfer-Encoding: chunked\r\n",
        b"0;a\nb\r\n\r\n" + HIDDEN,
    ),
    "sign before the length": (b"Content-Length: +5\r\n", CHUNKED),
    "a body that is a request": (b"Content-Length: %d\r\n" % len(HIDDEN), HIDDEN),
}


@pytest.mark.parametrize("case", SMUGGLED)
def test_no_request_is_smuggled_in_another(server, case):
    """However a proxy reads these, the server never answers what is hidden in the body."""
    headers, body = SMUGGLED[case]
    with socket.create_connection(("127.0.0.1", server.port), timeout=100) as line:
        line.sendall(b"POST /translate HTTP/1.1\r\nHost: a\r\n" + headers + b"\r\n" + body)
        answer = b""
        try:
            while part := line.recv(65536):
                answer += part
                line.settimeout(1)
        except (TimeoutError, ConnectionResetError):
            pass  # it waits for the next request
    assert (
        answer.count(b"HTTP/1.1 ") == 1
        and answer[9:12] in (b"400", b"422")
        and b'"ok"' not in answer
    ), answer


def test_a_path_reaches_no_file_and_nobody_begins_a_line_of_the_log(server):
    for path in (
        "/translate/../../../etc/passwd",
        "/..%2f..%2f..%2fetc/passwd",
        "//etc/passwd",
        "/translate/%2e%2e/%2e%2e/x",
        "/nowhere%0aINFO%20forged",
        "/translate/x%0d%0aINFO%20forged",
        "/translate?a=%0d%0aINFO%20forged",
    ):
        with socket.create_connection(("127.0.0.1", server.port), timeout=100) as line:
            line.sendall(
                f"GET {path} HTTP/1.1\r\nHost: a\r\nX-Request-ID: forged\tby-a-client\r\n"
                "Connection: close\r\n\r\n".encode()
            )
            answer = b"".join(iter(lambda line=line: line.recv(65536), b""))
        assert re.match(rb"HTTP/1.1 (404|200) ", answer) and b"root:" not in answer, answer
    end = time.monotonic() + 400
    while "forged" not in server.log.read_text("utf-8") and time.monotonic() < end:
        time.sleep(0.2)
    logs = [server.log, *log_files(server)]
    lines = [line for path in logs for line in path.read_text("utf-8", "replace").splitlines()]
    named = [line for line in lines if "forged" in line]
    assert named and all(
        "forged\tby-a-client" in line or "forged\\tby-a-client" in line for line in named
    ), named
    assert not [line for line in named if line.startswith(("INFO forged", "forged"))]


def test_a_request_id_that_is_no_text_stops_nothing(server):
    """Ray's proxy decodes this header before the app sees the request: 500 (Ray 2.60)."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=100) as line:
        line.sendall(
            b"POST /translate HTTP/1.1\r\nHost: a\r\nX-Request-ID: \xff\r\n"
            b"Content-Length: 2\r\n\r\n{}"
        )
        answer = line.recv(1000)
    assert re.match(rb"HTTP/1.1 (4\d\d|500) ", answer) and b"Traceback" not in answer, answer
    serves(server)


def test_bodies_of_50_mb(server):
    serves(server)
    before, part = sizes(server, shared=False), b"x" * 65536

    def parts():
        yield b'{"text": "'
        for _ in range(800):
            yield part

    for chunked in (False, True):
        for _ in range(3):
            line = http.client.HTTPConnection("127.0.0.1", server.port, timeout=100)
            headers = {"Content-Type": "application/json"}
            if not chunked:
                headers["Content-Length"] = str(10 + 800 * len(part))
            try:
                line.request("POST", "/translate", parts(), headers, encode_chunked=chunked)
            except (BrokenPipeError, ConnectionResetError):
                pass  # the server has stopped reading
            try:
                reply = line.getresponse()
                assert (
                    reply.status == 413
                    and "larger than 262144 bytes" in json.load(reply)["error"]["message"]
                )
            except ConnectionResetError:
                pytest.fail("the connection was cut before the answer arrived")
            finally:
                line.close()
            serves(server)
    time.sleep(1)
    after = sizes(server, shared=False)
    print("MB before and after:", before, after)
    assert all(after[name] - before[name] < 100 for name in before)


def test_slow_clients_get_408_and_hold_up_nobody(server):
    head = (
        b"POST /translate HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
        b"Content-Length: 100\r\n\r\n"
    )
    lines = [socket.create_connection(("127.0.0.1", server.port), timeout=100) for _ in range(100)]
    begin = time.monotonic()
    for line in lines:
        line.sendall(head + b'{"text": ')
    assert max(serves(server) for _ in range(5)) < BODY_TIMEOUT  # none waits for those
    answers = [line.recv(2000) for line in lines]
    assert all(answer.startswith(b"HTTP/1.1 408") for answer in answers), set(answers)
    assert time.monotonic() - begin > BODY_TIMEOUT - 1
    for line in lines:
        line.close()
    serves(server)


def test_vanishing_clients_leave_nothing_behind(server):
    replicas = [process.pid for process in server.processes("ServeReplica")]
    body = json.dumps({"text": ["tell me more " * 5] * 3}).encode()
    head = b"POST /translate HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % len(body)
    for i in range(300):
        with socket.create_connection(("127.0.0.1", server.port), timeout=100) as line:
            line.sendall((head + body)[: None if i % 2 else len(head) + 10])
    serves(server)
    assert replicas == [process.pid for process in server.processes("ServeReplica")]
    assert sum(len(psutil.Process(pid).net_connections()) for pid in replicas) < 100
