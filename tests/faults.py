"""Break the server and the flow on purpose, count what is lost, and write docs/reliability.md: `make faults`.

    python tests/faults.py [--times 10] [--seconds 300] [--only NAME ...]

Every answer is compared with the right one. Half of the clients take the first answer as it is, the other half try
again as docs/serve.md says. Everything runs on this machine, on loopback, and ends with it.
"""

import argparse
import collections
import os
import platform
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import urllib3
import yaml

HERE = Path(__file__).parent
TEMPLATES = HERE.parent / "templates"
sys.path[:0] = [str(HERE), str(TEMPLATES)]

from test_serve_nodes import Cluster, node  # noqa: E402
from test_template_flow import FLOW, artifacts, clean_environment  # noqa: E402
from test_template_ray_serve import PAIRS, Server, make_model  # noqa: E402

PAGE = HERE.parent / "docs/reliability.md"
# docs/serve.md, "A client that tries again": a translation can be asked for twice without harm.
RETRY = urllib3.Retry(8, backoff_factor=0.2, status_forcelist=[500, 502, 503, 504], allowed_methods=None,
                      raise_on_status=False)


class Load:
    """Clients that ask all the time, every other one tries again. `answers`: (begin, end, again, status, right)."""
    def __init__(self, port, clients=8):
        self.url, self.answers, self.over = f"http://127.0.0.1:{port}/translate", [], threading.Event()
        self.threads = [threading.Thread(target=self.ask, args=[bool(number % 2)]) for number in range(clients)]

    def __enter__(self):
        for each in self.threads:
            each.start()
        return self

    def __exit__(self, *_):
        self.over.set()
        for each in self.threads:
            each.join(100)

    def ask(self, again):
        texts = list(PAIRS)
        random.shuffle(texts)
        with urllib3.PoolManager(retries=RETRY if again else False, timeout=30) as pool:
            while not self.over.is_set():
                for text in texts:
                    begin = time.monotonic()
                    try:
                        reply = pool.request("POST", self.url, json={"text": text})
                        status = reply.status
                        right = status == 200 and reply.json() == {"translation": PAIRS[text]}
                    except (urllib3.exceptions.HTTPError, ValueError):
                        status, right = 0, False
                    self.answers.append((begin, time.monotonic(), again, status, right))
                    if status != 200:
                        time.sleep(0.1)

    def since(self, at):
        """(in flight at that time, lost by those who ask once, by those who try again, wrong, seconds to recover)."""
        later = [each for each in self.answers if each[1] > at]
        lost = [each for each in later if each[3] != 200]
        wrong, recovered = [each for each in later if each[3] == 200 and not each[4]], [each[1] - at for each in lost]
        again = sum(each[2] for each in lost)
        return sum(each[0] < at for each in later), len(lost) - again, again, len(wrong), max(recovered, default=0.0)


