"""What people look at: the page of the app and the cards of the flow, in a real browser."""

import functools
import json
import os
import re
import signal
from pathlib import Path

import pytest
from flow_testing import run
from helpers import browser
from helpers.app import make_app
from helpers.browser import CONTROL, SHIFT, Browser
from helpers.loopback import Files, served
from serve_testing import APP, Server, write_toy

pytestmark = pytest.mark.skipif(not browser.find(), reason="no chromium")

FIELD = "document.querySelector('textarea')"
ANSWER = "document.querySelector('dl')"
FOCUS = "document.activeElement"
ANY_ANSWER = """
class ModelResponse(BaseModel):
    model_config = ConfigDict(extra="allow")

    loud: str | list[str] = ""
    long_texts: int = 0
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The translator as the README starts it."""
    folder = tmp_path_factory.mktemp("page")
    make_app(folder)
    command = ["run", "template_ray_serve:translator_app", "--route-prefix", "/translate"]
    with Server(folder, *command) as running:
        yield running.wait()


def pictures(tmp_path):
    """Return the folder for pictures: the one that the variable PICTURES names, if it does."""
    return Path(os.environ.get("PICTURES") or tmp_path)


def shown(page):
    """Return the answer on the page as [(name, text), ...]."""
    terms = "[...document.querySelectorAll('dt')]"
    pairs = page.evaluate(f"{terms}.map(e => [e.textContent, e.nextSibling.textContent])")
    return [tuple(pair) for pair in pairs]


def press_send(page):
    """Send with the keyboard, and return the answer on the page."""
    page.evaluate("document.querySelector('dl').replaceChildren()")
    page.press("Enter", CONTROL)
    page.wait("document.querySelector('dd') && document.querySelector('dl').ariaBusy === 'false'")
    return shown(page)


def send(page, request):
    """Write a request as JSON into the field, send it, and return the answer on the page."""
    page.evaluate(f"{FIELD}.focus()")
    page.write(json.dumps(request))
    return press_send(page)


# -- The translator's page -------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/translate", "/translate/"])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_page_sends_one_text_and_shows_the_answer_as_text(server, path, dark, tmp_path):
    name = "translator-dark.png" if dark else "translator.png"
    with Browser(840, 400, dark=dark, scale=2) as page:
        page.open(f"http://127.0.0.1:{server.port}{path}")
        assert page.evaluate(f"{FIELD}.value") == "Hello world!"
        assert press_send(page) == [("translation", "Bonjour le monde !")]
        page.picture(pictures(tmp_path) / name)
    assert (pictures(tmp_path) / name).stat().st_size > 5000


# -- A page for any task: the toy answers with whatever JSON it is sent ----------------------------


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A server whose answer is the JSON in the text; `refuse`, `wait 3` and others do that."""
    folder = tmp_path_factory.mktemp("toy")
    write_toy(folder)
    app = folder / APP
    text = app.read_text()
    changes = {
        re.search(r"\nclass ModelResponse.*?long_texts: int = 0\n", text, re.DOTALL)[0]: ANY_ANSWER,
        'EXAMPLE = {"text": "<hello>"}': 'EXAMPLE = {"text": ["</textarea>&amp;"]}',
        "        loud = outputs if": "        if request.text[:1] == '{':\n"
        "            return ModelResponse(**json.loads(request.text))\n"
        "        loud = outputs if",
    }
    for old, new in changes.items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    app.write_text("import json\n" + text)
    command = ["run", "template_ray_serve:build", "timeout_s=2", "--route-prefix", "/toy"]
    with Server(folder, *command) as running:
        yield running.wait()


@pytest.fixture(scope="module")
def only_page(toy):
    with Browser(900, 500) as page:
        page.url = f"http://127.0.0.1:{toy.port}/toy"
        yield page


@pytest.fixture
def page(only_page):
    """The toy's page, as it is after loading."""
    only_page.open(only_page.url)
    return only_page


def test_page_sends_any_other_request_as_json(page):
    assert json.loads(page.evaluate(f"{FIELD}.value")) == {"text": ["</textarea>&amp;"]}
    assert press_send(page) == [("loud", '["</TEXTAREA>&AMP;!"]')]


ROWS = [[number + 0.25 for number in range(30)], [0] * 30]
ANSWERS = {
    "a label and scores": (
        {"label": "fine", "score": 0.75, "scores": {"fine": 0.75, "poor": 0.25}},
        [("label", "fine"), ("score", "0.75"), ("scores", '{"fine":0.75,"poor":0.25}')],
    ),
    "lists of numbers": (
        {"rows": ROWS, "empty": [], "none": None},
        [
            ("rows", "[\n  {},\n  {}\n]".format(*ROWS).replace(".0,", ",")),
            ("empty", "[]"),
            ("none", "null"),
        ],
    ),
    "long entries": (
        {"found": [{"text": "[1,  2]", "kind": "k" * 50}]},
        [("found", '[\n  {\n    "text": "[1,  2]",\n    "kind": "' + "k" * 50 + '"\n  }\n]')],
    ),
    "markup": ({"<b>": "<script>alert(1)</script>"}, [("<b>", "<script>alert(1)</script>")]),
}


@pytest.mark.parametrize("answer", ANSWERS)
def test_page_shows_any_answer(page, answer):
    sent, expected = ANSWERS[answer]
    assert send(page, {"text": json.dumps(sent)}) == expected


