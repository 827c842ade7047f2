"""The part of the Kubernetes API that Metaflow uses; a Job is a docker container."""

import contextlib
import json
import re
import threading
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from helpers.remote.pods import docker

JOBS = r"/apis/batch/v1/namespaces/(?P<namespace>[\w-]+)/jobs(?:/(?P<name>[\w-]+))?"
PODS = r"/api/v1/namespaces/[\w-]+/pods\?labelSelector=job-name(?:%3D|=)(?P<name>[\w-]+)"


class Job:
    """A Job as it was posted, with what Kubernetes itself would add to it."""

    def __init__(self, posted, namespace, cluster):
        self.object, metadata = posted, posted["metadata"]
        self.name = metadata.setdefault(
            "name", metadata.get("generateName", "") + uuid.uuid4().hex[:5]
        )
        metadata.update({"uid": uuid.uuid4().hex, "namespace": namespace})
        metadata["annotations"] = metadata.get("annotations") or {}
        posted["spec"].setdefault("parallelism", 1)
        self.template = posted["spec"]["template"]
        self.container = self.template["spec"]["containers"][0]
        started = docker(*cluster.command(self.container, self.name, options=["--detach"]))
        self.refused = started.stdout[-500:] if started.returncode else ""

    def state(self):
        """(phase of the pod, state of its container), as docker tells them."""
        times = {"startedAt": "2026-01-01T00:00:00Z", "finishedAt": "2026-01-01T00:00:01Z"}
        if self.refused:
            return "Failed", {
                "terminated": {"exitCode": 125, "reason": "Error", "message": self.refused, **times}
            }
        seen = docker("inspect", "--format", "{{json .State}}", self.name)
        if seen.returncode:
            return "Failed", {
                "terminated": {"exitCode": 137, "reason": "Error", "message": "removed", **times}
            }
        seen = json.loads(seen.stdout)
        if seen["Status"] != "exited":
            return "Running", {"running": {"startedAt": times["startedAt"]}}
        code = seen["ExitCode"]
        reason = "OOMKilled" if seen["OOMKilled"] else "Error" if code else "Completed"
        return "Failed" if code else "Succeeded", {
            "terminated": {"exitCode": code, "reason": reason, **times}
        }

    def shown(self):
        phase = {"Running": "active", "Failed": "failed", "Succeeded": "succeeded"}[self.state()[0]]
        return {**self.object, "status": {phase: 1}}

    def pod(self):
        phase, state = self.state()
        status = {
            "name": self.container["name"],
            "image": self.container["image"],
            "imageID": "",
            "restartCount": 0,
            "ready": phase == "Running",
            "state": state,
        }
        metadata = {
            **self.template.get("metadata", {}),
            "name": f"{self.name}-pod",
            "namespace": self.object["metadata"]["namespace"],
            "uid": self.object["metadata"]["uid"],
        }
        return {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": metadata,
            "spec": self.template["spec"],
            "status": {"phase": phase, "containerStatuses": [status]},
        }


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, content, code=200):
        body = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def handle_request(self):
        jobs = self.server.jobs
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or b"{}")
        job, pods = re.fullmatch(JOBS, self.path.split("?")[0]), re.fullmatch(PODS, self.path)
        if self.command == "POST" and job and not job["name"]:
            new = Job(body, job["namespace"], self.server.cluster)
            jobs[new.name] = new
            return self.answer(new.shown(), 201)
        if self.command == "GET" and pods:
            items = [job.pod() for job in jobs.values() if job.name == pods["name"]]
            return self.answer(
                {"apiVersion": "v1", "kind": "PodList", "metadata": {}, "items": items}
            )
        if job and job["name"] in jobs:
            if self.command == "PATCH":  # parallelism 0 is how Metaflow ends a job
                jobs[job["name"]].object["spec"].update(body["spec"])
                docker("rm", "--force", job["name"])
            return self.answer(jobs[job["name"]].shown())
        return self.answer(
            {"kind": "Status", "status": "Failure", "code": 404, "message": self.path}, 404
        )

    do_GET = do_POST = do_PATCH = handle_request


@contextlib.contextmanager
def api(cluster):
    """Serve the API on a free port of loopback; yield (its address, the jobs by name)."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.cluster, server.jobs = cluster, {}
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", server.jobs
        finally:
            server.shutdown()