def make_app(folder, replicas=2, **more):
    """The server's files, with the config in use and a model that knows the pairs; the path of the config."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(TEMPLATES / "template_ray_serve.py", folder)
    if not (folder / "model").exists():
        make_model(folder / "model", PAIRS)
    config = yaml.safe_load((TEMPLATES / "serve_config.yaml").read_text())
    deployment = config["applications"][0]["deployments"][0]
    del deployment["autoscaling_config"]
    deployment.update({"num_replicas": replicas, **more})
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder / "config.yaml"


def deploy(server, config, wait=True):
    """Ask the running server for another config, by the documented command; its exit code."""
    done = subprocess.run([sys.executable, TEMPLATES / "check_serve_config.py", config, "--deploy",
                           f"http://127.0.0.1:{server.dashboard}"], cwd=server.folder, env=server.environment,
                          capture_output=True, timeout=200)
    return done.returncode


def kill(part):
    """A fault: kill -9 of one process whose command line has this part."""
    def fault(server, number):
        random.choice(list(server.processes(part))).kill()
    return fault


def leave_at_once(server, number):
    """200 clients send a request, and close before there is an answer."""
    import socket

    body = b'{"text": "Thank you."}'
    head = b"POST /translate HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    lines = [socket.create_connection(("127.0.0.1", server.port), timeout=10) for _ in range(200)]
    for line in lines:
        line.sendall(head % len(body) + body)
    for line in lines:
        line.close()


def redeploy(server, number):
    """A change that needs new replicas; they start before the old ones end."""
    config = yaml.safe_load((server.folder / "config.yaml").read_text())
    config["applications"][0]["args"]["max_queue"] = 300 + number
    (server.folder / "next.yaml").write_text(yaml.safe_dump(config))
    assert deploy(server, server.folder / "next.yaml") == 0


def broken_model(server, number):
    """An update to a model with one bit turned: it must be refused, and what runs must go on."""
    broken = server.folder / f"broken{number}"
    shutil.copytree(server.folder / "model", broken)
    weights = bytearray((broken / "model.safetensors").read_bytes())
    weights[len(weights) // 2 + 3] ^= 0x40
    (broken / "model.safetensors").write_bytes(weights)
    config = yaml.safe_load((server.folder / "config.yaml").read_text())
    config["applications"][0]["args"]["model"] = str(broken)
    (server.folder / "next.yaml").write_text(yaml.safe_dump(config))
    assert deploy(server, server.folder / "next.yaml") == 1
    assert deploy(server, server.folder / "config.yaml") == 0


def lose_node(server, number):
    """A machine with one of three replicas: its raylet and all that runs on it."""
    head = {node(each) for each in server.processes("ProxyActor")}
    lost = next(raylet for raylet in map(node, server.processes("ServeReplica")) if raylet not in head)
    for each in [lost, *lost.children(recursive=True)]:
        each.kill()


SERVE = {
    "replica killed": kill("ServeReplica"),
    "proxy killed": kill("ProxyActor"),
    "controller killed": kill("ServeController"),
    "200 clients leave at once": leave_at_once,
    "new config deployed": redeploy,
    "broken model deployed": broken_model,
}


def settled(server, replicas, seconds=60):
    """Wait until all replicas are back and a request is answered."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if len(server.processes("ServeReplica")) == replicas and server.ask(
                body={"text": "Thank you."}, timeout=5) == (200, {"translation": "Merci."}):
            return
        time.sleep(0.3)
    raise AssertionError(f"not itself again after {seconds} s:\n{server.log.read_text()[-3000:]}")


def row(name, results):
    """A line of the table out of the tuples that Load.since gives."""
    flying, once, again, wrong, recovery = zip(*results)
    return name, len(results), sum(flying), sum(once), sum(again), sum(wrong), f"{max(recovery):.1f}"


def serve_faults(folder, names, times, pause=4):
    config = make_app(folder)
    image = (TEMPLATES / "Dockerfile-rayserve").read_text()
    checked = dict(re.findall(r"(RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S)=(\S+)", image))
    if wanted := [name for name in SERVE if name in names]:
        with Server(folder, "run", config.name, cpus=4, dashboard=True, **checked) as server:
            server.folder = folder
            server.wait()
            settled(server, 2)
            for name in wanted:
                results = []
                for number in range(times):
                    with Load(server.port) as load:
                        time.sleep(1.5)
                        at = time.monotonic()
                        SERVE[name](server, number)
                        time.sleep(pause)
                        settled(server, 2)
                    results.append(load.since(at))
                yield row(name, results)
    if "node lost" in names:
        results = []
        for number in range(times):
            make_app(folder, replicas=3, max_replicas_per_node=1)
            with Cluster(folder, "run", "config.yaml") as server:
                server.wait()
                settled(server, 3)
                with Load(server.port) as load:
                    time.sleep(1.5)
                    at = time.monotonic()
                    lose_node(server, number)
                    time.sleep(pause + 8)  # until Ray has seen it
                results.append(load.since(at))
        yield row("node lost", results)


def flow(folder, *arguments, command="run", **options):
    """The flow as a process of its own, in a session of its own."""
    return subprocess.Popen([sys.executable, str(FLOW), "--no-pylint", command, *arguments], cwd=folder, text=True,
                            env=clean_environment(folder), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            start_new_session=True, **options)


