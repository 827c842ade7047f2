# export_model.py, version 0.1.0
"""Write the model of the latest successful run of template_flow.py to `model/`, ready to serve.

    python export_model.py                      your latest run
    python export_model.py --run 1234           that run
    python export_model.py --namespace ""       anybody's latest run; or "user:NAME",
                                                "production:TOKEN"

The folder appears complete or not at all. An existing one stays unless --replace is given.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

FLOW = "TemplateFlow"


def fail(reason):
    """End with one line."""
    sys.exit(f"export_model.py: {reason}")


def find_run(run_id, namespace):
    """Return the Metaflow run, by default the latest successful one."""
    import metaflow
    from metaflow.exception import (
        MetaflowInternalError,
        MetaflowNamespaceMismatch,
        MetaflowNotFound,
    )

    if namespace is not None:
        metaflow.namespace(namespace or None)
    wanted = f"run {run_id} of {FLOW}" if run_id else f"successful run of {FLOW}"
    try:
        if run_id:
            run = metaflow.Run(f"{FLOW}/{run_id}")
        else:
            run = metaflow.Flow(FLOW).latest_successful_run
    except (MetaflowNotFound, MetaflowInternalError):
        run = None
    except MetaflowNamespaceMismatch:
        here = metaflow.get_namespace()
        fail(f'no {wanted} in the namespace {here}; add --namespace "" to look everywhere')
    if run is None:
        fail(f"no {wanted}; run `python template_flow.py run` first, in this folder")
    if not run.successful:
        fail(f"run {run.id} of {FLOW} has not succeeded; choose another one, or `resume` it")
    return run


def artifact(task, name):
    """Return an artifact of a task."""
    if name not in task.data:
        fail(f"{task.pathspec} has no artifact `{name}`; a step of {FLOW} has to set it")
    return getattr(task.data, name)


def parameters(run):
    """Return {name: value} of the parameters of a run."""
    described = run["start"].task["_graph_info"].data["parameters"]
    values = run["_parameters"].task.data
    names = [item["name"] for item in described if item["type"] == "Parameter"]
    return {name: getattr(values, name) for name in sorted(names)}


def readme(run, task):
    """Return the text that tells where the model comes from."""
    tags = dict(tag.partition(":")[::2] for tag in run.system_tags)  # "python_version:3.11.7"
    config = json.loads(artifact(task, "model").get("config.json", b"{}"))
    facts = {"finished": run.finished_at.isoformat(" ", "seconds")}
    facts["examples"] = artifact(task, "examples_used")
    for name, score in artifact(task, "scores").items():
        facts[name] = f"{score:#.4g}"
    for name, value in parameters(run).items():
        facts[name] = repr(value)
    for name in ("metaflow_version", "python_version"):
        if name in tags:
            facts[name] = tags[name]
    if "transformers_version" in config:
        facts["transformers_version"] = config["transformers_version"]
    lines = [f"- {name}: {value}" for name, value in facts.items()]
    end = "The server gives each answer in `known_answers.json` again before it serves."
    return "\n".join([f"# Model of run {run.pathspec}", "", *lines, "", end, ""])


def write_model(run, folder):
    """Write the files of the model, its known answers and its README into an empty folder."""
    task = run.end_task  # it has the artifacts of the steps before
    for name, content in artifact(task, "model").items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    answers = [
        {"request": request, "answer": answer}
        for request, answer in artifact(task, "known_answers")
    ]
    text = json.dumps(answers, ensure_ascii=False, indent=1)
    (folder / "known_answers.json").write_text(text, "utf-8")
    (folder / "README.md").write_text(readme(run, task), "utf-8")


def export(run, folder, replace):
    """Write the model beside `folder`, then rename it into place."""
    if folder.exists() and not replace:
        fail(f"{folder} is there already; --replace overwrites it, --output writes elsewhere")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        new = Path(scratch, "new")
        old = Path(scratch, "old")
        new.mkdir()
        write_model(run, new)
        if folder.exists():
            os.replace(folder, old)
        try:
            os.replace(new, folder)
        except OSError:
            if old.exists():
                shutil.move(old, folder)
            raise


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    here = Path(__file__).with_name("model")
    parser.add_argument("--run", help="id of the run")
    parser.add_argument("--namespace", help='Metaflow namespace to look in; "" is everybody\'s')
    parser.add_argument(
        "--output", type=Path, default=here, help="default: model/ beside this file"
    )
    parser.add_argument("--replace", action="store_true", help="overwrite the folder")
    arguments = parser.parse_args()
    from metaflow.exception import MetaflowException

    try:
        run = find_run(arguments.run, arguments.namespace)
        export(run, arguments.output, arguments.replace)
    except MetaflowException as error:
        fail(error.message)
    except OSError as error:
        fail(f"cannot write {arguments.output}: {error.strerror}")
    print(f"{os.path.relpath(arguments.output)}: the model of run {run.pathspec}")


if __name__ == "__main__":
    main()
