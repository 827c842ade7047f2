# check_serve_config.py, version 0.1.0
"""Check a Ray Serve config strictly, and deploy it if you ask; keep this file beside the app.

    python check_serve_config.py serve_config.yaml
    python check_serve_config.py serve_config.yaml --deploy http://127.0.0.1:8265

Exit code 0: valid. 1: one line per problem. Ray ignores keys that it does not know, and finds other
problems only when it deploys. With --deploy, the command waits until the applications are RUNNING,
with the code and the model of this folder, and says what it changed; if that fails, it ends with 1
and the application's own message. Where Ray asks for its token (`serve run` does since 2.60), set
RAY_AUTH_MODE=token.
"""

import argparse
import contextlib
import json
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import ValidationError
from ray._common.utils import import_attr
from ray.dashboard.modules.serve.sdk import ServeSubmissionClient
from ray.runtime_env import RuntimeEnv
from ray.serve._private.api import call_user_app_builder_with_args_if_necessary as call_builder
from ray.serve._private.build_app import build_app
from ray.serve.config import AutoscalingConfig
from ray.serve.schema import ServeDeploySchema

NO_OWN_CODE = {"working_dir", "py_modules"}  # keys of runtime_env: the code is somewhere else
# Values that YAML does not read as they look: 020 is 16, 1:30 is 90, yes is true.
SURPRISING = re.compile(r"[-+]?0[0-7_]+|.*:.*|yes|no|on|off", re.IGNORECASE)
MAX_NAME = 40  # characters: Kubernetes allows 63, and KubeRay adds to the name
Problems = Iterator[tuple[str, str]]  # path in the config, and what is wrong there


def under(path: str, problems: Problems) -> Problems:
    """Put a path before those of the problems."""
    for inner_path, problem in problems:
        yield f"{path}.{inner_path}", problem


def last_line(error: Any) -> str:
    """Return what went wrong without the traceback before it, such as "ValueError: no model"."""
    text = str(error).strip() or repr(error)
    lines = [line.strip() for line in text.splitlines()]
    for line in reversed(lines):
        if re.match(r"([\w.]*(Error|Exception)\b.*|[\w.]+\.[A-Z]\w+): ", line):
            return line
    return lines[-1]


def keys_of(annotation: Any) -> dict[str, Any]:
    """Return {key: annotation} of the pydantic model in an annotation, such as `Model | None`."""
    if hasattr(annotation, "model_fields"):
        return {name: field.annotation for name, field in annotation.model_fields.items()}
    keys: dict[str, Any] = {}
    for argument in get_args(annotation):
        keys.update(keys_of(argument))
    return keys


def check_yaml(node: Any) -> Problems:
    """Find duplicate keys, of which YAML keeps only the last, and values that it reads oddly."""
    if isinstance(node, yaml.SequenceNode):
        for number, item in enumerate(node.value):
            yield from under(str(number), check_yaml(item))
    if not isinstance(node, yaml.MappingNode):
        return
    seen = set()
    for key, value in node.value:
        if key.value in seen:
            yield key.value, f"appears again in line {key.start_mark.line + 1}"
        seen.add(key.value)
        if value.tag.endswith((":int", ":bool")) and SURPRISING.fullmatch(value.value):
            read = json.dumps(yaml.safe_load(value.value))
            yield key.value, f"YAML reads {value.value} as {read}: write {read}, or quote it"
        yield from under(key.value, check_yaml(value))


# Ray's schema accepts any mapping for these two, and reads them later.
MAPPINGS = {
    "autoscaling_config": keys_of(AutoscalingConfig),
    "runtime_env": dict.fromkeys(RuntimeEnv.known_fields),
}


def check_keys(value: Any, keys: dict[str, Any]) -> Problems:
    """Find unknown keys, blank values and unquoted environment variables."""
    if isinstance(value, list):
        for number, item in enumerate(value):
            yield from under(str(number), check_keys(item, keys))
    if not isinstance(value, dict) or not keys:
        return
    for key, inner in value.items():
        if key not in keys:
            yield key, "Ray does not know this key"
        elif inner is None and type(None) not in get_args(keys[key]):
            yield key, "is blank; give it a value or remove the line"
        elif key == "env_vars":
            yield from under(key, check_variables(inner))
        else:
            inner_keys = MAPPINGS.get(key) or keys_of(keys[key])
            yield from under(key, check_keys(inner, inner_keys))
        if key == "runtime_env" and isinstance(inner, dict):
            yield from check_runtime_env(inner)


