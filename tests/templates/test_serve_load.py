"""The server under load: a bounded queue, timeouts, health, memory, updates."""

import http.client
import json
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import yaml
from helpers.app import sizes, with_code_in_call
from helpers.load import Load
from helpers.repository import TEMPLATES
from serve_testing import Server
from tiny_translator import PAIRS, make_model

pytestmark = pytest.mark.slow

# What a model might do: here "wait 2" in a text takes 2 seconds, and BOOM-1 fails.
CODE = """
import os, re, time
texts = [self.tokenizer.decode(sentence.tokens) for sentence in sentences]
with open("{seen}", "a") as log:
    print(os.getpid(), torch.get_num_threads(), texts, file=log)
if any("BOOM-1" in text for text in texts):
    raise ValueError("a fault")
waits = [float(found) for text in texts for found in re.findall("wait ([0-9.]+)", text)]
time.sleep(max(waits, default=0))
"""


def slow_app(folder):
    """Write the app as it is, but for CODE."""
    code = CODE.replace("{seen}", str(folder / "seen.txt"))
    (folder / "template_ray_serve.py").write_text(with_code_in_call(code), "utf-8")
    make_model(folder / "model", PAIRS)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The shipped config, with two threads and a queue of 6 sentences."""
    folder = tmp_path_factory.mktemp("load")
    slow_app(folder)
    config = yaml.safe_load((TEMPLATES / "serve_config.yaml").read_text())
    (application,) = config["applications"]
    application["args"] = {"max_queue": 6, "max_new_tokens": 32}
    application["deployments"][0]["autoscaling_config"]["max_replicas"] = 1
    application["deployments"][0]["ray_actor_options"]["num_cpus"] = 2
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    with Server(folder, "run", "config.yaml", cpus=4, dashboard=True) as running:
        running.folder = folder
        yield running.wait()


def timed(server, *arguments, **keywords):
    begin = time.monotonic()
    status, answer = server.ask(*arguments, **keywords)
    return status, answer, time.monotonic() - begin


def serves(server):
    assert server.ask(body={"text": "Hello world!"}) == (200, {"translation": "Bonjour le monde !"})


def seen(server):
    """What the model has worked on: a line a batch, with the process, its threads and the texts."""
    return (server.folder / "seen.txt").read_text()


def in_background(server, text):
    """Ask from another thread; the model is busy with it on return."""
    before, end, pool = seen(server).count(text), time.monotonic() + 400, ThreadPoolExecutor(1)
    job = pool.submit(timed, server, body={"text": text})
    while seen(server).count(text) == before and time.monotonic() < end:
        time.sleep(0.05)
    pool.shutdown(wait=False)
    return job


def replicas(server):
    return {int(line.split()[0]) for line in seen(server).splitlines()}


def test_threads_are_the_cpus_of_the_replica(server):
    serves(server)
    assert {line.split()[1] for line in seen(server).splitlines()} == {"2"}


def test_health_is_answered_at_once_while_the_model_is_busy(server):
    job, slowest = in_background(server, "wait 3"), 0
    while not job.done():
        for path in ("/-/healthz", "/-/routes", "/translate/health", "/translate"):
            status, _, seconds = timed(server, path, method="GET")
            assert status == 200
            slowest = max(slowest, seconds)
    print(f"slowest health answer: {slowest:.3f} s")
    assert job.result()[0] == 200 and slowest < 1
    assert len(replicas(server)) == 1


def test_a_full_queue_refuses_at_once_and_says_when_to_come_again(server):
    job = in_background(server, "wait 4")
    gate = threading.Barrier(100)

    def ask(_):
        gate.wait()
        return timed(server, body={"text": "Thank you."})

    with ThreadPoolExecutor(100) as pool:
        answers = list(pool.map(ask, range(100)))
    accepted = [answer for answer in answers if answer[0] == 200]
    refused = [answer for answer in answers if answer[0] == 503]
    slowest = max(seconds for _, _, seconds in refused)
    print(f"accepted {len(accepted)}, refused {len(refused)}, slowest refusal {slowest:.2f} s")
    assert len(accepted) + len(refused) == 100 and len(accepted) == 6
    assert all(answer[1] == {"translation": "Merci."} for answer in accepted)
    assert all(answer[1]["error"]["code"] == 503 for answer in refused)
    assert slowest < 1.5  # 100 clients and the server share two CPUs here
    assert job.result()[0] == 200
    line = in_background(server, "wait 4")
    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    connection.request(
        "POST",
        "/translate",
        json.dumps({"text": ["one"] * 6}),
        {"Content-Type": "application/json"},
    )
    time.sleep(1)
    other = http.client.HTTPConnection("127.0.0.1", server.port)
    other.request(
        "POST",
        "/translate",
        json.dumps({"text": ["two"] * 6}),
        {"Content-Type": "application/json"},
    )
    reply = other.getresponse()
    assert (reply.status, reply.getheader("Retry-After")) == (503, "1")
    other.close()
    status, answer = server.ask(body={"text": ["three"] * 7})
    message = "The request has 7 inputs; the limit is 6."
    assert (status, answer["error"]["message"]) == (413, message)
    connection.close()
    time.sleep(1)  # its six have left with it, while the model is still busy
    assert not line.done() and server.ask(body={"text": ["Good morning"] * 6}) == (
        200,
        {"translation": ["Bonjour"] * 6},
    )
    assert line.result()[0] == 200
    serves(server)


def test_a_client_that_leaves_is_skipped(server):
    job = in_background(server, "wait 2")
    assert server.ask(body={"text": "skip-two please"}, timeout=0.5)[0] == 0
    assert job.result()[0] == 200
    serves(server)
    assert "skip-two" not in seen(server)


def test_a_text_that_fails_harms_no_other_in_its_batch(server):
    job = in_background(server, "wait 1")
    texts = [
        "Good morning",
        "Thank you.",
        "BOOM-1",
        "The cat sleeps.",
        "I like tea.",
        "Good morning",
    ]
    with ThreadPoolExecutor(len(texts)) as pool:
        answers = list(pool.map(lambda text: server.ask(body={"text": text}), texts))
    assert job.result()[0] == 200
    for text, (status, answer) in zip(texts, answers, strict=True):
        if text == "BOOM-1":
            assert status == 500 and answer == {
                "error": {"code": 500, "message": "The model failed on this request: ValueError."}
            }
        else:
            assert (status, answer) == (200, {"translation": PAIRS[text]})
    serves(server)


def test_metrics_tell_of_batches_and_keep_routes_few(server):
    for number in range(50):
        assert server.ask(f"/translate/aaa{number}", method="GET")[0] == 404
    serves(server)  # no histogram of batches before there was one
    end, text = time.monotonic() + 400, ""
    while time.monotonic() < end and not (
        "translator_batch_size_bucket" in text and "serve_num_http" in text
    ):
        time.sleep(1)
        text = server.metrics()
    assert "translator_batch_size_bucket" in text and "translator_input_size" in text
    assert len(set(re.findall(r'route="([^"]*)"', text))) <= 6 and "aaa1" not in text


def test_memory_stays_flat_and_every_answer_is_right(server):
    def some(count):
        texts = list(PAIRS)
        with ThreadPoolExecutor(6) as pool:
            answers = list(
                pool.map(lambda i: server.ask(body={"text": texts[i % len(texts)]}), range(count))
            )
        assert answers == [
            (200, {"translation": PAIRS[texts[i % len(texts)]]}) for i in range(count)
        ]

    some(300)
    before, begin = sizes(server), time.monotonic()
    some(2000)
    print(
        f"{2000 / (time.monotonic() - begin):.0f} requests/s with 6 clients;", before, sizes(server)
    )
    assert len(before) == 2 and all(
        size - before[name] < 50 for name, size in sizes(server).items()
    )
    assert len(replicas(server)) == 1


def deploy(server, **arguments):
    """Deploy the config with other arguments; wait until only the new replica is left."""
    config = yaml.safe_load((server.folder / "config.yaml").read_text())
    config["applications"][0]["args"].update(arguments)
    (server.folder / "new.yaml").write_text(yaml.safe_dump(config))
    subprocess.run(
        [
            sys.executable,
            "-m",
            "ray.serve.scripts",
            "deploy",
            "new.yaml",
            "-a",
            f"http://127.0.0.1:{server.dashboard}",
        ],
        cwd=server.folder,
        env=server.environment,
        check=True,
        timeout=400,
        capture_output=True,
    )
    end = time.monotonic() + 400
    for number in (2, 1):
        while len(server.processes("ServeReplica")) != number and time.monotonic() < end:
            time.sleep(0.2)
    assert time.monotonic() < end


def test_an_update_under_load_loses_no_request(server):
    """The new replica starts beside the old one, which ends when its last request is answered."""
    old = replicas(server)
    job = in_background(server, "wait 3")
    with Load(server.port, clients=3, pause=0.05) as load:
        deploy(server, max_queue=7)
    assert job.result()[0] == 200
    print(f"{len(load.answers)} requests during the update")
    assert len(load.answers) > 20 and not load.lost() and not load.wrong()
    assert replicas(server) - old


def test_a_timeout_answers_504_and_what_waited_never_reaches_the_model(server):
    deploy(server, timeout_s=4)
    status, answer, seconds = timed(server, body={"text": "wait 6"})
    assert status == 504 and "4 seconds" in answer["error"]["message"] and 3.5 < seconds < 6
    assert server.ask(body={"text": "Good morning"}) == (
        200,
        {"translation": "Bonjour"},
    )  # when these 6 s are over
    job = in_background(server, "wait 6")
    assert timed(server, body={"text": "skip-one please"})[0] == 504
    assert job.result()[0] == 504
    serves(server)
    assert "skip-one" not in seen(server)
