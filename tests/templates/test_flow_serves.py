"""What the flow exports of each family, the app serves without settings, with the same tokens."""

import json
from pathlib import Path

import pytest
import template_flow as flow
import template_ray_serve as app
from helpers import families

pytestmark = pytest.mark.slow

TAGGED = [*flow.demo_pairs()[::20], families.TAGGED_PAIR]
TEXTS = [
    "Hello",
    "Price </s>20 euros<2de> >>deu<<__de__ de_DE now <pad>",
    " The cat.  It\u00a0sees",
]


@pytest.mark.parametrize("name", families.FAMILIES)
def test_exported_folder_is_served_without_settings(name, tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    families.make(name, base, flow.demo_pairs())
    settings = families.settings_for(base, *families.FAMILIES[name].languages["fr"])
    model = flow.new_model(TAGGED, settings)
    flow.fit(model, TAGGED, settings, str(tmp_path / "c"), lambda: None, lambda numbers: None)
    folder = tmp_path / "model"
    folder.mkdir()
    for file, content in flow.pack(model).items():
        (folder / file).write_bytes(content)
    # Sentences that the app gives to the model as they stand, with whatever the model answers.
    short = [(source, target) for source, target in TAGGED if "</s>" not in source]
    outputs = flow.predict(model, short)
    answers = flow.known_answers([(source, o) for (source, _), o in zip(short, outputs)], outputs)
    assert answers
    known = [{"request": request, "answer": answer} for request, answer in answers]
    (folder / "known_answers.json").write_text(json.dumps(known))
    served = app.Model(str(folder), app.Settings(), 1)
    for text in TEXTS:
        assert [served.encode(text)] == flow.encode(model, [text])
    marked = "\ufeffThe cat\u00adsleeps\u200f"
    (sentence,) = served.plan(app.ModelRequest(text=marked))
    assert flow.encode(model, [marked, "The catsleeps"]) == [sentence.tokens] * 2
    for request, answer in answers:
        asked = app.ModelRequest(**request)
        inputs = served.plan(asked)
        given = served.answer(asked, inputs, served(inputs))
        assert given.translation == answer["translation"]
    assert json.loads(Path(folder, "config.json").read_text())["task_specific_params"]
