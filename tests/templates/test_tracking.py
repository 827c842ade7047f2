"""Tracking by W&B: the real client and a server on loopback that answers, hangs or dies."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path

import pytest
from flow_testing import FLOW, artifacts, cards, clean_environment, write_toy
from helpers.shell import give_to_nobody
from helpers.tracking import KEY, Done, tracked
from helpers.wandb_server import StandIn

NOBODY = "http://127.0.0.1:9"  # nothing listens there
SHORT = ("--epochs", "2")  # enough to be better than copying


@contextlib.contextmanager
def together(tmp_path_factory, cases):
    """Run the flow once for each case, {name: (mode of the stand-in, function)}.

    All run at the same time, as most of it is waiting.
    """
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(len(cases)) as pool:
        futures = {}
        for name, (mode, start) in cases.items():
            folder, server = tmp_path_factory.mktemp(name), stack.enter_context(StandIn(mode))
            futures[name] = pool.submit(start, folder, server)
        yield {name: future.result() for name, future in futures.items()}


def nobody(folder, server):
    """Run the flow as a user who may write only in this folder."""
    temporary = folder / "temporary"
    temporary.mkdir()
    before = give_to_nobody(folder)
    locked = folder / "locked"
    locked.mkdir(mode=0o555)
    return tracked(
        folder,
        server,
        before=before,
        flow=write_toy(folder),
        WANDB_DIR=str(locked),
        TMPDIR=str(temporary),
    )


SCRIPT = f"""
import json
from metaflow import Runner
with Runner({str(FLOW)!r}, pylint=False).run(offline=True, epochs=2) as running:
    print("SCORES", json.dumps(running.run["evaluate"].task.data.scores), running.run.successful)
