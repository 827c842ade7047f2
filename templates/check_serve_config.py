# check_serve_config.py, version 0.1.0
"""Check a Ray Serve config strictly, and deploy it if you ask; keep this file beside the app.

    python check_serve_config.py serve_config.yaml
    python check_serve_config.py serve_config.yaml --deploy http://127.0.0.1:8265

Exit code 0: valid. 1: one line per problem. Ray ignores keys that it does not know, and finds other
problems only when it deploys. With --deploy, the command waits until the applications are RUNNING;
if that fails, it ends with 1 and the application's own message. Where Ray asks for its token
(`serve run` does since 2.60), set RAY_AUTH_MODE=token.
"""

import argparse
import re
import sys
import time
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


def last_line(err: Any) -> str:
    """What went wrong, without the traceback before it."""
    lines = [line.strip() for line in str(err).splitlines() if line.strip()] or [repr(err)]
    return next(
        (line for line in reversed(lines) if re.match(r"[\w.]*(Error|Exception)\b.*: ", line)),
        lines[-1],
    )


def keys_of(annotation: Any) -> dict[str, Any]:
    """Return {key: annotation} of the pydantic model in an annotation, such as `Model | None`."""
    if hasattr(annotation, "model_fields"):
        return {name: field.annotation for name, field in annotation.model_fields.items()}
    return {name: each for arg in get_args(annotation) for name, each in keys_of(arg).items()}


# Ray's schema takes these two as any mapping, and looks into them later.
MAPPINGS = {
    "autoscaling_config": keys_of(AutoscalingConfig),
    "runtime_env": dict.fromkeys(RuntimeEnv.known_fields),
}


def walk(value: Any, keys: dict[str, Any], path: str, faults: dict[str, str]) -> None:
    """Note unknown keys, blank values and unquoted environment variables."""
    for i, each in enumerate(value if isinstance(value, list) else []):
        walk(each, keys, f"{path}.{i}", faults)
    for key, inner in value.items() if isinstance(value, dict) and keys else ():
        here = f"{path}.{key}".lstrip(".")
        if key not in keys:
            faults[here] = "Ray does not know this key"
        elif inner is None and type(None) not in get_args(keys[key]):
            faults[here] = "is blank; give it a value or take the line out"
        elif key == "env_vars" and isinstance(inner, dict):
            faults.update(
                {
                    f"{here}.{n}": "is no text; quote it"
                    for n, v in inner.items()
                    if not isinstance(v, str)
                }
            )
        else:
            walk(inner, MAPPINGS.get(key) or keys_of(keys[key]), here, faults)


def check_code(application: dict, path: str, faults: dict[str, str]) -> None:
    """Import the application, and compare it with its part of the config."""
    try:
        key = "import_path"
        target = import_attr(application[key])
        key = "args"
        app = call_builder(target, application.get(key, {}))
        known = {each.name: each for each in build_app(app, name="check").deployments}
    except Exception as err:
        faults[f"{path}.{key}"] = last_line(err)
        return
    for i, deployment in enumerate(application.get("deployments", [])):
        here, found = f"{path}.deployments.{i}", known.get(deployment["name"])
        if found is None:
            faults[f"{here}.name"] = (
                f"no {deployment['name']} in {application['import_path']}, but {', '.join(known)}"
            )
            continue
        user_config = deployment.get("user_config") or {}
        if user_config and not hasattr(found.func_or_class, "reconfigure"):
            faults[f"{here}.user_config"] = (
                f"{found.name} takes none; put its settings in `args` of the application"
            )
        ongoing = deployment.get("max_ongoing_requests", found.max_ongoing_requests)
        batch = max(
            [
                user_config.get("max_batch_size", 0),
                *(getattr(a, "max_batch_size", 0) for a in found.init_args),
            ]
        )
        if batch > ongoing:
            faults[f"{here}.max_ongoing_requests"] = (
                f"{ongoing} at a time never fill a batch of max_batch_size {batch}"
            )
        if (deployment.get("autoscaling_config") or {}).get("target_ongoing_requests", 0) > ongoing:
            faults[f"{here}.autoscaling_config"] = (
                f"target_ongoing_requests is above max_ongoing_requests {ongoing}"
            )


