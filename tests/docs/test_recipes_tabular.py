"""The recipe for tabular data in docs/your-own-model.md; nothing here may import torch."""

import json
import subprocess
import sys

import pytest
from helpers import recipes

HEADING = "Classify rows of numbers with scikit-learn"
NOT_INSTALLED = ["torch", "transformers", "tokenizers", "accelerate", "sacrebleu", "sentencex"]
TREES = "--trees 300"  # 30 rounds: time to kill it

# Whether two skops files hold the same trees, to the last bit: their bytes differ from run to run.
SAME_TREES = """
import sys
import skops.io

def values(file):
    model = skops.io.load(file, trusted=["sklearn.tree._tree.Tree"])
    trees = [tree.tree_ for tree in model.estimators_.ravel()]
    arrays = [(tree.feature, tree.threshold, tree.value) for tree in trees]
    return [array.tolist() for found in arrays for array in found], model.train_score_.tolist()

first, second = map(values, sys.argv[1:])
assert len(first[1]) == 300 and first == second
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The templates with the recipe, and data."""
    folder = recipes.apply(HEADING, tmp_path_factory.mktemp("tabular"))
    recipes.write_data(HEADING, folder)
    return folder


@pytest.fixture(scope="module")
def environment(folder):
    """Variables with which the packages of the translator cannot be imported."""
    environment = recipes.without(folder, NOT_INSTALLED)
    for package in NOT_INSTALLED:
        code, _ = recipes.run(folder, f"python -c 'import {package}'", **environment)
        assert code != 0
    return environment


@pytest.fixture(scope="module")
def followed(folder, environment):
    """The folder after all commands of the page; it holds a finished run and its model."""
    recipes.follow(HEADING, folder, **environment)
    return folder


def test_recipe_is_short_and_stays_in_the_marked_places(folder):
    print(recipes.check_limits(HEADING, folder), "lines are added")
    recipes.check_style(folder)
    for name in ("requirements.outerbounds.txt", "requirements-rayserve.txt"):
        pinned = (folder / name).read_text("utf-8")
        assert "scikit-learn==" in pinned
        assert not [package for package in NOT_INSTALLED if f"\n{package}=" in pinned]