"""


def script(folder, server):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=folder,
        text=True,
        encoding="utf-8",
        timeout=600,
        env={**clean_environment(folder), "OMP_NUM_THREADS": "1", "WANDB_BASE_URL": server.url},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    return Done(folder, done.returncode, done.stdout, server)


STRACE = ("strace", "-f", "--seccomp-bpf", "-e", "trace=connect,sendto,sendmsg", "-o")


def internet(trace):
    """The calls in a trace that leave the machine or use loopback: everything but Unix sockets."""
    return [line for line in trace.read_text(errors="replace").splitlines() if "AF_INET" in line]


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    def offline(folder, server):
        before = (*STRACE, str(folder / "trace")) if shutil.which("strace") else ()
        return tracked(
            folder,
            server,
            "--offline",
            "True",
            *SHORT,
            before=before,
            WANDB_API_KEY=None,
            WANDB_PROJECT=None,
        )

    def online(folder, server):
        return tracked(folder, server, "--offline", "False", *SHORT)

    def disabled(folder, server):
        return tracked(
            folder,
            server,
            "--offline",
            "False",
            flow=write_toy(folder),
            WANDB_MODE="disabled",
            WANDB_API_KEY=None,
            WANDB_PROJECT=None,
        )

    cases = {
        "offline": ("ok", offline),
        "online": ("ok", online),
        "disabled": ("ok", disabled),
        "script": ("ok", script),
    }
    if os.geteuid() == 0:
        cases["nobody"] = ("ok", nobody)
    with together(tmp_path_factory, cases) as runs:
        yield runs


def sync_lines(output):
    return re.findall(r"Upload what W&B is missing: wandb sync (.+?) *$", output, re.M)


def sync_folders(output):
    return [Path(line.split()[0]) for line in sync_lines(output)]


def test_offline_sends_nothing(good):
    run = good["offline"]
    assert run.code == 0 and "Traceback" not in run.output, run.output
    assert run.server.connections == 0 and run.output.count("W&B mode: offline") == 2
    assert len(sync_folders(run.output)) == 2
    for folder in sync_folders(run.output):
        assert (
            folder.is_dir()
            and folder.name.startswith("offline-run-")
            and folder.parent.parent == run.folder
        )
        assert list(folder.glob("*.wandb"))
        content = b"".join(file.read_bytes() for file in folder.rglob("*") if file.is_file())
        assert not re.search(rb"/None/|project.{0,9}None", content)


@pytest.mark.skipif(not shutil.which("strace"), reason="needs strace")
def test_offline_makes_no_connection(good, tmp_path):
    assert internet(good["offline"].folder / "trace") == []
    with StandIn() as server:  # the same trace sees one when there is one
        connect = (
            f"import socket; socket.create_connection(('127.0.0.1', {server.server.server_port}))"
        )
        subprocess.run(
            [*STRACE, str(tmp_path / "trace"), sys.executable, "-c", connect],
            check=True,
            timeout=400,
        )
    assert len(internet(tmp_path / "trace")) == 1


def by_step(server):
    """Return what the server has of the two steps: train, evaluate."""
    return sorted(server.runs.values(), key=lambda sent: sent["displayName"], reverse=True)


def test_everything_logged_arrives(good):
    run = good["online"]
    assert run.code == 0 and "Traceback" not in run.output, run.output
    found = artifacts(run.folder, "train")
    scores = artifacts(run.folder, "evaluate")["scores"]
    train, evaluate = by_step(run.server)
    assert [
        {"step": row["train/global_step"], "loss": row["train/loss"]}
        for row in train["history"]
        if "train/loss" in row
    ] == [{"step": row["step"], "loss": pytest.approx(row["loss"])} for row in found["losses"]]
    assert len(found["losses"]) >= 20
    assert train["config"]["examples"] == len(found["training"]) and train["config"]["epochs"] == 2
    assert train["summary"]["train/loss"] == pytest.approx(found["losses"][-1]["loss"])
    assert {name: evaluate["summary"][name] for name in scores} == pytest.approx(scores)
    assert train["exits"] == evaluate["exits"] == [0]
    for sent, step in ((train, "train"), (evaluate, "evaluate")):
        number = sent["config"]["run"]
        assert (
            sent["tags"] == ["TemplateFlow", number, step]
            and sent["displayName"] == f"{number}/{step}"
        )
        assert sent["groupName"] == f"TemplateFlow/{number}" and f"run-id {number}" in run.output
        assert sent["project"] == "project" and sent["config"]["resumed_from"] is None
        for name in (
            "config.yaml",
            "requirements.txt",
            "wandb-metadata.json",
            "wandb-summary.json",
        ):
            assert run.server.files[sent["name"], name]
    assert len(run.server.runs) == 2
    assert {key for _, path, key in run.server.requests if path == "/graphql"} == {KEY}


def test_the_url_is_in_the_log_and_in_the_card(good):
    run = good["online"]
    urls = re.findall(r"W&B mode: online, (\S+)", run.output)
    assert len(urls) == 2 and all(
        url.startswith(run.server.url + "/stand-in/project/runs/") for url in urls
    )
    assert {url.rsplit("/", 1)[1] for url in urls} == set(run.server.runs)
    assert any(urls[0] in card for card in cards(run.folder, "train"))


def test_disabled_needs_nothing_and_sends_nothing(good):
    run = good["disabled"]
    assert run.code == 0 and "Traceback" not in run.output, run.output
    assert run.output.count("W&B mode: disabled") == 2 and not sync_folders(run.output)
    assert run.server.connections == 0 and not (run.folder / "wandb").exists()


def test_a_script_gives_what_the_command_gives(good):
    run = good["script"]
    assert run.code == 0 and run.server.connections == 0, run.output
    scores, successful = re.search(r"SCORES (\{.*\}) (\w+)", run.output).groups()
    assert successful == "True"
    assert json.loads(scores) == artifacts(good["offline"].folder, "evaluate")["scores"]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become another user")
def test_unwritable_folder_is_said_and_the_real_one_named(good):
    run = good["nobody"]
    assert run.code == 0 and "Traceback" not in run.output, run.output
    used = sync_folders(run.output)
    assert [folder.is_relative_to(run.folder / "temporary") for folder in used] == [True, True]
    assert all(list(folder.glob("*.wandb")) for folder in used)
    assert run.output.count(f"{run.folder / 'locked'} wasn't read/writable") == 2
    assert run.output.count(f"Falling back to temporary directory {run.folder / 'temporary'}") == 2


FAILURES = {
    "refused": ("ok", NOBODY),
    "hangs": ("hang", None),
    "wrong key": (401, None),
    "dies": ("dies", None),
    "freezes": ("freezes", None),
}
MID_RUN = ("dies", "freezes")


@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    def case(name, url):
        def start(folder, server):
            options = ["--offline", "False"]
            if name in MID_RUN:  # it needs a training that lasts
                return tracked(folder, server, *options, *SHORT, url=url)
            toy = write_toy(folder)
            return tracked(folder, server, *options, flow=toy, url=url, TOY_SCORE="99")

        return start

    cases = {
        name.replace(" ", "_"): (mode, case(name, url)) for name, (mode, url) in FAILURES.items()
    }
    with together(tmp_path_factory, cases) as runs:
        yield runs


def waits(output, step):
    """The seconds of a step that W&B took: to begin, to finish, and until the task was over."""
    lines = re.findall(rf"^(\S+ \S+) \[\d+/{step}/\d+ \(pid \d+\)\] (.*)$", output, re.M)
    times = [datetime.fromisoformat(time).timestamp() for time, _ in lines]
    loaded, mode, sent, over = (
        next(i for i, (_, text) in enumerate(lines) if text.startswith(word))
        for word in ("wandb: [wandb.login()]", "W&B mode", "Upload what W&B", "Task finished")
    )
    worked = max(
        (i for i, (_, text) in enumerate(lines) if re.match("toy step|.*'train_runtime'", text)),
        default=mode,
    )
    return [
        round(times[b] - times[a], 1) for a, b in ((loaded, mode), (worked, sent), (sent, over))
    ]


@pytest.mark.slow
@pytest.mark.parametrize("failure", FAILURES)
def test_trouble_with_wandb_is_bounded_and_costs_no_result(failure, good, bad, record_property):
    run = bad[failure.replace(" ", "_")]
    assert run.code == 0 and "Traceback" not in run.output and "40 characters" not in run.output, (
        run.output
    )
    found = {step: waits(run.output, step) for step in ("train", "evaluate")}
    print(failure, found)
    for step, seconds in found.items():
        record_property(f"{failure} {step}", seconds)
        usual = sum(waits(good["online"].output, step))  # on this machine, at this time
        assert sum(seconds) < 60 + 3 * usual, (step, seconds, usual)
    lines = re.findall(r"W&B cannot be used, continuing offline: (.*)", run.output)
    assert len(lines) == (
        1 if failure in MID_RUN else 2
    )  # in the middle of a run the client itself says it
    reasons = {"refused": "connection refused", "hangs": "deadline exceeded", "wrong key": "401"}
    assert all(reasons.get(failure, "TemplateFlow-") in line for line in lines), lines
    if failure in MID_RUN:
        assert run.output.count("wandb: WARNING Timed out finishing run") == 1
    assert artifacts(run.folder, "evaluate")["scores"]["chrf"] > 50
    assert "held-out scores:" in run.output


@pytest.mark.slow
@pytest.mark.parametrize("failure", FAILURES)
def test_what_was_kept_can_be_sent_later(failure, bad):
    run = bad[failure.replace(" ", "_")]
    folders, lines = sync_folders(run.output), sync_lines(run.output)
    assert len(folders) == 2 and all(
        folder.is_dir() and folder.name != "files" for folder in folders
    )
    losses = artifacts(run.folder, "train")["losses"]
    with StandIn() as server:
        for line in lines:
            done = subprocess.run(
                [str(Path(sys.executable).with_name("wandb")), "sync", *line.split()],
                timeout=400,
                cwd=run.folder,
                env={
                    **os.environ,
                    "WANDB_BASE_URL": server.url,
                    "WANDB_API_KEY": KEY,
                    "HOME": str(run.folder),
                },
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
            assert done.returncode == 0, done.stdout
        train, evaluate = by_step(server)
    name = "train/loss" if failure in MID_RUN else "loss"  # as the toy calls it
    sent = [row[name] for row in train["history"] if name in row]
    assert sent == pytest.approx([row["loss"] for row in losses]) and train["project"] == "project"
    assert evaluate["summary"]["chrf"] == pytest.approx(
        artifacts(run.folder, "evaluate")["scores"]["chrf"]
    )


@pytest.mark.slow
def test_a_failing_step_is_marked_once_and_resume_names_its_origin(tmp_path):
    line = '            log({**numbers, "train/global_step": state.global_step})\n'
    source = FLOW.read_text()
    assert source.count(line) == 1
    copy = tmp_path / FLOW.name
    copy.write_text(
        source.replace(line, line + '            log({"mine": 1.0}); raise ValueError("boom-42")\n')
    )
    with StandIn() as server:
        broken = tracked(tmp_path, server, "--offline", "False", *SHORT, flow=copy)
        assert broken.code != 0 and "ValueError: boom-42" in broken.output, broken.output
        (first,) = server.runs.values()
        assert first["exits"] == [1] and first["summary"]["mine"] == 1.0
        assert broken.output.count("Traceback") == 1
        copy.write_text(source)
        resumed = tracked(tmp_path, server, flow=copy, command="resume")
    assert resumed.code == 0, resumed.output
    origin = first["config"]["run"]
    again = [run for run in server.runs.values() if run["config"]["run"] != origin]
    assert [run["config"]["resumed_from"] for run in again] == [origin] * 2  # train and evaluate
    assert [run["exits"] for run in again] == [[0]] * 2 and first["exits"] == [1]