def model_of(folder):
    return artifacts(folder, "train")["model"]["model.safetensors"]


EPOCHS = ("--epochs", "8")


def resumed(folder, right, seconds):
    """Resume what was broken off; (in flight, lost, wrong, seconds)."""
    begin = time.monotonic()
    again = flow(folder, command="resume")
    output = again.communicate(timeout=200)[0]
    if again.returncode:  # killed before there was anything to resume
        again = flow(folder, *EPOCHS)
        output = again.communicate(timeout=200)[0]
    assert again.returncode == 0, output
    return 1, 0, 0, int(model_of(folder) != right), time.monotonic() - begin


def kill_task(folder, right, seconds):
    """kill -9 of the training task, some time between its start and its end."""
    running = flow(folder, *EPOCHS)
    time.sleep(random.uniform(1, seconds))
    for each in psutil.Process(running.pid).children(recursive=True):
        if " train " in " ".join(each.cmdline()):
            each.kill()
            break
    running.communicate(timeout=200)
    if running.returncode == 0:  # it had finished
        return 1, 0, 0, int(model_of(folder) != right), 0.0
    return resumed(folder, right, seconds)


def kill_flow(folder, right, seconds):
    """kill -9 of the whole flow, at any time."""
    running = flow(folder, *EPOCHS)
    time.sleep(random.uniform(1, seconds))
    with_children = [psutil.Process(running.pid), *psutil.Process(running.pid).children(recursive=True)]
    for each in with_children:
        each.kill()
    running.communicate(timeout=60)
    return resumed(folder, right, seconds)


def two_at_once(folder, right, seconds):
    """Two runs in one folder."""
    begin = time.monotonic()
    both = [flow(folder, *EPOCHS) for _ in range(2)]
    outputs = [each.communicate(timeout=300)[0] for each in both]
    lost = sum(each.returncode != 0 for each in both)
    assert lost or "Done!" in outputs[0]
    return 2, lost, lost, int(model_of(folder) != right), time.monotonic() - begin


def export_interrupted(folder, right, seconds):
    """kill -9 of an export that replaces a model, again and again: there is the old model, or the new one, whole."""
    if not (folder / "model").exists():
        assert flow(folder, *EPOCHS).wait(200) == 0
    shutil.copy(TEMPLATES / "export_model.py", folder)
    command = [sys.executable, "export_model.py", "--replace"]
    subprocess.run(command, cwd=folder, env=clean_environment(folder), check=True, capture_output=True, timeout=100)
    begin = time.monotonic()
    running = subprocess.Popen(command, cwd=folder, env=clean_environment(folder), stdout=subprocess.DEVNULL)
    time.sleep(random.uniform(0.3, 2.5))
    running.kill()
    running.wait(10)
    whole = all((folder / "model" / name).exists() for name in ("model.safetensors", "known_answers.json", "README.md"))
    wrong = not whole or (folder / "model/model.safetensors").read_bytes() != right
    return 1, 0, 0, int(wrong), time.monotonic() - begin


TRAIN = {"training killed, then resume": kill_task, "flow killed, then resume": kill_flow,
         "two runs at once": two_at_once, "export killed": export_interrupted}


def train_faults(folder, names, times):
    if not (wanted := [name for name in TRAIN if name in names]):
        return
    folder.mkdir()
    (folder / "right").mkdir()
    begin = time.monotonic()
    undisturbed = flow(folder / "right", *EPOCHS)
    output = undisturbed.communicate(timeout=200)[0]
    assert undisturbed.returncode == 0, output
    right, seconds = model_of(folder / "right"), time.monotonic() - begin
    for name in wanted:
        results = []
        for number in range(times):
            place = folder / "export" if name == "export killed" else folder / f"{list(TRAIN).index(name)}-{number}"
            place.mkdir(exist_ok=True)
            results.append(TRAIN[name](place, right, seconds))
        yield row(name, results)


