# test_template_flow.py, version 0.1.0
"""Tests of template_flow.py: `pip install pytest; python -m pytest test_template_flow.py`. No network, no account.

Each flow runs as a user runs it, as a command, in a temporary folder and with none of your Metaflow or W&B settings.
"""

import base64
import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest

FLOW = Path(__file__).with_name("template_flow.py")
for setting in [name for name in os.environ if re.match("_*(METAFLOW|WANDB|REMOTE_CONFIG)", name)]:
    del os.environ[setting]  # yours must not change what is tested
os.environ.update({"METAFLOW_USER": "test", "HF_HUB_OFFLINE": "1"})

import template_flow  # noqa: E402  (Metaflow reads the environment when it is imported)


def clean_environment(folder):
    """The environment in which everything that Metaflow writes goes to `folder`."""
    return {
        **os.environ,
        "METAFLOW_HOME": str(folder / "none"),
        "METAFLOW_CLIENT_CACHE_PATH": str(folder / "cache"),
    }


def run(folder, *arguments, command=("run",), seconds=300, **environment):
    """Run the flow in `folder`; return (exit code, everything it printed)."""
    done = subprocess.run(
        [sys.executable, str(FLOW), "--no-pylint", *command, *arguments],
        cwd=folder,
        timeout=seconds,
        env={**clean_environment(folder), **environment},
        text=True,
        encoding="utf-8",
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    return done.returncode, done.stdout


def artifacts(folder, step):
    """The artifacts of the newest task of a step, read by the Metaflow client in a process of its own."""
    script = f"""
import pickle, sys
for heavy in ("torch", "transformers", "wandb"):
    sys.modules[heavy] = None  # artifacts are plain data: none of these is needed to read them
from metaflow import Flow
task = next(iter(Flow("TemplateFlow")))["{step}"].task
sys.stdout.buffer.write(pickle.dumps({{artifact.id: artifact.data for artifact in task}}))
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=folder,
        env=clean_environment(folder),
        timeout=100,
        check=True,
        stdout=subprocess.PIPE,
    )
    return pickle.loads(done.stdout)


def cards(folder, step):
    """What the HTML cards of the newest run's step show, as JSON."""
    newest = max(
        (folder / ".metaflow/mf.cards/TemplateFlow/runs").iterdir(), key=lambda path: int(path.name)
    )
    files = newest.glob(f"steps/{step}/tasks/*/cards/*.html")
    data = [
        re.findall(r'__MF_DATA__\["[^"]+"\] = "([^"]+)"', file.read_text("utf-8")) for file in files
    ]
    return [
        json.dumps(json.loads(base64.b64decode(each)), ensure_ascii=False)
        for one in data
        for each in one
    ]


def pairs_file(path, pairs):
    lines = ["source\ttarget"] + [f"{source}\t{target}" for source, target in pairs]
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return str(path)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A finished demo run: (its folder, what it printed)."""
    folder = tmp_path_factory.mktemp("demo")
    code, output = run(folder, "--offline", "True", WANDB_API_KEY="", WANDB_PROJECT="")
    assert code == 0, output
    return folder, output


def test_demo_translates_sentences_it_has_never_seen(demo):
    found = artifacts(demo[0], "evaluate")
    assert found["scores"]["exact_match"] >= 95
    assert found["scores"]["chrf"] > 95 > 30 > found["scores"]["chrf_of_copying"]
    assert ("Hello world!", "Bonjour le monde !") in found["held_out"]
    assert found["known_answers"]["Hello world!"] == "Bonjour le monde !"
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(found["model"])


def test_demo_says_what_came_out_and_what_comes_next(demo):
    assert re.search(r"held-out scores: .*exact_match (9[5-9]|100)\.\d", demo[1])
    assert "next: python export_model.py" in demo[1]
    assert demo[1].count("W&B mode: offline") == 2  # train and evaluate
    for folder in re.findall(r"wandb sync (\S+)", demo[1]):
        assert Path(folder).is_dir() and Path(folder).name.startswith("offline-run-")


def test_training_card_draws_the_losses_of_this_run(demo):
    losses = artifacts(demo[0], "train")["losses"]
    assert len(losses) >= 20 and losses[-1]["loss"] < losses[0]["loss"] / 50
    assert any(
        json.dumps(losses) in card and "W&B: offline" in card for card in cards(demo[0], "train")
    )


def test_evaluation_card_shows_samples(demo):
    found = artifacts(demo[0], "evaluate")
    source, target = found["held_out"][0]
    assert any(
        source in card and target in card and "exact_match" in card
        for card in cards(demo[0], "evaluate")
    )


def test_same_seed_same_model_and_another_seed_another(tmp_path):
    short = (
        "--epochs",
        "1",
        "--min-chrf",
        "100",
    )  # fails in evaluate, long after the model is there
    models = []
    for seed in ("5", "5", "6"):
        code, output = run(tmp_path, *short, "--seed", seed)
        assert code != 0 and "not good enough" in output and "Traceback" not in output, output
        models.append(artifacts(tmp_path, "train")["model"]["model.safetensors"])
    assert models[0] == models[1] != models[2]


def test_finetunes_a_given_model_on_given_pairs(demo, tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    for name, content in artifacts(demo[0], "train")["model"].items():
        (base / name).write_bytes(content)
    pairs = [(source, f"{target} (fr)") for source, target in template_flow.demo_pairs()]
    data = pairs_file(tmp_path / "pairs.tsv", pairs)
    code, output = run(
        tmp_path, "--data", data, "--base-model", str(base), "--epochs", "100", "--seconds", "10"
    )
    assert code == 0, output
    found = artifacts(tmp_path, "evaluate")
    assert sorted(found["training"] + found["held_out"]) == sorted(pairs)
    assert found["model"]["tokenizer.json"] == (base / "tokenizer.json").read_bytes()
    assert found["scores"]["exact_match"] > 80  # 0 before


HEADER = b"source\ttarget\n"
BAD_FILES = {
    "empty": (b"", "line 1: the header"),
    "no header": (b"Hello\tBonjour\n", "line 1: the header"),
    "other names": (b"english\tfrench\nHello\tBonjour\n", "line 1: the header"),
    "commas": (b"source,target\nHello,Bonjour\n", "line 1: the header"),
    "only a header": (HEADER, "too few"),
    "one pair": (HEADER + b"Hello\tBonjour\n", "too few"),
    "one sentence twice": (HEADER + b"Hello!\tBonjour !\nhello\tBonjour\n", "too few"),
    "one column": (HEADER + b"Hello\tBonjour\nGoodbye\n", "line 3: needs two texts"),
    "three columns": (HEADER + b"Hello\tBonjour\tHola\n", "line 2: needs two texts"),
    "blank line": (HEADER + b"\nHello\tBonjour\n", "line 2: needs two texts"),
    "empty text": (HEADER + b"Hello\t\n", "line 2: needs two texts"),
    "spaces": (HEADER + b"Hello\t \n", "line 2: needs two texts"),
    "NaN": (HEADER + b"Hello\tBonjour\nWelcome\tNaN\n", "line 3: needs two texts"),
    "Latin-1": (HEADER + b"Hello\tBonjour\nGoodbye\t\xc0 bient\xf4t\n", "line 3: not UTF-8"),
    "UTF-16": ("source\ttarget\nHello\tBonjour\n".encode("utf-16"), "line 1: not UTF-8"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_data_is_named_with_its_line(case, tmp_path):
    content, expected = BAD_FILES[case]
    (tmp_path / "pairs.tsv").write_bytes(content)
    with pytest.raises(template_flow.Stop) as stop:
        template_flow.split(template_flow.read_pairs(str(tmp_path / "pairs.tsv")))
    assert expected in str(stop.value) and "\n" not in str(stop.value)
    if "line" in expected:
        assert "pairs.tsv line" in str(stop.value)


def test_good_data_is_read_as_it_stands(tmp_path):
    pairs = [
        ("  %(name)s\u00a0: <b>é</b> ", '"quoted" \u2028 text'),
        ("None", "Aucun"),
        ("nan bread", "pain nan"),
    ]
    plain = pairs_file(tmp_path / "plain.tsv", pairs)
    assert template_flow.read_pairs(plain) == pairs
    windows = tmp_path / "windows.tsv"  # a byte order mark and CR LF, as Excel writes them
    windows.write_bytes(b"\xef\xbb\xbf" + Path(plain).read_bytes().replace(b"\n", b"\r\n"))
    assert template_flow.read_pairs(str(windows)) == pairs


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (("--data", "nowhere.tsv"), "nowhere.tsv: No such file or directory"),
        (("--data", "."), "Is a directory"),
        (("--epochs", "0"), "--epochs has to be 1 or more"),
        (("--epochs", "many"), "many is not a valid integer"),
        (("--seconds", "-1"), "--seconds"),
        (("--offline", "maybe"), "maybe is not a valid boolean"),
        (("--base-model", "./nowhere", "--epochs", "1"), "no model at ./nowhere"),
        (("--offline", "False"), "--offline False needs WANDB_API_KEY and WANDB_PROJECT"),
    ],
)
def test_mistakes_get_one_line(arguments, expected, tmp_path):
    code, output = run(tmp_path, *arguments)
    assert code != 0 and expected in output and "Traceback" not in output, output


@pytest.mark.parametrize("name, value", [("METAFLOW_PROFILE", "local"), ("WANDB_MODE", "disabled")])
def test_check_passes_lint_in_any_setting(name, value, tmp_path):
    (tmp_path / "config_local.json").write_text("{}")
    environment = {**clean_environment(tmp_path), "METAFLOW_HOME": str(tmp_path), name: value}
    done = subprocess.run(
        [sys.executable, str(FLOW), "check"],
        cwd=tmp_path,
        env=environment,
        timeout=60,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert done.returncode == 0 and "Pylint is happy" in done.stdout, done.stdout


def test_importing_the_flow_loads_nothing_heavy(tmp_path):
    script = "import sys, template_flow; print(sorted({'torch', 'transformers', 'wandb', 'ray'} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=FLOW.parent,
        env=clean_environment(tmp_path),
        timeout=60,
        text=True,
        stdout=subprocess.PIPE,
        check=True,
    )
    assert done.stdout.strip() == "[]"


def test_split_never_leaks_and_does_not_move_when_data_grows():
    pairs = template_flow.demo_pairs()
    training, held_out = template_flow.split(pairs)
    letters = [
        {re.sub(r"\W+", "", source.casefold()) for source, _ in side}
        for side in (training, held_out)
    ]
    assert not letters[0] & letters[1] and sorted(training + held_out) == sorted(pairs)
    assert 0.05 < len(held_out) / len(pairs) < 0.2
    assert set(template_flow.split(pairs[::2])[1]) <= set(held_out)


def test_tiny_data_still_holds_something_out():
    for count in range(2, 40):
        training, held_out = template_flow.split(
            [(f"text {n}", f"texte {n}") for n in range(count)]
        )
        assert training and held_out and len(training) + len(held_out) == count
