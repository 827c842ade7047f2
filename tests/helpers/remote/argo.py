"""Run a compiled flow as Argo Workflows does: its containers, in the order of the graph."""

import base64
import graphlib
import re
import subprocess
import tempfile
import threading
from pathlib import Path

from helpers.remote.pods import docker


def filler(values):
    """Return a function that replaces {{name}} by its value; an unknown name is an error."""

    def value(match):
        name = match[1].strip()
        coded = re.fullmatch(r"=toBase64\(workflow\.parameters\['(.+)'\]\)", name)
        if coded:
            return base64.b64encode(values[f"workflow.parameters.{coded[1]}"].encode()).decode()
        return values[name]

    return lambda text: re.sub(r"{{(.+?)}}", value, text)


def attempt(cluster, container, name, fill, outputs, kill, limit):
    """Run one container to its end; return (exit code, its log).

    It is killed at a line for which `kill` is true.
    """
    command = cluster.command(container, name, fill, ["--rm", f"--volume={outputs}:/mnt/out"])
    process = subprocess.Popen(
        ["docker", *command],
        text=True,
        encoding="utf-8",
        errors="replace",
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    guard, log = threading.Timer(limit, docker, ("kill", name)), []
    guard.start()
    try:
        for line in process.stdout:
            log.append(line)
            if kill and kill(line):
                docker("kill", name)
        return process.wait(400), "".join(log)
    finally:
        guard.cancel()
        process.kill()
        docker("rm", "--force", name)


def submit(manifest, cluster, run, kill=None, limit=200, **parameters):
    """Run a whole flow as argo-<run>; return {step: (task id, [(exit code, log), ...])}.

    `kill` is for `train`.
    """
    spec, done = manifest["spec"], {}
    templates = {template["name"]: template for template in spec["templates"]}
    tasks = {task["name"]: task for task in templates[spec["entrypoint"]]["dag"]["tasks"]}
    defaults = spec["arguments"]["parameters"]
    given = {default["name"]: default["value"] for default in defaults} | parameters
    values = {"workflow.name": run, "workflow.creationTimestamp": "2026-01-01T00:00:00Z"}
    values |= {f"workflow.parameters.{name}": value for name, value in given.items()}
    before = {
        name: re.findall(r"([\w-]+)\.Succeeded", task.get("depends") or "")
        for name, task in tasks.items()
    }
    for step in graphlib.TopologicalSorter(before).static_order():
        template, fill, attempts = templates[tasks[step]["template"]], filler(values), []
        inputs = {
            f"inputs.parameters.{parameter['name']}": fill(parameter["value"])
            for parameter in tasks[step]["arguments"]["parameters"]
        }
        for number in range(1 + int((template.get("retryStrategy") or {}).get("limit") or 0)):
            with tempfile.TemporaryDirectory() as outputs:
                Path(outputs).chmod(0o777)  # as an emptyDir is: the step is not root
                attempts.append(
                    attempt(
                        cluster,
                        template["container"],
                        f"{run}-{step}-{number}",
                        filler(values | inputs | {"retries": str(number)}),
                        outputs,
                        kill if step == "train" and number == 0 else None,
                        limit,
                    )
                )
                if attempts[-1][0] == 0:
                    values[f"tasks.{step}.outputs.parameters.task-id"] = (
                        Path(outputs, "task_id").read_text().strip()
                    )
                    break
        else:
            raise AssertionError(f"step {step} failed:\n{attempts[-1][1][-6000:]}")
        done[step] = values[f"tasks.{step}.outputs.parameters.task-id"], attempts
    return done