def check(config: Any) -> list[str]:
    """The faults of a config as YAML gives it, each as "path: what is wrong"."""
    faults: dict[str, str] = {}
    walk(config, keys_of(ServeDeploySchema), "", faults)
    http = (config.get("http_options") if isinstance(config, dict) else None) or {}
    if "host" not in http:
        faults["http_options.host"] = (
            "is missing, and Ray listens everywhere; write 127.0.0.1, or 0.0.0.0 on purpose"
        )
    try:
        ServeDeploySchema.model_validate(config)
    except ValidationError as err:
        found = {".".join(map(str, each["loc"])): each["msg"] for each in err.errors()}
        return [f"{path}: {fault}".lstrip(": ") for path, fault in {**found, **faults}.items()]
    for i, application in enumerate(config["applications"]):
        path, route = f"applications.{i}", application.get("route_prefix") or "/"
        if not re.fullmatch("/|/.*[^/]", route):
            faults[f"{path}.route_prefix"] = "has to start with / and must not end with it"
        if len(application.get("name", "")) > 40:
            faults[f"{path}.name"] = (
                "has more than 40 characters, too many for the names Kubernetes makes of it"
            )
        for j, deployment in enumerate(application.get("deployments", [])):
            try:
                AutoscalingConfig.model_validate(deployment.get("autoscaling_config") or {})
            except ValidationError as err:
                faults[f"{path}.deployments.{j}.autoscaling_config"] = err.errors()[0]["msg"]
            if deployment.get("graceful_shutdown_timeout_s", 1e9) < (
                http.get("request_timeout_s") or 0
            ):
                faults[f"{path}.deployments.{j}.graceful_shutdown_timeout_s"] = (
                    "is less than request_timeout_s"
                )
        if (
            not {"working_dir", "py_modules"} & application.get("runtime_env", {}).keys()
        ):  # else the code is elsewhere
            check_code(application, path, faults)
    return [f"{path}: {fault}" for path, fault in faults.items()]


def deploy(config: dict, address: str, timeout: float) -> list[str]:
    """Deploy, and wait until every application is RUNNING; return what went wrong, if anything."""
    client, end, state = ServeSubmissionClient(address), time.monotonic() + timeout, ""
    client.deploy_applications(config)
    while time.monotonic() < end:
        time.sleep(0.5)
        running = client.get_serve_details()["applications"]
        apps = [running.get(each["name"], {}) for each in config["applications"]]
        if all(app.get("status") == "RUNNING" for app in apps):
            return []
        told = [
            each
            for app in apps
            for each in (*app.get("deployments", {}).values(), app)
            if each.get("message")
        ]
        state = "; ".join(
            f"{each['name']} {each['status']}: {last_line(each['message'])}" for each in told
        )
        if any(app.get("status") in ("DEPLOY_FAILED", "UNHEALTHY") for app in apps):
            return [state]
    return [f"not running after {timeout:g} s. {state}"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path)
    parser.add_argument(
        "--deploy", metavar="ADDRESS", help="of Ray's dashboard, such as http://127.0.0.1:8265"
    )
    parser.add_argument(
        "--timeout", type=float, default=120, help="seconds to wait for RUNNING, default 120"
    )
    arguments = parser.parse_args()
    try:
        faults = check(config := yaml.safe_load(arguments.file.read_text("utf-8")))
        if not faults and arguments.deploy:
            faults = deploy(config, arguments.deploy, arguments.timeout)
    except Exception as err:
        faults = [" ".join(str(err).split())]
    if faults:
        sys.exit("\n".join(f"{arguments.file}: {fault}" for fault in faults))
    print(f"{arguments.file}: in order" + (", and running" if arguments.deploy else ""))


if __name__ == "__main__":
    main()
