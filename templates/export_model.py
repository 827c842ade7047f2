# export_model.py, version 0.1.0
"""Write the model of the newest successful run of template_flow.py to the folder `model/`, ready to be served.

    python export_model.py                      the newest run of yours
    python export_model.py --run 1234           that run
    python export_model.py --namespace ""       the newest run of anybody; "user:NAME", "production:TOKEN": theirs

The folder appears complete or not at all. One that is there already stays, unless --replace is given.
"""

import argparse
import hashlib
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

FLOW = "TemplateFlow"  # YOUR CODE: the name of your flow


def find_run(run_id, namespace):
    """Return the Metaflow run, by default the newest successful one; SystemExit with one line if there is none."""
    import metaflow
    from metaflow.exception import MetaflowInternalError, MetaflowNamespaceMismatch, MetaflowNotFound

    if namespace is not None:
        metaflow.namespace(namespace or None)
    what = f"{f'run {run_id}' if run_id else 'successful run'} of {FLOW}"
    try:
        run = metaflow.Run(f"{FLOW}/{run_id}") if run_id else metaflow.Flow(FLOW).latest_successful_run
    except (MetaflowNotFound, MetaflowInternalError):
        run = None
    except MetaflowNamespaceMismatch:
        sys.exit(f'export_model.py: no {what} in the namespace {metaflow.get_namespace()}; add --namespace "" for all')
    if run is None:
        sys.exit(f"export_model.py: no {what}; run `python template_flow.py run` first, in this folder")
    if not run.successful:
        sys.exit(f"export_model.py: run {run.id} of {FLOW} has not succeeded; choose another one, or `resume` it")
    return run


def readme(run, data):
    """Return the text that tells where the model comes from."""
    tags = {tag.partition(":")[0]: tag.partition(":")[2] for tag in run.system_tags}
    library = json.loads(data.model["config.json"]).get("transformers_version", "unknown")
    pairs = hashlib.sha256(json.dumps([data.training, data.held_out]).encode()).hexdigest()
    return "\n".join([
        f"# Model of run {run.pathspec}", "",
        f"- finished: {run.finished_at:%Y-%m-%d %H:%M:%S}",
        f"- pairs: {len(data.training)} to train on, {len(data.held_out)} held out, SHA-256 {pairs}",
        *(f"- {name}: {score:.2f}" for name, score in data.scores.items()),
        f"- parameters: {', '.join(f'{name} {getattr(data, name)!r}' for name in ('base_model', 'epochs', 'seed'))}",
        *(f"- {name}: {value}" for name, value in tags.items() if name in ("metaflow_version", "python_version")),
        f"- transformers_version: {library}",
        "", "`known_answers.json` holds translations that the served model has to give again.", ""])


def export(run, folder, replace):
    """Write the run's model to `folder`, all at once, by renaming a complete one into place."""
    if folder.exists() and not replace:
        sys.exit(f"export_model.py: {folder} is there already; --replace overwrites it, --output writes elsewhere")
    folder.parent.mkdir(parents=True, exist_ok=True)
    data = run["evaluate"].task.data
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        new, old = Path(scratch, "new"), Path(scratch, "old")
        new.mkdir()
        for name, content in data.model.items():
            (new / name).write_bytes(content)
        if data.known_answers:
            answers = json.dumps(data.known_answers, ensure_ascii=False, indent=1)
            (new / "known_answers.json").write_text(answers, "utf-8")
        (new / "README.md").write_text(readme(run, data), "utf-8")
        if folder.exists():
            os.replace(folder, old)
        try:
            os.replace(new, folder)
        except OSError:
            if old.exists():
                shutil.move(old, folder)
            raise


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", help="id of the run")
    parser.add_argument("--namespace", help='Metaflow namespace to look in; "" is everybody\'s')
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("model"), help="default: model/ here")
    parser.add_argument("--replace", action="store_true", help="overwrite the folder")
    arguments = parser.parse_args()
    from metaflow.exception import MetaflowException

    try:
        run = find_run(arguments.run, arguments.namespace)
        export(run, arguments.output, arguments.replace)
    except MetaflowException as error:
        sys.exit(f"export_model.py: {error.message}")
    except OSError as error:
        sys.exit(f"export_model.py: cannot write {arguments.output}: {error.strerror}")
    print(f"{os.path.relpath(arguments.output)}: the model of run {run.pathspec}")


if __name__ == "__main__":
    main()
