# rayserve_entrypoint.py, version 0.1.0
"""Start a command in the image of Dockerfile-rayserve; `serve run CONFIG` as a container should.

    python rayserve_entrypoint.py serve run serve_config.yaml
    python rayserve_entrypoint.py health serve_config.yaml    0 if the app answers its own
                                                              example, or is busy

An invalid config stops it at once and prints the reason. On SIGTERM or SIGINT it accepts no new
requests and exits after answering those in flight; `serve run` alone would drop them.
"""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

DASHBOARD = "http://127.0.0.1:8265"
# `serve run` with a fixed port for Prometheus: by default, Ray picks a random one.
SERVE = """
import ray
from ray.serve.scripts import cli
ray.init("local", namespace="serve", _metrics_export_port=8080)
cli()
"""
SIGNALS = (signal.SIGTERM, signal.SIGINT)


def check_health(config_file: str) -> None:
    """Send each app the example from its own description; raise an error unless it answers.

    One that refuses it, because it is busy or wants a token, has to say that its model works.
    """
    import yaml

    os.environ["no_proxy"] = "*"  # never through a company's proxy
    config = yaml.safe_load(Path(config_file).read_text("utf-8"))
    port = config["http_options"].get("port", 8000)
    limit = float(config["http_options"].get("request_timeout_s") or 60)
    for application in config["applications"]:
        route = (application.get("route_prefix") or "/").rstrip("/")
        url = f"http://127.0.0.1:{port}{route}"
        with urllib.request.urlopen(f"{url}/openapi.json", timeout=limit) as reply:
            described = json.load(reply)["paths"]["/"]["post"]["requestBody"]["content"]
        body = json.dumps(described["application/json"]["example"]).encode()
        request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
        try:
            urllib.request.urlopen(request, timeout=limit).close()
        except urllib.error.HTTPError as error:
            if error.code not in (401, 503, 504):
                raise
            urllib.request.urlopen(f"{url}/health", timeout=limit).close()


def drain() -> None:
    """Remove the applications, and wait until their replicas have finished."""
    from ray.dashboard.modules.serve.sdk import ServeSubmissionClient  # here: it takes 100 MB

    os.environ["no_proxy"] = "*"  # never through a company's proxy
    client = ServeSubmissionClient(DASHBOARD)
    if client.get_serve_details()["applications"]:
        client.deploy_applications({"applications": []})
    while client.get_serve_details()["applications"]:
        time.sleep(0.1)


def serve(command: list[str]) -> int:
    """Run `serve run CONFIG` until it ends or a signal arrives; return its exit code."""
    for number in SIGNALS:
        signal.signal(number, lambda *_: sys.exit(0))  # nothing to drain yet
    check = [sys.executable, "check_serve_config.py", command[-1]]
    if subprocess.run(check).returncode:
        return 1
    # In a session of its own, so that Ctrl+C at a terminal reaches only this process.
    arguments = [sys.executable, "-c", SERVE, *command[1:]]
    server = subprocess.Popen(arguments, start_new_session=True)
    received: list[int] = []

    def stop(number: int, _: object) -> None:
        received.append(number)
        signal.signal(number, signal.SIG_DFL)  # a second signal ends it at once
        try:
            drain()
            server.send_signal(signal.SIGINT)
        except Exception as error:  # it is not up yet, or no longer
            print(f"stopping without a drain: {type(error).__name__}", file=sys.stderr)
            server.terminate()  # SIGINT while Python imports prints a traceback

    for number in SIGNALS:
        signal.signal(number, stop)
    code = server.wait()
    return 0 if received else code  # if Ray is stopped while it starts, its code means nothing


def main(command: list[str]) -> int:
    if command[0] == "health":
        try:
            check_health(command[1])
        except Exception as error:
            sys.exit(f"not healthy: {error!r}")
        return 0
    if command[:2] == ["serve", "run"] and command[-1].endswith((".yaml", ".yml")):
        return serve(command)
    os.execvp(command[0], command)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
