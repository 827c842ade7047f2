"""A W&B server on loopback for the real client: it keeps what it gets, and fails as it is told."""

import base64
import contextlib
import gzip
import json
import re
import socket
import threading
from collections import defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

MODES = ("ok", "hang", "dies", "freezes")  # or a status code, such as 401, for every request


class Server(ThreadingHTTPServer):
    def handle_error(self, request, client_address):
        """A client that hangs up is no news."""


class StandIn:
    """What arrived: `requests` as (method, path, key), `runs` by id, `files` by (run, name)."""

    def __init__(self, mode="ok"):
        assert mode in MODES or isinstance(mode, int), mode
        self.mode, self.connections, self.requests = mode, 0, []
        self.runs, self.files, self.lock = {}, {}, threading.Lock()
        self.open, self.over = set(), threading.Event()
        stand_in = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self):
                super().setup()
                with stand_in.lock:
                    stand_in.connections += 1
                    stand_in.open.add(self.connection)

            def log_message(self, *_):
                pass

            def do_POST(self):
                stand_in.answer(self)

            do_PUT = do_GET = do_POST

        self.server = Server(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.stop()

    def stop(self):
        """Refuse what comes and cut what is open."""
        self.over.set()
        self.server.shutdown()
        self.server.server_close()
        with self.lock:
            for connection in self.open:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def answer(self, handler):
        raw = handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
        raw = gzip.decompress(raw) if handler.headers.get("Content-Encoding") == "gzip" else raw
        login = base64.b64decode(
            handler.headers.get("Authorization", "").removeprefix("Basic ")
        ).decode()
        with self.lock:
            self.requests.append((handler.command, handler.path, login.removeprefix("api:")))
        if self.mode == "hang":
            self.over.wait(300)
            return
        if isinstance(self.mode, int):
            return self.reply(
                handler, {"errors": [{"message": f"stand-in says {self.mode}"}]}, self.mode
            )
        with self.lock:
            content, code = self.keep(handler, raw)
            begun = (
                self.runs and handler.path != "/graphql"
            )  # the run exists and its first data comes
        if begun and self.mode == "freezes":
            self.mode = "hang"
            self.over.wait(300)
        elif begun and self.mode == "dies":
            self.mode = "dead"
            threading.Thread(target=self.stop, daemon=True).start()
        else:
            self.reply(handler, content, code)

    def reply(self, handler, content, code=200):
        body = json.dumps(content).encode()
        handler.send_response(code)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    def run(self, name):
        return self.runs.setdefault(
            name,
            {
                "config": {},
                "history": [],
                "summary": {},
                "exits": [],
                "streamed": defaultdict(list),
            },
        )

    def keep(self, handler, raw):
        """Store one request; return (answer, status code)."""
        if handler.path == "/graphql":
            query = json.loads(raw)
            given = {
                key: value
                for key, value in (query.get("variables") or {}).items()
                if value is not None
            }
            operation = re.search(r"(?:query|mutation)\s+(\w+)", query["query"])[1]
            if operation == "UpsertBucket":
                run = self.run(given["name"])
                config = json.loads(given.pop("config", "{}"))
                run["config"].update(
                    {key: item["value"] for key, item in config.items() if key != "_wandb"}
                )
                run.update(given)
                project = {
                    "name": given.get("project"),
                    "entity": {"name": given.get("entity") or "stand-in"},
                }
                return {
                    "data": {
                        "upsertBucket": {
                            "inserted": True,
                            "bucket": {
                                "id": given["name"],
                                "name": given["name"],
                                "displayName": given.get("displayName"),
                                "project": project,
                            },
                        }
                    }
                }, 200
            if operation == "CreateRunFiles":
                files = [
                    {"name": name, "uploadUrl": f"{self.url}/upload/{given['run']}/{name}"}
                    for name in given["files"]
                ]
                return {
                    "data": {
                        "createRunFiles": {
                            "runID": given["run"],
                            "uploadHeaders": [],
                            "files": files,
                        }
                    }
                }, 200
            return {"data": {}}, 200
        if handler.path.startswith("/upload/"):
            name = handler.path.removeprefix("/upload/").split("/", 1)
            self.files[name[0], name[1]] = raw
            return {}, 200
        stream = re.fullmatch(r"/files/[^/]+/[^/]+/([^/]+)/file_stream", handler.path)
        if stream:
            run, sent = self.run(stream[1]), json.loads(raw)
            for name, chunk in (sent.get("files") or {}).items():
                run["streamed"][name] += chunk["content"]
                if name == "wandb-history.jsonl":
                    run["history"] += [json.loads(line) for line in chunk["content"]]
                if name == "wandb-summary.json":
                    run["summary"].update(json.loads(chunk["content"][-1]))
            if sent.get("complete"):
                run["exits"].append(sent["exitcode"])
            return {}, 200
        return {}, 404
