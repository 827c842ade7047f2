"""The unedited files work elsewhere: copied out, as another user, offline, with stray settings."""

import os
import shutil
import subprocess
import sys
import tempfile

import pytest
from helpers import shell
from helpers.repository import TEMPLATES

QUICK = ("run", "--offline", "True", "--epochs", "4")  # enough to be better than copying


def run(command, folder, seconds=400, **more):
    """Run a command without the caller's environment; return (exit code, everything it printed)."""
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(folder),
        "LANG": "C.UTF-8",
        "TMPDIR": tempfile.gettempdir(),
        "OMP_NUM_THREADS": "1",
        **more,
    }
    done = subprocess.run(
        [str(part) for part in command],
        cwd=folder,
        timeout=seconds,
        text=True,
        encoding="utf-8",
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    return done.returncode, done.stdout


def git_repository(folder, *names):
    """Make a git repository with copies of template files, as a user does; return the folder."""
    subprocess.run(["git", "init", "-q", str(folder)], check=True)
    for name in names:
        shutil.copy(TEMPLATES / name, folder)
    return folder


def test_flow_copied_alone_runs_without_any_settings(tmp_path):
    folder = git_repository(tmp_path / "home", "template_flow.py")
    # Root becomes a user who may write only there.
    before = shell.give_to_nobody(folder) if os.geteuid() == 0 else ()
    command = [*before, sys.executable, "template_flow.py", *QUICK]
    code, output = run(command, folder, USER="somebody")
    assert code == 0 and "Pylint is happy" in output and "Done!" in output, output
    assert "Traceback" not in output and "rror" not in output, output


def test_flow_with_the_profile_local_from_another_directory(tmp_path):
    home = tmp_path / ".metaflowconfig"
    home.mkdir()
    (home / "config_local.json").write_text("{}\n")
    elsewhere = tmp_path / "else where"
    elsewhere.mkdir()
    code, output = run(
        [sys.executable, TEMPLATES / "template_flow.py", "--no-pylint", *QUICK],
        elsewhere,
        HOME=str(tmp_path),
        METAFLOW_PROFILE="local",
        METAFLOW_USER="test",
    )
    assert code == 0 and "Done!" in output, output
    assert (elsewhere / ".metaflow").is_dir()


STRAY = {
    "METAFLOW_DEFAULT_DATASTORE": "s3",
    "METAFLOW_PROFILE": "nowhere",
    "WANDB_API_KEY": "x" * 40,
    "WANDB_MODE": "online",
    "RAY_ADDRESS": "127.0.0.1:1",
    "METAFLOW_USER": "test",
}
COPIED = {
    "flow": (
        "test_template_flow.py -k demo",
        "template_flow.py",
        "test_template_flow.py",
        "flow_testing.py",
        "requirements.outerbounds.txt",
    ),
    "serve": (
        "test_template_ray_serve.py",
        "template_ray_serve.py",
        "test_template_ray_serve.py",
        "serve_testing.py",
        "tiny_translator.py",
    ),
}


@pytest.mark.slow
@pytest.mark.skipif(not shell.can_cut_network(), reason="needs root and unshare")
@pytest.mark.parametrize("what", COPIED)
def test_copied_tests_pass_without_a_network(what, tmp_path):
    """The tests of the mechanics are run like this by those of the recipes."""
    tests, *files = COPIED[what]
    folder = git_repository(tmp_path / what, *files)
    options = f"-q -p no:cacheprovider -p no:xdist --basetemp={tmp_path}/scratch"
    command = f"{sys.executable} -m pytest {options} {tests}"
    code, output = run(
        ["bash", "-c", shell.WITHOUT_NETWORK + command], folder, seconds=1500, **STRAY
    )
    assert code == 0 and " passed" in output, output
