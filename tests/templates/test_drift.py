"""The alert OtherTexts: silent on held-out texts, not on those of another language or length."""

import json
import shutil
from pathlib import Path

import django
import polib
import pytest
import template_flow as flow
import template_ray_serve as app
from helpers import real_pairs
from helpers.prometheus import firing

pytestmark = pytest.mark.skipif(not shutil.which("promtool"), reason="no promtool")


@pytest.fixture(scope="module")
def data():
    """Real pairs, for training and held out."""
    return flow.split(real_pairs.pairs()[:3000])


@pytest.fixture(scope="module")
def served(data, tmp_path_factory):
    """The app with a model that the flow has exported; one step of training is enough here."""
    folder = tmp_path_factory.mktemp("drift")
    settings = dict(base_model="", epochs=1, seconds=1e-9, seed=0, learning_rate=1e-3)
    settings = type("Settings", (), settings)
    model = flow.new_model(data[0], settings)
    flow.fit(model, data[0], settings, str(folder / "c"), lambda: None, lambda numbers: None)
    for name, content in flow.pack(model).items():
        (folder / name).write_bytes(content)
    return app.Model(str(folder), app.Settings(), 1)


def in_another_language(language):
    """Return texts of one of the catalogues of Django."""
    file = Path(django.__file__).parent / f"conf/locale/{language}/LC_MESSAGES/django.po"
    texts = [message.msgstr for message in polib.pofile(str(file))]
    return [text for text in texts if text and "\n" not in text]


def alerts(served, texts, folder):
    """Return the alerts that fire after an hour in which these texts came each minute."""
    added = {}
    for text in texts:
        request = app.ModelRequest(text=text)
        inputs = served.plan(request)
        response = served.answer(request, inputs, [app.Output("", 1, False)] * len(inputs))
        for counter in app.COUNTERS:
            added[counter] = added.get(counter, 0) + getattr(response, counter)
    series = {f"ray_translator_{name}_total": f"0+{number}x60" for name, number in added.items()}
    for name, value in served.expected.items():
        series[f'ray_translator_expected{{counter="{name}"}}'] = f"{value}x60"
    series["ray_translator_served"] = "1x60"
    return {name for name, _ in firing(folder, series, [59])}


def test_held_out_texts_are_like_those_of_the_training(served, data, tmp_path):
    sources = [source for source, _ in data[1]]
    for texts in (sources, sources[:100], sources[-100:], sources[::3]):
        assert alerts(served, texts, tmp_path) == set()


@pytest.mark.parametrize("language", ["de", "es", "fi", "ja", "pl", "ru", "tr"])
def test_another_language(served, language, tmp_path):
    assert alerts(served, in_another_language(language), tmp_path) == {"OtherTexts"}


def test_another_length(served, data, tmp_path):
    sources = [source for source, _ in data[1]]
    joined = [" ".join(sources[start : start + 8]) for start in range(0, 80, 8)]
    assert alerts(served, joined, tmp_path) == {"OtherTexts"}
    words = [source.split()[0] for source in sources]
    assert alerts(served, words, tmp_path) == {"OtherTexts"}


def test_what_is_exported_says_nothing_about_a_text(served):
    assert set(served.expected) == {"characters", "tokens", "unknown_tokens"}
    assert all(type(value) is float for value in served.expected.values())
    json.dumps(served.expected)
