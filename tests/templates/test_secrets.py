"""A key reaches W&B and is stored nowhere: the tests search everything that a run leaves behind."""

import base64
import gzip
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from flow_testing import FLOW, cards, clean_environment, write_toy
from helpers.tracking import tracked
from helpers.wandb_server import StandIn

CANARY = "canary-7f3a-not-real-0000000000000000000000000000"
NEEDLES = [
    b"canary-7f3a",
    *(base64.b64encode(before + CANARY.encode())[4:32] for before in (b"api:", b"aapi:", b"")),
]
EXAMPLE = FLOW.with_name(".env.example")


def plain(raw):
    """Yield the bytes and what they unpack to."""
    yield raw
    for unpack in (gzip.decompress, zlib.decompress):
        try:
            yield unpack(raw)
        except (OSError, EOFError, zlib.error):
            continue


def hits(folder, but=()):
    """Return the files in a folder that hold the key, in any encoding."""
    files = [file for file in folder.rglob("*") if file.is_file() and file.name not in but]
    assert files
    return [
        file
        for file in files
        if any(needle in content for content in plain(file.read_bytes()) for needle in NEEDLES)
    ]


def artifacts_with_key(folder, flow="TemplateFlow"):
    """Return ({names of all artifacts of the newest run}, [those whose value holds the key])."""
    code = f"""
import json, pickle
from metaflow import Flow, namespace
namespace(None)
names, found = [], []
for step in next(iter(Flow("{flow}"))):
    for task in step:
        for artifact in [*task, task["_graph_info"]]:
            pickled = pickle.dumps(artifact.data, protocol=0) + repr(artifact.data).encode()
            names.append(artifact.id)
            found += [artifact.pathspec] * (b"canary-7f3a" in pickled)
        logged = task.stdout + task.stderr + repr(task.metadata_dict)
        found += [task.pathspec] * ("canary-7f3a" in logged)
print(json.dumps([names, found]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=clean_environment(folder),
        timeout=400,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    names, found = json.loads(done.stdout)
    return set(names), found


@pytest.fixture(scope="module", params=["command", "env file"])
def ran(request, both):
    return both[request.param]


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """A tracked run with the key before the command, and one with it in .env beside the flow."""

    def start(way):
        folder = tmp_path_factory.mktemp(way.replace(" ", "_"))
        flow = Path(shutil.copy(FLOW, folder))
        options = ("--offline", "False", "--epochs", "2")
        with StandIn() as server:
            if way == "command":
                return tracked(folder, server, *options, flow=flow, WANDB_API_KEY=CANARY)
            example = EXAMPLE.read_text()
            assert re.search("^WANDB_API_KEY=$", example, re.M) and re.search(
                "^WANDB_PROJECT=$", example, re.M
            )
            (folder / ".env").write_text(
                example.replace("WANDB_API_KEY=", f"WANDB_API_KEY={CANARY}").replace(
                    "WANDB_PROJECT=", "WANDB_PROJECT=from-env-file"
                )
            )
            nothing = {"WANDB_API_KEY": None, "WANDB_PROJECT": None}
            return tracked(folder, server, *options, flow=write_toy(folder), **nothing)

    with ThreadPoolExecutor(2) as pool:
        yield dict(zip(("command", "env file"), pool.map(start, ("command", "env file"))))


def test_the_key_is_used(ran):
    assert ran.code == 0, ran.output
    assert {key for _, path, key in ran.server.requests if path == "/graphql"} == {CANARY}
    assert len(ran.server.runs) == 2


def test_env_file_gives_the_project_too(both):
    assert {run["project"] for run in both["env file"].server.runs.values()} == {"from-env-file"}


def test_the_key_is_in_no_artifact_and_no_log(ran):
    names, found = artifacts_with_key(ran.folder)
    assert {"_graph_info", "examples", "model", "scores"} <= names and found == []
    assert "canary-7f3a" not in ran.output


def test_the_key_is_in_no_file(ran):
    """Search .metaflow with its blobs and cards, the folder of W&B, and the home folder."""
    assert hits(ran.folder, but=(".env",)) == []
    assert (ran.folder / ".metaflow").is_dir() and (ran.folder / "wandb").is_dir()
    for step in ("train", "evaluate"):
        shown = cards(ran.folder, step)
        assert shown and not any("canary-7f3a" in card for card in shown)


def test_the_key_is_not_sent_as_data(ran):
    server = ran.server
    sent = json.dumps(list(server.runs.values())).encode() + b"".join(server.files.values())
    assert len(server.files) >= 8 and not any(needle in sent for needle in NEEDLES)


def test_the_code_package_leaves_the_env_file_at_home(both, tmp_path):
    folder = both["env file"].folder

    def package(*command):
        return subprocess.run(
            [sys.executable, "template_flow.py", "--no-pylint", "package", *command],
            cwd=folder,
            env=clean_environment(folder),
            timeout=400,
            text=True,
            check=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    listed = package("list").stdout
    assert "template_flow.py" in listed and ".env" not in listed
    package("save", str(tmp_path / "package.tgz"))
    with tarfile.open(tmp_path / "package.tgz") as archive:
        names = archive.getnames()
        safely = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # from 3.11.4 on
        archive.extractall(tmp_path / "content", **safely)
    assert any(name.endswith("template_flow.py") for name in names)
    assert (
        not any(Path(name).name.startswith(".env") for name in names)
        and hits(tmp_path / "content") == []
    )


def test_a_key_that_leaks_would_be_found(tmp_path):
    """The known mistake: a key in a decorator's attributes is stored with the flow's graph."""
    (tmp_path / "leaky.py").write_text("""
