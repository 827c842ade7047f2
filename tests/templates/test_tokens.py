"""Who may ask: bearer tokens, their rotation, and pages of other origins."""

import http.client
import json
import time
from pathlib import Path

import pytest
from serve_testing import Server, imported, write_toy

ALICE = "alice-7f3a7f3a7f3a7f3a"
BOB = "bob-90c190c190c190c190c1"
ROUTE = "/toy"
ORIGIN = "https://app.example"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokens")
    write_toy(folder)
    tokens = folder / "tokens"
    tokens.write_text(f"alice: {ALICE}\n\nbob : {BOB}\n")
    command = ["run", "template_ray_serve:build", f"tokens_file={tokens}", f"cors_origins={ORIGIN}"]
    with Server(folder, *command, "--route-prefix", ROUTE, dashboard=True) as running:
        running.tokens = tokens
        yield running.wait()


def send(server, *headers, method="POST", body=b'{"text": "hi"}'):
    """Send header lines as they are; return (status, headers, answer)."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=100)
    try:
        connection.putrequest(method, ROUTE)
        for name, value in [("Content-Type", "application/json"), *headers]:
            connection.putheader(name, value)
        connection.putheader("Content-Length", str(len(body)))
        connection.endheaders(body)
        reply = connection.getresponse()
        return reply.status, reply.headers, reply.read()
    finally:
        connection.close()


REFUSED = {
    "none": [],
    "empty": [("Authorization", "")],
    "no scheme": [("Authorization", ALICE)],
    "another scheme": [("Authorization", f"Basic {ALICE}")],
    "no token": [("Authorization", "Bearer")],
    "a blank token": [("Authorization", "Bearer  ")],
    "wrong": [("Authorization", "Bearer " + "x" * 22)],
    "one letter less": [("Authorization", f"Bearer {ALICE[:-1]}")],
    "one letter more": [("Authorization", f"Bearer {ALICE}a")],
    "upper case": [("Authorization", f"Bearer {ALICE.upper()}")],
    "the name": [("Authorization", "Bearer alice")],
    "name and token": [("Authorization", f"Bearer alice: {ALICE}")],
    "two in one": [("Authorization", f"Bearer {ALICE}, Bearer {BOB}")],
    "doubled": [("Authorization", f"Bearer {ALICE}")] * 2,
    "a right and a wrong one": [
        ("Authorization", f"Bearer {ALICE}"),
        ("Authorization", "Bearer " + "x" * 22),
    ],
    "not ASCII": [("Authorization", "Bearer é" + ALICE)],
    "in another header": [("X-Api-Key", ALICE)],
    "quoted": [("Authorization", f'Bearer "{ALICE}"')],
    "very long": [("Authorization", "Bearer " + "x" * 30_000)],
}


@pytest.mark.parametrize("name", REFUSED)
def test_without_the_right_token_nobody_is_answered(server, name):
    status, headers, answer = send(server, *REFUSED[name])
    assert status == 401
    assert headers["WWW-Authenticate"] == "Bearer"
    message = "Send your token as Authorization: Bearer TOKEN."
    assert json.loads(answer) == {"error": {"code": 401, "message": message}}


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER", "Bearer  "])
@pytest.mark.parametrize("token", [ALICE, BOB])
def test_each_client_is_answered(server, scheme, token):
    status, _, answer = send(server, ("Authorization", f"{scheme} {token}"))
    assert (status, json.loads(answer)) == (200, {"loud": "HI!"})


def test_the_body_of_a_refused_request_is_not_read(server):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=100)
    connection.putrequest("POST", ROUTE)
    connection.putheader("Content-Type", "application/json")
    connection.putheader("Content-Length", "100000")
    connection.endheaders(b'{"text": ')  # and nothing more
    assert connection.getresponse().status == 401  # 408 if it had waited for the rest
    connection.close()


@pytest.mark.parametrize("path", ["/health", "/openapi.json", ""])
def test_health_description_and_page_need_no_token(server, path):
    assert server.ask(ROUTE + path, method="GET")[0] == 200


def test_a_changed_file_counts_at_once(server):
    before = server.tokens.read_text()
    new = "carol-5e5e5e5e5e5e5e5e"
    try:
        server.tokens.write_text(f"carol: {new}\n")
        assert send(server, ("Authorization", f"Bearer {ALICE}"))[0] == 401
        assert send(server, ("Authorization", f"Bearer {new}"))[0] == 200
        for broken in ("", "carol\n", f"carol: {new}\ncarol: {BOB}\n"):
            server.tokens.write_text(broken)
            assert send(server, ("Authorization", f"Bearer {new}"))[0] == 401
        server.tokens.unlink()
        assert send(server, ("Authorization", f"Bearer {new}"))[0] == 401
    finally:
        server.tokens.write_text(before)
    assert send(server, ("Authorization", f"Bearer {ALICE}"))[0] == 200


def test_no_token_is_in_a_log_or_a_metric_but_the_name_is(server):
    send(server, ("Authorization", f"Bearer {ALICE}"))
    end = time.monotonic() + 100
    while 'client="alice"' not in (text := server.metrics()):
        assert time.monotonic() < end
        time.sleep(1)
    for path in server.log.parent.rglob("*"):
        if path.is_file() and path != server.tokens:
            text += path.read_bytes().decode("latin-1")
    for path in Path(server.scratch).rglob("*"):
        if path.is_file():
            text += path.read_bytes().decode("latin-1")
    assert "POST /toy" in text  # the access log is among them
    for token in (ALICE, BOB):
        assert token not in text


def test_pages_of_the_named_origin_may_ask(server):
    preflight = [
        ("Origin", ORIGIN),
        ("Access-Control-Request-Method", "POST"),
        ("Access-Control-Request-Headers", "authorization,content-type"),
    ]
    status, headers, _ = send(server, *preflight, method="OPTIONS", body=b"")
    assert (status, headers["Access-Control-Allow-Origin"]) == (200, ORIGIN)
    asked = [("Origin", ORIGIN), ("Authorization", f"Bearer {ALICE}")]
    status, headers, _ = send(server, *asked)
    assert (status, headers["Access-Control-Allow-Origin"]) == (200, ORIGIN)


def test_pages_of_other_origins_may_not(server):
    other = ("Origin", "https://other.example")
    preflight = [other, ("Access-Control-Request-Method", "POST")]
    status, headers, _ = send(server, *preflight, method="OPTIONS", body=b"")
    assert (status, headers["Access-Control-Allow-Origin"]) == (400, None)
    _, headers, _ = send(server, other, ("Authorization", f"Bearer {ALICE}"))
    assert headers["Access-Control-Allow-Origin"] is None


# -- Without a server ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    folder = tmp_path_factory.mktemp("app")
    write_toy(folder)
    return imported(folder)


@pytest.mark.parametrize(
    "text", [f"a: {ALICE}\nb: {BOB}", f"a:{ALICE},b:{BOB}", f"a: {ALICE}, \n, b: {BOB}"]
)
def test_tokens_in_the_environment(app, monkeypatch, text):
    monkeypatch.setenv("API_TOKENS", text)
    assert app.read_tokens("") == {"a": ALICE, "b": BOB}


@pytest.mark.parametrize(
    "text, reason",
    [
        ("", "has no `name: token`"),
        ("\n \n", "has no `name: token`"),
        (ALICE, "line 1: needs `name: token`, a new name, and a token of 16"),
        (f": {ALICE}", "line 1: needs `name: token`, a new name, and a token of 16"),
        (f"a: {ALICE}\na: {BOB}", "line 2: needs `name: token`, a new name, and a token of 16"),
        ("a: short", "line 1: needs `name: token`, a new name, and a token of 16"),
        ("a: ", "line 1: needs `name: token`, a new name, and a token of 16"),
        (f"a: é{ALICE}", "line 1: needs `name: token`, a new name, and a token of 16"),
        (f"a: {ALICE} {BOB}", "line 1: needs `name: token`, a new name, and a token of 16"),
        (f"a: {ALICE}\nb: {BOB}\nc", "line 3: needs `name: token`, a new name, and a token of 16"),
    ],
)
def test_what_holds_no_tokens_is_named_without_them(app, tmp_path, text, reason):
    file = tmp_path / "tokens"
    file.write_text(text)
    with pytest.raises(ValueError) as caught:
        app.read_tokens(str(file))
    assert reason in str(caught.value) and str(file) in str(caught.value)
    assert ALICE not in str(caught.value)


def test_a_file_of_windows(app, tmp_path):
    (tmp_path / "tokens").write_bytes(f"\ufeffa: {ALICE}\r\nb: {BOB}\r\n".encode())
    assert app.read_tokens(str(tmp_path / "tokens")) == {"a": ALICE, "b": BOB}


def test_a_missing_file_is_named(app, tmp_path):
    with pytest.raises(ValueError, match="nothing: No such file or directory"):
        app.read_tokens(str(tmp_path / "nothing"))


def test_a_server_without_a_usable_token_does_not_start(tmp_path):
    write_toy(tmp_path)
    command = ["run", "template_ray_serve:translator_app", "--route-prefix", ROUTE]
    with Server(tmp_path, *command, API_TOKENS="") as server:
        server.process.wait(400)
    assert "API_TOKENS: has no `name: token`" in server.log.read_text()