BAD_DATA = {
    "a word": ("a,label\n1,0\nred,1\n", "could not convert string to float: 'red'"),
    "NaN": ("a,label\n1,0\nnan,1\n", "row 2: needs finite numbers, and 0 or 1 as label"),
    "another label": ("a,label\n1,2\n", "row 1: needs finite numbers, and 0 or 1 as label"),
    "no label": ("a,b\n1,0\n", "row 1: needs finite numbers, and 0 or 1 as label"),
    "a cell less": ("a,label\n1\n", "--data takes a CSV file of numbers"),
    "a cell more": ("a,label\n1,2,3\n", "--data takes a CSV file of numbers"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data_is_named_in_one_line(case, folder, environment, tmp_path):
    content, message = BAD_DATA[case]
    file = tmp_path / "bad.csv"
    file.write_text(content)
    recipes.fails_in_one_line(folder, f"--data {file}", message, **environment)


@pytest.mark.slow
def test_commands_of_the_page(followed, environment):
    scores = recipes.artifacts(followed, "evaluate", **environment)["scores"]
    assert scores["baseline_roc_auc"] == 0.5 and scores["roc_auc"] > 0.95
    known = recipes.known_answers(followed)
    assert sorted(case["answer"]["probability"] > 0.5 for case in known) == [False, True]
    assert len(known[0]["request"]) == 30
    files = {path.name for path in (followed / "model").iterdir()}
    assert files == {"model.skops", "known_answers.json", "README.md"}


@pytest.mark.slow
def test_gate(followed, environment):
    recipes.fails_in_one_line(followed, "--minimum 1", "not good enough: ", **environment)


@pytest.mark.slow
def test_one_label_among_the_held_out_rows_never_passes(folder, environment):
    script = (
        "import csv, template_flow as flow\n"
        "examples = flow.read_pairs('table.csv')\n"
        "held_out = [repr(example) for example in flow.split(examples)[1]]\n"
        "names = list(examples[0][0])\n"
        "writer = csv.writer(open('one_label.csv', 'w', newline=''))\n"
        "writer.writerow([*names, 'label'])\n"
        "for features, label in examples:\n"
        "    if label == 1 or repr((features, label)) not in held_out:\n"
        "        writer.writerow([*features.values(), label])\n"
    )
    (folder / "one_label.py").write_text(script)
    code, output = recipes.run(folder, "python one_label.py", **environment)
    assert code == 0, output
    options = "--data one_label.csv --minimum=-1"
    recipes.fails_in_one_line(folder, options, "not good enough: roc_auc nan", **environment)


@pytest.mark.slow
def test_a_killed_training_resumes_and_ends_with_the_same_trees(environment, tmp_path):
    models = []
    for name, rounds in (("unbroken", 30), ("killed", None)):
        folder = tmp_path / name
        folder.mkdir()
        recipes.apply(HEADING, folder)
        recipes.write_data(HEADING, folder)
        if rounds:
            code, output = recipes.run(folder, f"{recipes.FLOW} run {TREES}", **environment)
            assert code == 0 and recipes.checkpoints(folder) == rounds, output
        else:
            recipes.kill_in_train(folder, TREES, saved=8, **environment)
            saved = recipes.checkpoints(folder)
            code, output = recipes.run(folder, f"{recipes.FLOW} resume", **environment)
            assert code == 0 and recipes.checkpoints(folder) - saved <= 30 - 8 + 1, output
        found = recipes.artifacts(folder, "train", **environment)
        models.append(found["losses"])
        (folder / "model.skops").write_bytes(found["model"]["model.skops"])
    assert len(models[0]) == 300 and models[0] == models[1]
    files = [str(tmp_path / name / "model.skops") for name in ("unbroken", "killed")]
    subprocess.run([sys.executable, "-c", SAME_TREES, *files], check=True, timeout=400)


@pytest.mark.slow
def test_serves_as_configured(followed, environment):
    known = recipes.known_answers(followed)
    good = known[0]["request"]
    missing = dict(list(good.items())[1:])
    with recipes.Server(followed, "run", "serve_config.yaml", **environment) as server:
        server.wait()
        recipes.check_example(server, "/translate", known)
        backwards = dict(reversed(good.items()))
        status, answer = server.ask("/translate", backwards)
        assert status == 200
        assert answer["probability"] == pytest.approx(known[0]["answer"]["probability"])
        recipes.check_refused(server, "/translate", missing, "mean radius: Field required")
        unknown = {**good, "colour": 1.0}
        recipes.check_refused(server, "/translate", unknown, "Extra inputs are not permitted")
        for wrong in (float("nan"), float("inf")):
            body = {**good, "mean radius": wrong}
            problem = "mean radius: Input should be a finite number"
            recipes.check_refused(server, "/translate", body, problem)
        for wrong in ("17.99", None, True, [1.0]):
            body = {**good, "mean radius": wrong}
            recipes.check_refused(server, "/translate", body, "mean radius: Input should be a")
        _, described = server.ask("/translate/openapi.json", method="GET")
        content = described["paths"]["/"]["post"]["requestBody"]["content"]["application/json"]
        assert list(content["schema"]["properties"]) == list(good)


@pytest.mark.slow
def test_a_model_that_is_missing_is_one_line(folder, environment, tmp_path):
    recipes.apply(HEADING, tmp_path)
    script = "import template_ray_serve as app; app.load_model(app.Settings(), 1)"
    code, output = recipes.run(tmp_path, f"python -c '{script}'", **environment)
    assert code != 0 and "RuntimeError: no usable model 'model/' (" in output.splitlines()[-1], (
        output
    )


@pytest.mark.slow
def test_mechanics_of_the_server_pass_unedited(followed, environment):
    recipes.run_copied_test(followed, "test_serve_mechanics.py", **environment)


@pytest.mark.slow
def test_image_has_no_torch(followed):
    if not recipes.docker_answers():
        pytest.skip("no docker daemon answers")
    known = recipes.known_answers(followed)[0]
    with recipes.image(followed, "template_recipe_tabular:test") as image:
        answer = image.first_answer(lambda: image.post("/translate", known["request"]))
        assert answer["probability"] == pytest.approx(known["answer"]["probability"], abs=1e-6)
        health = "rayserve_entrypoint.py", "health", "serve_config.yaml"
        done = image.inside("python", *health)
        assert (done.returncode, done.stdout) == (0, "")
        script = (
            "import json, importlib.util as u; print(json.dumps([n for n in {} if u.find_spec(n)]))"
        )
        done = image.inside("python", "-c", script.format(NOT_INSTALLED))
        assert done.returncode == 0 and json.loads(done.stdout) == []
