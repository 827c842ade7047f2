"""The recipe for a text classifier in docs/your-own-model.md, from its data to its image."""

import pytest
from helpers import recipes

HEADING = "Classify texts"
LABELS = {"billing", "delivery", "login"}
ROUTE = "/classify"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The templates with the recipe, and data."""
    folder = recipes.apply(HEADING, tmp_path_factory.mktemp("classifier"))
    recipes.write_data(HEADING, folder)
    return folder


@pytest.fixture(scope="module")
def followed(folder):
    """The folder after all commands of the page; it holds a finished run and its model."""
    recipes.follow(HEADING, folder)
    return folder


def test_recipe_is_short_and_stays_in_the_marked_places(folder):
    print(recipes.check_limits(HEADING, folder), "lines are added")
    recipes.check_style(folder)


BAD_DATA = {
    "no header": ("The parcel is late.,delivery\n", "row 1: the header has to be text,label"),
    "a third cell": ("text,label\na,b,c\n", "row 2: needs a text and a label, neither empty nor"),
    "no label": ("text,label\na,\n", "row 2: needs a text and a label, neither empty nor NaN"),
    "one label": ("text,label\na,x\nb,x\n", "needs at least two different labels"),
    "nothing": ("", "row 1: the header has to be text,label"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data_is_named_in_one_line(case, folder, tmp_path):
    content, message = BAD_DATA[case]
    file = tmp_path / "bad.csv"
    file.write_text(content)
    recipes.fails_in_one_line(
        folder, f"--data {file}", f"{file}: {message}".replace(": row", " row")
    )


@pytest.mark.slow
def test_commands_of_the_page(followed):
    found = recipes.artifacts(followed, "evaluate")
    assert found["scores"]["baseline_accuracy"] < 0.5 < found["scores"]["accuracy"]
    known = recipes.known_answers(followed)
    assert {case["answer"]["label"] for case in known} == LABELS


@pytest.mark.slow
def test_gate(tmp_path):
    folder = recipes.apply(HEADING, tmp_path)  # the others need the run of the page as the newest
    recipes.write_data(HEADING, folder)
    recipes.fails_in_one_line(folder, "--epochs 1 --minimum 0.99", "not good enough: ")


@pytest.mark.slow
def test_a_killed_training_resumes_and_ends_with_the_same_model(followed, tmp_path):
    unbroken = recipes.artifacts(followed, "train")
    recipes.apply(HEADING, tmp_path)
    recipes.write_data(HEADING, tmp_path)
    recipes.kill_in_train(tmp_path, "", saved=4)
    saved = recipes.checkpoints(tmp_path)
    code, output = recipes.run(tmp_path, f"{recipes.FLOW} resume")
    assert code == 0, output
    resumed = recipes.artifacts(tmp_path, "evaluate")
    # An uninterrupted run saves ten. A resumed run first saves the checkpoint that it starts from.
    assert recipes.checkpoints(tmp_path) - saved <= 10 - 4 + 1
    assert recipes.changed_files(resumed["model"], unbroken["model"]) == []
    assert resumed["losses"] == unbroken["losses"]


@pytest.mark.slow
def test_fine_tunes_its_own_model(followed):
    code, output = recipes.run(followed, f"{recipes.FLOW} run --base-model model --epochs 1")
    assert code == 0, output
    assert recipes.artifacts(followed, "train")["losses"][0]["loss"] < 0.5


@pytest.mark.slow
def test_serves_as_configured(followed):
    known = recipes.known_answers(followed)
    with recipes.Server(followed, "run", "serve_config.yaml") as server:
        server.wait()
        recipes.check_example(server, "/translate", known)
        for body in ({}, {"text": 1}, {"text": "a", "label": "b"}, {"text": ["a"]}):
            recipes.check_refused(server, "/translate", body)
        recipes.check_refused(server, "/translate", {}, "text: Field required")
        status, answer = server.ask("/translate", {"text": "<pad> </s> " + "parcel " * 1000})
        assert status == 200 and answer["label"] == "delivery"


@pytest.mark.slow
def test_mechanics_of_the_flow_pass_unedited(followed):
    # Those of interrupted runs and of W&B use nothing of the recipe but its parameters.
    same = "resume or retry or older or wandb or tracking"
    wanted = f"not ({same}) or older_than_a_parameter"
    recipes.run_copied_test(followed, f"test_flow_mechanics.py -k '{wanted}'")


@pytest.mark.slow
def test_image(followed):
    if not recipes.docker_answers():
        pytest.skip("no docker daemon answers")
    known = recipes.known_answers(followed)[0]
    with recipes.image(followed, "template_recipe_classifier:test") as image:
        answer = image.first_answer(lambda: image.post("/translate", known["request"]))
        assert answer["label"] == known["answer"]["label"]
        health = "rayserve_entrypoint.py", "health", "serve_config.yaml"
        done = image.inside("python", *health)
        assert (done.returncode, done.stdout) == (0, "")
