# rayserve_entrypoint.py, version 0.1.0
"""Start a command in the image of Dockerfile-rayserve; `serve run CONFIG` as a container should.

    python rayserve_entrypoint.py serve run serve_config.yaml

A wrong config ends it at once, with the reason. Told to stop (SIGTERM, SIGINT), it takes no new requests and ends when
those that have begun are answered, while `serve run` alone drops them.
"""

import os
import signal
import subprocess
import sys
import time

DASHBOARD = "http://127.0.0.1:8265"


def drain() -> None:
    """Take the applications away, and wait until their replicas have finished."""
    from ray.dashboard.modules.serve.sdk import ServeSubmissionClient  # not earlier: it takes 100 MB

    client = ServeSubmissionClient(DASHBOARD)
    if client.get_serve_details()["applications"]:
        client.deploy_applications({"applications": []})
    while client.get_serve_details()["applications"]:
        time.sleep(0.1)


def main(command: list[str]) -> int:
    if command[:2] != ["serve", "run"] or not command[-1].endswith((".yaml", ".yml")):
        os.execvp(command[0], command)
    if subprocess.run([sys.executable, "check_serve_config.py", command[-1]]).returncode:
        return 1
    server = subprocess.Popen(command, start_new_session=True)  # so that Ctrl-C at a terminal reaches this process only
    told: list[int] = []

    def stop(number: int, _: object) -> None:
        told.append(number)
        signal.signal(number, signal.SIG_DFL)  # told twice, it ends at once
        try:
            drain()
        except Exception as err:  # it is not up yet, or no longer
            print(f"stopping without a drain: {type(err).__name__}", file=sys.stderr)
        server.send_signal(signal.SIGINT)

    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, stop)
    code = server.wait()
    return 0 if told else code  # Ray, told to stop while it starts, may end in any way


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