def check_runtime_env(runtime_env: dict) -> Problems:
    """Find what Ray would refuse only when it deploys, such as an archive of another kind."""
    try:
        RuntimeEnv(**{**runtime_env, "env_vars": {}})  # check_variables checks them
    except (TypeError, ValueError) as error:
        yield "runtime_env", str(error).partition("\n")[0]


def check_variables(variables: Any) -> Problems:
    """Find environment variables that YAML reads as a number, a truth value or nothing."""
    if not isinstance(variables, dict):
        return
    for name, value in variables.items():
        if not isinstance(value, str):
            yield name, "is not text; quote it"


def check_application(application: dict, timeout: float) -> Problems:
    """Check one application of the config, and its code if that is here."""
    route = application.get("route_prefix") or "/"
    if not route.startswith("/"):
        yield "route_prefix", "has to start with /"
    if route != "/" and route.endswith("/"):
        yield "route_prefix", "must not end with /"
    if len(application.get("name", "")) > MAX_NAME:
        yield "name", f"is longer than {MAX_NAME} characters, too long for Kubernetes"
    for number, deployment in enumerate(application.get("deployments", [])):
        yield from under(f"deployments.{number}", check_timeouts(deployment, timeout))
    if not NO_OWN_CODE & application.get("runtime_env", {}).keys():
        yield from check_code(application)


def check_timeouts(deployment: dict, timeout: float) -> Problems:
    """Check what does not depend on the code."""
    autoscaling = deployment.get("autoscaling_config") or {}
    try:
        AutoscalingConfig.model_validate(autoscaling)
    except ValidationError as error:
        yield "autoscaling_config", error.errors()[0]["msg"]
    if deployment.get("graceful_shutdown_timeout_s", timeout) < timeout:
        yield "graceful_shutdown_timeout_s", "is less than request_timeout_s"


def build(application: dict) -> list[Any]:
    """Return the deployments of an application, as its code makes them."""
    target = import_attr(application["import_path"])
    arguments = application.get("args", {})
    app = call_builder(target, arguments)
    return build_app(app, name="check").deployments


def check_code(application: dict) -> Problems:
    """Import the application, and compare its deployments with those of the config."""
    path = application["import_path"]
    key = "import_path"
    try:
        import_attr(path)
        key = "args"
        built = build(application)
    except Exception as error:
        yield key, last_line(error)
        return
    known = {deployment.name: deployment for deployment in built}
    for number, deployment in enumerate(application.get("deployments", [])):
        name = deployment["name"]
        if name not in known:
            names = ", ".join(known)
            yield f"deployments.{number}.name", f"{path} has only: {names}"
        else:
            problems = check_deployment(deployment, known[name])
            yield from under(f"deployments.{number}", problems)


def check_deployment(deployment: dict, built: Any) -> Problems:
    """Compare the settings of a deployment with each other and with its class."""
    user_config = deployment.get("user_config") or {}
    if user_config and not hasattr(built.func_or_class, "reconfigure"):
        yield "user_config", f"{built.name} has none; use `args` of the application"
    ongoing = deployment.get("max_ongoing_requests", built.max_ongoing_requests)
    batch_size = user_config.get("max_batch_size", 0)
    for argument in built.init_args:
        batch_size = max(batch_size, getattr(argument, "max_batch_size", 0))
    if batch_size > ongoing:
        problem = f"{ongoing} at a time never fill a batch of max_batch_size {batch_size}"
        yield "max_ongoing_requests", problem
    autoscaling = deployment.get("autoscaling_config")
    with contextlib.suppress(ValidationError):  # check_timeouts reports it
        target = AutoscalingConfig.model_validate(autoscaling).target_ongoing_requests
        if target > ongoing:
            problem = f"target_ongoing_requests is above max_ongoing_requests {ongoing}"
            yield "autoscaling_config", problem


def check_text(text: str) -> list[str]:
    """Return the problems of a config, one line each: first those of the YAML itself."""
    tree = yaml.compose(text, yaml.SafeLoader)
    problems = [f"{path}: {problem}" for path, problem in check_yaml(tree)]
    return problems or check(yaml.safe_load(text))


def check(config: Any) -> list[str]:
    """Return the problems of a config as YAML gives it, one line each: "path: what is wrong"."""
    problems = dict(check_keys(config, keys_of(ServeDeploySchema)))
    options = config.get("http_options") if isinstance(config, dict) else None
    http_options = options or {}
    if "host" not in http_options:
        problems["http_options.host"] = "is missing: write 127.0.0.1, or 0.0.0.0 for everybody"
    try:
        schema = ServeDeploySchema.model_validate(config)
        read = schema.model_dump(exclude_unset=True)  # with numbers for text such as 6e1
        timeout = schema.http_options.request_timeout_s or 0
        for number, application in enumerate(read["applications"]):
            found = check_application(application, timeout)
            problems.update(under(f"applications.{number}", found))
    except ValidationError as error:
        for invalid in error.errors():
            path = ".".join(map(str, invalid["loc"]))
            problems.setdefault(path, invalid["msg"])
    return [f"{path}: {problem}".lstrip(": ") for path, problem in problems.items()]