def arrivals(folder, names, seconds):
    """Open loop: requests come by chance, as many a second as a part of what the server can do."""
    wanted = [name for name in RATES if name in names]
    if not wanted:
        return
    config = make_app(folder, replicas=1)
    with Server(folder, "run", config.name, cpus=2) as server:
        server.wait()
        with Load(server.port, clients=32) as load:
            time.sleep(4)
            at = time.monotonic()
            time.sleep(6)
        capacity = sum(each[0] > at and each[4] for each in load.answers) / 6
        for name in wanted:
            yield name, *arrive(server, capacity * RATES[name], seconds)


RATES = {f"load of {percent} %": percent / 100 for percent in (50, 80, 100, 150)}


def arrive(server, rate, seconds):
    """(requests/s, requests, p50 ms, p99 ms, refused, lost, wrong)."""
    texts, found, chance = list(PAIRS), [], random.Random(0)
    pool = urllib3.PoolManager(retries=False, timeout=30, maxsize=400, block=False)

    def one(text):
        begin = time.monotonic()
        try:
            reply = pool.request("POST", f"http://127.0.0.1:{server.port}/translate", json={"text": text})
            right = reply.status == 200 and reply.json() == {"translation": PAIRS[text]}
            found.append((time.monotonic() - begin, reply.status, right))
        except (urllib3.exceptions.HTTPError, ValueError):
            found.append((time.monotonic() - begin, 0, False))

    with ThreadPoolExecutor(400) as threads:
        end = time.monotonic() + seconds
        at = time.monotonic()
        while at < end:
            at += chance.expovariate(rate)
            time.sleep(max(0, at - time.monotonic()))
            threads.submit(one, random.choice(texts))
    times = sorted(took for took, status, _ in found if status == 200)
    statuses = collections.Counter(status for _, status, _ in found)
    p50, p99 = (f"{1000 * times[int(len(times) * part)]:.0f}" for part in (0.5, 0.99))
    wrong = sum(status == 200 and not right for _, status, right in found)
    return f"{rate:.0f}", len(found), p50, p99, statuses[503], len(found) - statuses[200] - statuses[503], wrong


NAMES = [*RATES, *SERVE, "node lost", *TRAIN]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=10, help="how often each fault is tried")
    parser.add_argument("--seconds", type=float, default=300, help="of each load")
    parser.add_argument("--only", nargs="*", default=NAMES, choices=NAMES, metavar="NAME")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("faults.py: told to end"))
    os.environ["OMP_NUM_THREADS"] = "1"
    folder = Path(tempfile.mkdtemp(prefix="faults.", dir="/tmp"))  # short: Ray puts sockets there
    loads, faults = [], []
    try:
        for each in arrivals(folder / "load", arguments.only, arguments.seconds):
            print(*each, sep=", ", flush=True)
            loads.append(each)
        for each in (*serve_faults(folder / "serve", arguments.only, arguments.times),
                     *train_faults(folder / "train", arguments.only, arguments.times)):
            print(*each, sep=", ", flush=True)
            faults.append(each)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(f"on {os.cpu_count()} CPUs, Python {platform.python_version()}")
    if arguments.only == NAMES:
        write({"load": (LOAD_HEADS, loads), "faults": (FAULT_HEADS, faults)}, arguments)


LOAD_HEADS = ["arrivals", "requests/s", "requests", "p50 ms", "p99 ms", "refused (503)", "lost", "wrong"]
FAULT_HEADS = ["fault", "times", "in flight", "lost", "lost with retry", "wrong", "recovered after s"]


def write(tables, arguments):
    """Put the tables between their marks in the page."""
    text = PAGE.read_text("utf-8")
    for name, (heads, rows) in tables.items():
        lines = [f"| {' | '.join(map(str, each))} |" for each in (heads, ["---"] * len(heads), *rows)]
        text = re.sub(rf"(<!-- {name} -->\n).*?(<!-- end -->)", lambda found: "\n".join(  # noqa: B023
            [found[1], *lines, found[2]]).replace("\n\n|", "\n|"), text, flags=re.DOTALL)  # noqa: B023
    PAGE.write_text(text, "utf-8")
    print(f"written to {PAGE}: each fault {arguments.times} times, each load {arguments.seconds:g} s")


if __name__ == "__main__":
    main()
