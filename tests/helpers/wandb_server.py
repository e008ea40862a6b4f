"""A stand-in for W&B's server: it answers what `wandb sync` asks, and keeps the lines of history that arrive."""

import gzip
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Server(ThreadingHTTPServer):
    """Knows one run at a time. `rows`: its lines of history, in the order of the offsets at which they were sent."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.names: list[str] = []  # of the runs that were created
        self.rows: list[dict[str, Any]] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def answer(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        """The data of a GraphQL answer."""
        if "ResumeStatus" in query:
            return {"model": self._project | {"bucket": self._run() if variables["name"] in self.names else None}}
        if "upsertBucket" in query:
            new = variables["name"] not in self.names
            self.names += [variables["name"]] * new
            return {"upsertBucket": {"bucket": self._run(), "inserted": new}}
        if "createRunFiles" in query:
            files = [{"name": name, "uploadUrl": f"{self.address}/{name}"} for name in variables["files"]]
            return {"createRunFiles": {"runID": "run", "uploadHeaders": [], "files": files}}
        return {}

    _project = {"id": "project", "name": "p", "entity": {"id": "entity", "name": "me"}}  # noqa: RUF012

    def _run(self) -> dict[str, Any]:
        return {
            "id": "run", "name": self.names[-1], "displayName": "run", "project": self._project, "config": "{}", "tags": [],
            "historyLineCount": len(self.rows), "logLineCount": 0, "eventsLineCount": 0, "eventsTail": "[]",
            "historyTail": json.dumps([json.dumps(row) for row in self.rows[-1:]]), "summaryMetrics": "{}",
            "wandbConfig": '{"t":1}', "sweepName": None,
        }  # fmt: skip


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        content = gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body
        if self.path.endswith("/graphql"):
            asked = json.loads(content)
            return self._send({"data": self.server.answer(asked["query"], asked.get("variables") or {})})
        if self.path.endswith("/file_stream"):
            history = (json.loads(content).get("files") or {}).get("wandb-history.jsonl")
            if history:
                self.server.rows[history["offset"] :] = [json.loads(line) for line in history["content"]]
            return self._send({"exitcode": None, "limits": {}})
        self._send({})

    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self._send({})

    def do_GET(self) -> None:
        self._send({})

    def log_message(self, *_: object) -> None:
        pass

    def _send(self, answer: dict[str, Any]) -> None:
        content = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@contextmanager
def serve() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()
