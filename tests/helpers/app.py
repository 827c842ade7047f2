"""The app with a tiny translator: written into a folder, changed, and measured from outside."""

import ast
import shutil
import textwrap
from pathlib import Path

import yaml
from helpers.repository import TEMPLATES
from tiny_translator import PAIRS, make_model


def make_app(folder, replicas=2, **more):
    """Write the server's files and a model that knows the pairs; return the path of the config."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("template_ray_serve.py", "check_serve_config.py"):
        shutil.copy(TEMPLATES / name, folder)
    if not (folder / "model").exists():
        make_model(folder / "model", PAIRS)
    config = yaml.safe_load((TEMPLATES / "serve_config.yaml").read_text())
    deployment = config["applications"][0]["deployments"][0]
    del deployment["autoscaling_config"]
    deployment.update({"num_replicas": replicas, **more})
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder / "config.yaml"


def with_code_in_call(code):
    """Return the app with code that runs first whenever the model is called."""
    app = (TEMPLATES / "template_ray_serve.py").read_text("utf-8")
    names = {node.name: node for node in ast.parse(app).body if isinstance(node, ast.ClassDef)}
    (call,) = [node for node in names["Model"].body if getattr(node, "name", "") == "__call__"]
    _, *statements = call.body  # behind the docstring, and behind imports
    first = next(each for each in statements if not isinstance(each, ast.Import))
    lines = app.splitlines(keepends=True)
    lines.insert(first.lineno - 1, textwrap.indent(code.strip("\n") + "\n", " " * 8))
    return "".join(lines)


def log_files(server):
    """What Ray has logged for a server; not again by the link to the latest session."""
    return [path for path in Path(server.scratch).glob("session_2*/logs/**/*") if path.is_file()]


def sizes(server, shared=True):
    """Memory of proxy and replica in MB, with or without pages that others have too."""
    found = {}
    for name in ("ServeReplica", "ProxyActor"):
        (process,) = server.processes(name)
        memory = process.memory_info()
        found[name] = (memory.rss - (0 if shared else memory.shared)) / 1e6
    return found
