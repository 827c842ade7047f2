"""The image that all tests in this folder use."""

import shutil

import pytest
from helpers.images import CANARY, FILES, IMAGE, LABEL, build
from helpers.loopback import alone
from helpers.remote import pods
from helpers.repository import TEMPLATES
from tiny_translator import PAIRS, make_model


@pytest.fixture(scope="session")
def project(tmp_path_factory):
    """A folder as a user has it, in which a key and other things lie about."""
    folder = tmp_path_factory.mktemp("image")
    for name in FILES:
        shutil.copy(TEMPLATES / name, folder)
    make_model(folder / "model", PAIRS)
    for name in (".env", "notes.txt", "data.tsv", "tokens"):
        (folder / name).write_text(f"WANDB_API_KEY={CANARY}\n")
    return folder


@pytest.fixture(scope="session")
def image(project):
    if not shutil.which("docker") or pods.docker("version").returncode:
        pytest.skip("no docker daemon answers")
    with alone("image"):  # a second worker finds it in Docker's cache
        seconds, _ = build(project, IMAGE)
    print(f"built in {seconds:.0f} s")
    yield IMAGE
    pods.remove(LABEL)