def add_files(application: dict) -> dict[str, str]:
    """Put hashes of code and model into the config of an application, and return them.

    Ray ignores a config that it has seen before, whatever files there are now. The app compares
    the hashes with what it loads.
    """
    runtime_env = application.setdefault("runtime_env", {})
    if NO_OWN_CODE & runtime_env.keys():
        return {}
    for deployment in build(application):
        for argument in deployment.init_args:
            if isinstance(argument, dict) and "code" in argument:  # as template_ray_serve.py
                variables = runtime_env.setdefault("env_vars", {})
                variables["DEPLOYED_FILES"] = json.dumps(argument)
                return argument
    return {}


def replicas(application: dict) -> set[str]:
    """Return the ids of the replicas that answer."""
    found = set()
    for deployment in application.get("deployments", {}).values():
        for replica in deployment["replicas"]:
            if replica["state"] == "RUNNING":
                found.add(replica["replica_id"])
    return found


def report(application: dict, files: dict[str, str], old: set[str], new: set[str]) -> str:
    """Return what runs of an application, and whether it ran before the deploy."""
    text = application["name"]
    for part, value in files.items():
        text += f", {part} {value}"
    runtime_env = application["runtime_env"]
    for key in NO_OWN_CODE & runtime_env.keys():
        text += f", {key} {runtime_env[key]} (Ray loads an address only once)"
    if old and old <= new:
        text += ", unchanged: the same replicas still run"
    return text


def deploy(config: dict, address: str, timeout: float) -> list[str]:
    """Deploy, and wait until each application is RUNNING; return a report of each."""
    if re.match(r"https?://(127\.|localhost)", address):
        os.environ["no_proxy"] = "*"  # never through a company's proxy
    client = ServeSubmissionClient(address)
    applications = {application["name"]: application for application in config["applications"]}
    files = {name: add_files(application) for name, application in applications.items()}
    before = client.get_serve_details()["applications"]
    for name, application in applications.items():
        old = before.get(name, {})
        if old.get("status") == "DEPLOY_FAILED":  # Ray would not try the same config again
            runtime_env = application["runtime_env"]
            variables = runtime_env.setdefault("env_vars", {})
            moment = time.time()
            variables["DEPLOYED_AT"] = str(moment)
    client.deploy_applications(config)
    state = ""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        time.sleep(0.5)
        details = client.get_serve_details()["applications"]
        now = {name: details.get(name, {}) for name in applications}
        statuses = {application.get("status") for application in now.values()}
        if statuses == {"RUNNING"}:
            break
        state = messages(now.values())
        if statuses & {"DEPLOY_FAILED", "UNHEALTHY"}:
            raise RuntimeError(state)
    else:
        raise TimeoutError(f"not running after {timeout:g} s. {state}")
    reports = []
    for name, application in applications.items():
        ran = before.get(name, {})
        old_ones = replicas(ran)
        new_ones = replicas(now[name])
        text = report(application, files[name], old_ones, new_ones)
        reports.append(text)
    return reports


def messages(applications: Iterable[dict]) -> str:
    """Return what the deployments and the applications report, in one line."""
    reports = []
    for application in applications:
        deployments = application.get("deployments", {})
        for part in [*deployments.values(), application]:
            if part.get("message"):
                reason = last_line(part["message"])
                reports.append(f"{part['name']} {part['status']}: {reason}")
    return "; ".join(reports)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path)
    parser.add_argument(
        "--deploy", metavar="ADDRESS", help="Ray's dashboard: http://127.0.0.1:8265"
    )
    parser.add_argument("--timeout", type=float, default=120, help="seconds to wait, default 120")
    arguments = parser.parse_args()
    running = ""
    try:
        text = arguments.file.read_text("utf-8")
        problems = check_text(text)
        if arguments.deploy and not problems:
            config = yaml.safe_load(text)
            reports = deploy(config, arguments.deploy, arguments.timeout)
            running = ", and running: " + "; ".join(reports)
    except Exception as error:
        problems = [" ".join(str(error).split())]
    lines = [f"{arguments.file}: {problem}" for problem in problems]
    if lines:
        sys.exit("\n".join(lines))
    print(f"{arguments.file}: valid{running}")


if __name__ == "__main__":
    main()
