"""What people look at: the page of the app and the cards of the flow, in a real browser."""

import functools
import html
import http.server
import json
import os
import re
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from flow_testing import run
from helpers import browser
from helpers.loopback import Files, served
from serve_testing import APP, Server, write_toy

pytestmark = [
    pytest.mark.xdist_group("ray"),
    pytest.mark.skipif(not browser.find(), reason="no chromium"),
]


# What stands in the field goes into an attribute, as the browser tells only of those.
PRESS = """
<script>
document.body.dataset.shown = document.querySelector("textarea").value
document.forms[0].requestSubmit(document.querySelector("button"))
</script>
"""


class Pressed(http.server.BaseHTTPRequestHandler):
    """The app as it is, but somebody presses the button of its page as soon as it is shown."""

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.pass_on(None, "text/html", self.server.press.encode())

    def do_POST(self):
        self.pass_on(self.rfile.read(int(self.headers["Content-Length"])), "application/json", b"")

    def pass_on(self, body, kind, more):
        url = f"http://127.0.0.1:{self.server.app}{self.path}"
        request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
        try:
            reply = urllib.request.urlopen(request, timeout=30)
        except urllib.error.HTTPError as error:
            reply = error
        with reply:
            assert kind in reply.headers["Content-Type"]
            self.send_response(reply.status)
            self.send_header("Content-Type", reply.headers["Content-Type"])
            self.end_headers()
            self.wfile.write(reply.read() + more)


def look(server, path, picture=None, press=PRESS):  # noqa: F811
    """Return (what stands in the field, what stands below it) after the button is pressed."""
    with served(Pressed) as between:
        between.app = server.port
        between.press = press
        page = browser.look(f"{between.url}{path}", picture, size="720,340")
    assert "<button>Send</button>" in page
    assert not re.search("(src|href)=", page)  # all in one file: it needs no other host
    shown = re.search(r'data-shown="(.*?)"', page, re.DOTALL)
    answer = re.search("<pre[^>]*>(.*?)</pre>", page, re.DOTALL)
    return html.unescape(shown[1]), html.unescape(answer[1])


@pytest.mark.parametrize("path", ["/translate", "/translate/"])
def test_page_sends_one_text_and_shows_the_answer_as_one(server, path, tmp_path):  # noqa: F811
    picture = Path(os.environ.get("PICTURES") or tmp_path) / "translator.png"
    assert look(server, path, picture) == ("Hello world!", "Bonjour le monde !")
    assert picture.stat().st_size > 5000


def test_page_sends_any_other_request_as_json_and_shows_errors(tmp_path):
    write_toy(tmp_path)
    app = tmp_path / APP
    example = 'EXAMPLE = {"text": "<hello>"}'
    assert example in app.read_text()
    app.write_text(app.read_text().replace(example, 'EXAMPLE = {"text": ["</textarea>&amp;"]}'))
    command = ["run", "template_ray_serve:translator_app", "--route-prefix", "/translate"]
    with Server(tmp_path, *command) as server:  # noqa: F811
        server.wait()
        shown, answer = look(server, "/translate")
        assert json.loads(shown) == {"text": ["</textarea>&amp;"]}
        assert json.loads(answer) == {"loud": ["</TEXTAREA>&AMP;!"]}
        empty = PRESS.replace(".value\n", ".value = '{}'\n")
        shown, answer = look(server, "/translate", press=empty)
        assert shown == "{}"
        assert "Send JSON like" in answer


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
    assert "baseline_chrf" in shown["evaluate"] and "Bonjour" in shown["evaluate"]
