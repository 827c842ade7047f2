"""No W&B setting stops a training: it is tracked as far as W&B accepts the settings."""

import os
import re
import shutil
import subprocess
import sys

import pytest
import template_flow
from flow_testing import FLOW, assert_fails_in_one_line, clean_environment, run

SCRIPT = """
import os
import template_flow

options = {"id": "Flow-1-train-2", "name": "1/train", "group": "Flow/1", "tags": ["a"]}
run = template_flow.start_wandb({**options, "resume": "allow", "config": {"seconds": float("inf")}})
print("MODE", template_flow.mode_of(run))
run.log({"loss": float("nan")})
run.summary.update({"score": 1.0})
run.finish(exit_code=0)
"""
KEY = "k3" * 43
OFFLINE = {"WANDB_MODE": "offline"}
NOBODY = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": KEY}
REFUSED = "W&B refuses its settings, continuing offline without them: "
UNREACHABLE = "W&B cannot be used, continuing offline: "
SETTINGS = {
    "slash": ({**OFFLINE, "WANDB_PROJECT": "my-team/translator"}, REFUSED),
    "slash online": ({**NOBODY, "WANDB_PROJECT": "my-team/translator"}, REFUSED),
    "long project": ({**OFFLINE, "WANDB_PROJECT": "x" * 200}, REFUSED),
    "long tag": ({**OFFLINE, "WANDB_TAGS": "x" * 65}, REFUSED),
    "run id": ({**OFFLINE, "WANDB_RUN_ID": "a/b"}, REFUSED),
    "resume": ({**OFFLINE, "WANDB_RESUME": "perhaps"}, REFUSED),
    "address": ({"WANDB_BASE_URL": "nonsense", "WANDB_API_KEY": KEY}, REFUSED),
    "secret address": ({**OFFLINE, "WANDB_BASE_URL": f"https://me:{KEY}@no host/"}, REFUSED),
    "service": ({**OFFLINE, "WANDB_SERVICE": "nonsense"}, REFUSED),
    "no bool": ({**OFFLINE, "WANDB_QUIET": "7"}, REFUSED),
    "no number": ({**OFFLINE, "WANDB_INIT_TIMEOUT": "soon"}, REFUSED),
    "key with a space": ({**NOBODY, "WANDB_API_KEY": f" {KEY}"}, REFUSED),
    "mode": ({"WANDB_MODE": "nonsense"}, UNREACHABLE),
    "short key": ({**NOBODY, "WANDB_API_KEY": "short"}, UNREACHABLE),
    "two keys": ({**NOBODY, "WANDB_API_KEY": f"{KEY} {KEY}"}, UNREACHABLE),
    "empty": ({**OFFLINE, "WANDB_BASE_URL": "", "WANDB_QUIET": "", "WANDB_RESUME": ""}, ""),
    "notes": ({**OFFLINE, "WANDB_NOTES": "two\nlines"}, ""),
    "must": ({**OFFLINE, "WANDB_RESUME": "must"}, ""),
    "entity": ({**OFFLINE, "WANDB_ENTITY": "a b/c#"}, ""),
    "folder": ({**OFFLINE, "WANDB_DIR": "/proc/nowhere"}, ""),
}


def start(folder, **environment):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=folder,
        env={**clean_environment(folder), "HOME": str(folder), **environment},
        timeout=300,
        text=True,
        encoding="utf-8",
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert done.returncode == 0 and "Traceback" not in done.stdout, done.stdout
    assert KEY not in done.stdout
    return done.stdout


def test_dotenv_in_another_encoding_is_one_line(tmp_path):
    flow = shutil.copy(FLOW, tmp_path)
    (tmp_path / ".env").write_text("WANDB_PROJECT=project\n", "utf-16")
    shutil.copy(FLOW.with_name("requirements.outerbounds.txt"), tmp_path)
    code, output = run(tmp_path, "--offline", "False", flow=flow)
    assert_fails_in_one_line(code, output, ".env: ")
    assert "save it as UTF-8" in output


@pytest.mark.parametrize("case", SETTINGS)
def test_what_wandb_refuses_is_one_line(case, tmp_path):
    environment, expected = SETTINGS[case]
    output = start(tmp_path, TMPDIR=str(tmp_path), **environment)
    assert "MODE offline" in output
    said = re.findall("^W&B .*", output, re.MULTILINE)
    assert [line[: len(expected)] for line in said] == ([expected] if expected else []), output


LOGINS = {
    "127.0.0.1:9": f"machine 127.0.0.1:9 login user password {KEY}\n",
    "another server": f"machine api.wandb.ai login user password {KEY}\n",
    "nonsense": "machine\n",
    "no file": None,
}


@pytest.mark.parametrize("login", LOGINS)
def test_a_login_counts_for_its_server(login, tmp_path, monkeypatch):
    file = tmp_path / "netrc"
    if LOGINS[login]:
        file.write_text(LOGINS[login])
    environment = {"NETRC": str(file), "WANDB_BASE_URL": "http://127.0.0.1:9/"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    counts = login == "127.0.0.1:9"
    assert template_flow.has_login() == counts
    if counts:
        output = start(tmp_path, **environment)
        assert f"Loaded credentials for http://127.0.0.1:9 from {file}" in output


def test_without_any_run_the_training_goes_on(tmp_path):
    broken = tmp_path / "wandb"
    broken.mkdir()
    (broken / "__init__.py").write_text("raise OSError(28, 'No space left on device')")
    output = start(tmp_path)
    assert "W&B cannot start, continuing without it: [Errno 28] No space left on device" in output
    assert "MODE disabled" in output


DEFAULT = """
import sys
sys.argv += sys.argv[1:] and ["create"]
from template_flow import TemplateFlow
offline = vars(TemplateFlow)["offline"]
offline.init()
print(offline.kwargs["default"])
"""


@pytest.mark.parametrize("secrets", ["[]", '["outerbounds.wandb"]'])
@pytest.mark.parametrize("command", ["run", "argo-workflows"])
def test_a_deployed_flow_is_tracked_if_it_has_a_secret(command, secrets, tmp_path):
    text = FLOW.read_text("utf-8")
    assert text.count("SECRETS: list[str] = []") == 1
    text = text.replace("SECRETS: list[str] = []", f"SECRETS: list[str] = {secrets}")
    (tmp_path / FLOW.name).write_text(text, "utf-8")
    done = subprocess.run(
        [sys.executable, "-c", DEFAULT, command],
        cwd=tmp_path,
        env={**clean_environment(tmp_path), "PYTHONPATH": os.fspath(tmp_path)},
        timeout=100,
        text=True,
        capture_output=True,
    )
    tracked = command == "argo-workflows" and secrets != "[]"
    assert done.stdout.split() == [str(not tracked)], done.stderr