import os
from metaflow import FlowSpec, environment, step
class LeakyFlow(FlowSpec):
    @environment(vars={"COPY": os.environ["WANDB_API_KEY"]})
    @step
    def start(self):
        self.next(self.end)
    @step
    def end(self):
        pass
LeakyFlow()
""")
    subprocess.run(
        [sys.executable, "leaky.py", "--no-pylint", "run"],
        cwd=tmp_path,
        timeout=400,
        check=True,
        env={**clean_environment(tmp_path), "WANDB_API_KEY": CANARY},
        stdout=subprocess.DEVNULL,
    )
    names, found = artifacts_with_key(tmp_path, "LeakyFlow")
    assert any("_graph_info" in pathspec for pathspec in found) and hits(tmp_path)
    (tmp_path / "header").mkdir()
    for before in ("api:", ""):
        file = tmp_path / "header" / f"{before}x"
        file.write_bytes(gzip.compress(base64.b64encode((before + CANARY).encode())))
        assert hits(tmp_path / "header") == [file]
        file.unlink()


def test_git_ignores_the_env_file_and_keeps_its_example():
    root = FLOW.parents[1]
    ignored = [
        subprocess.run(
            ["git", "check-ignore", "-q", str(FLOW.with_name(name))], cwd=root
        ).returncode
        == 0
        for name in (".env", ".env.example")
    ]
    assert ignored == [True, False]


def test_the_example_holds_no_value():
    lines = [line for line in EXAMPLE.read_text().splitlines() if line and not line.startswith("#")]
    assert lines == ["WANDB_API_KEY=", "WANDB_PROJECT="]


def test_an_untouched_example_is_as_good_as_none(tmp_path):
    """Copied and not filled in, its names are reported as missing and not taken for keys."""
    flow = Path(shutil.copy(FLOW, tmp_path))
    shutil.copy(EXAMPLE, tmp_path / ".env")
    run = tracked(
        tmp_path,
        None,
        "--offline",
        "False",
        url="http://127.0.0.1:9",
        flow=flow,
        WANDB_API_KEY=None,
        WANDB_PROJECT=None,
    )
    assert (
        run.code != 0 and "--offline False needs WANDB_API_KEY and WANDB_PROJECT" in run.output
    ), run.output
    assert "Traceback" not in run.output and not os.path.exists(tmp_path / "wandb")