def test_page_shows_text_from_right_to_left(page):
    send(page, {"text": json.dumps({"a": "שלום עולם!", "b": "left to right"})})
    directions = "[...document.querySelectorAll('dd')].map(e => getComputedStyle(e).direction)"
    assert page.evaluate(directions) == ["rtl", "ltr"]
    page.write("שלום")
    assert page.evaluate(f"getComputedStyle({FIELD}).direction") == "rtl"


def test_page_shows_why_there_is_no_answer(page, toy):
    assert send(page, {"text": "refuse"}) == [("Error 422", "A text that is refused.")]
    assert page.evaluate(f"{ANSWER}.className") == "error"
    ((name, message),) = send(page, {})
    assert name == "Error 422" and "Send JSON like" in message
    late = "Not done within 2 seconds; send less at once."
    assert send(page, {"text": "wait 4"}) == [("Error 504", late)]
    proxies = toy.processes("Proxy")
    for process in proxies:
        process.send_signal(signal.SIGSTOP)
    try:
        assert proxies
        assert send(page, {"text": "a"}) == [("No answer", "Not within 12 s.")]
    finally:
        for process in proxies:
            process.send_signal(signal.SIGCONT)
    toy.wait()
    page.set_online(False)
    try:
        message = "The server cannot be reached."
        assert send(page, {"text": "a"}) == [("No answer", message)]
    finally:
        page.set_online(True)
    assert send(page, {"text": "a"}) == [("loud", "A!")]
    assert page.evaluate(f"{ANSWER}.className") == ""


def test_page_is_used_with_the_keyboard_alone(page):
    assert page.evaluate(f"{FOCUS}.tagName") == "TEXTAREA"
    page.press("Tab")
    assert page.evaluate(f"{FOCUS}.textContent") == "Send"
    assert page.evaluate(f"getComputedStyle({FOCUS}).outlineStyle") == "solid"
    page.press("Enter")
    page.wait("document.querySelector('dd')")
    page.press("Tab", SHIFT)
    assert page.evaluate(f"{FOCUS}.tagName") == "TEXTAREA"
    assert page.evaluate(f"{FOCUS}.labels[0].textContent") == "Request"
    assert page.evaluate(f"{ANSWER}.ariaLive") == "polite"


def test_page_counts_the_time_and_sends_once(page):
    page.write(json.dumps({"text": "wait 1"}))
    page.press("Enter", CONTROL)
    page.wait("parseFloat(document.querySelector('#time').textContent) > 0.2")
    assert page.evaluate(f"{ANSWER}.ariaBusy") == "true"
    page.press("Enter", CONTROL)
    page.wait(f"{ANSWER}.ariaBusy === 'false'")
    assert shown(page) == [("loud", "WAIT 1!")]
    assert page.evaluate("parseFloat(document.querySelector('#time').textContent)") >= 1
    loaded = page.evaluate("performance.getEntriesByType('resource').map(e => e.name)")
    assert loaded == [page.url]  # one request, and nothing from another host


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_can_be_read_in_any_scheme(page, scheme):
    def contrast(front, back):
        """Return the contrast of two colours as WCAG defines it."""
        lights = sorted(map(luminance, (front, back)))
        return (lights[1] + 0.05) / (lights[0] + 0.05)

    def luminance(colour):
        channels = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def colour(selector, name):
        return page.evaluate(f"getComputedStyle(document.querySelector('{selector}'))['{name}']")

    page.set_scheme(scheme)
    try:
        assert (luminance(colour("body", "backgroundColor")) < 0.2) == (scheme == "dark")
        for request in ({"text": "a"}, {"text": "refuse"}):
            send(page, request)
            for text, box in {"dt": "dl", "dd": "dl", "small": "body", "button": "button"}.items():
                assert contrast(colour(text, "color"), colour(box, "backgroundColor")) > 4.5, text
    finally:
        page.set_scheme("light")


def test_page_fits_a_narrow_screen(page):
    below = f"{ANSWER}.getBoundingClientRect().top > {FIELD}.getBoundingClientRect().bottom"
    assert not page.evaluate(below)
    page.set_size(340, 700)
    try:
        send(page, {"text": json.dumps({"a": "x" * 500, "b": ROWS})})
        assert page.evaluate(below)
        assert page.evaluate("document.documentElement.scrollWidth") <= 340
    finally:
        page.set_size(900, 500)


# -- The cards of the flow -------------------------------------------------------------------------


def test_cards_are_drawn(tmp_path):
    code, output = run(tmp_path)
    assert code == 0, output
    cards = tmp_path / ".metaflow/mf.cards/TemplateFlow/runs"
    chart = "document.querySelector('svg.marks')"
    contents = {
        "train": ("W&B: offline", f"{chart}?.getBoundingClientRect().width > 300"),
        "evaluate": ("baseline_chrf", "document.body.innerText.includes('Bonjour le monde !')"),
    }
    with (
        served(functools.partial(Files, directory=cards)) as here,
        Browser(1000, 560, scale=2) as page,
    ):
        for step, (text, drawn) in contents.items():
            # `train` has a second card, of its checkpoints.
            (card,) = (
                path
                for path in cards.glob(f"*/steps/{step}/tasks/*/cards/*.html")
                if "checkpoints" not in path.name
            )
            page.open(f"{here.url}/{card.relative_to(cards)}")
            page.wait(f"document.body.innerText.includes('{text}') && {drawn}")
            # Without the column of the logo.
            page.picture(pictures(tmp_path) / f"card-{step}.png", left=320)
