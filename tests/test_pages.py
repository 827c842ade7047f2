"""What people look at: the page of the translator and the cards of the flow, in a real browser."""

import functools
import http.server
import os
import re
import urllib.request
from pathlib import Path

import browser
import pytest
from loopback import Files, served
from test_template_flow import run
from test_template_ray_serve import project, server  # noqa: F401  (fixtures)

pytestmark = [
    pytest.mark.xdist_group("ray"),
    pytest.mark.skipif(not browser.find(), reason="no chromium"),
]


class Pressed(http.server.BaseHTTPRequestHandler):
    """The app as it is, but somebody presses the button of its page as soon as it is shown."""

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.pass_on(None, "text/html", b"<script>document.forms[0].requestSubmit()</script>")

    def do_POST(self):
        self.pass_on(self.rfile.read(int(self.headers["Content-Length"])), "application/json", b"")

    def pass_on(self, body, kind, more):
        url = f"http://127.0.0.1:{self.server.app}{self.path}"
        ask = urllib.request.Request(url, body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(ask, timeout=30) as reply:
            assert kind in reply.headers["Content-Type"]
            self.send_response(200)
            self.send_header("Content-Type", reply.headers["Content-Type"])
            self.end_headers()
            self.wfile.write(reply.read() + more)


@pytest.mark.parametrize("path", ["/translate", "/translate/"])
def test_page_translates(server, path, tmp_path):  # noqa: F811
    with served(Pressed) as between:
        between.app = server.port
        picture = Path(os.environ.get("PICTURES") or tmp_path) / "translator.png"
        html = browser.look(f"{between.url}{path}", picture, size="720,340")
    assert re.search(r"<pre[^>]*>Bonjour le monde !</pre>", html), html
    assert not re.search(r"(src|href)=", html)  # all in one file: it needs no other host
    assert picture.stat().st_size > 5000


def test_cards_are_drawn(tmp_path):
    code, output = run(tmp_path, "--epochs", "4")
    assert code == 0, output
    cards = tmp_path / ".metaflow/mf.cards/TemplateFlow/runs"
    with served(functools.partial(Files, directory=cards)) as here:
        shown = {}
        for step in ("train", "evaluate"):
            # `train` has a second card, of its checkpoints.
            pages = [
                browser.look(f"{here.url}/{path.relative_to(cards)}")
                for path in cards.glob(f"*/steps/{step}/tasks/*/cards/*.html")
            ]
            shown[step] = "".join(pages)
    assert "W&amp;B: offline" in shown["train"] and re.search(
        r"<svg[^>]*(marks|vega)|<canvas", shown["train"]
    )
    assert "chrf_of_copying" in shown["evaluate"] and "Bonjour" in shown["evaluate"]
