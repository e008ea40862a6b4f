"""Hubs on localhost: one serves a dataset, with faults on request, and one takes uploads of models."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import struct
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class HubServer:
    """Serves `files` of one dataset.

    `faults[name]` lists the faults of the next requests for that file, in order. Each is "METHOD kind": "HEAD 503",
    "GET 500", "HEAD 429", "GET drop" (the connection ends before the end of the file), "GET reset" (it is reset there),
    "GET stall" (it goes silent there), "GET truncate" (half of the file, as if it were all), "GET wrong" (wrong bytes).
    `requests` records the requests: (method, name, Range header). With `cdn` the hub answers as the real one does for
    large files: it redirects to another host and offers Xet.
    """

    def __init__(self, repo: str, files: dict[str, bytes]) -> None:
        self.repo, self.files = repo, files
        self.faults: dict[str, list[str]] = {}
        self.sha256_etag = True
        self.cdn = False
        self.requests: list[tuple[str, str, str | None]] = []
        self.lock = threading.Lock()
        self.stopping = threading.Event()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def do_HEAD(self):
                hub.answer(self, "HEAD")

            def do_GET(self):
                hub.answer(self, "GET")

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.stopping.set()
        self.server.shutdown()
        self.server.server_close()

    def count(self, method, name=None):
        """How many requests there were."""
        return sum(1 for made, of, _ in self.requests if made == method and name in (None, of))

    def answer(self, handler, method):
        match = re.fullmatch(rf"(?:/datasets/{re.escape(self.repo)}/resolve/[^/]+|/cdn)/([^/?]+)", handler.path)
        name = match[1] if match else handler.path
        with self.lock:
            self.requests.append((method, name, handler.headers.get("Range")))
            waiting = self.faults.get(name, [])
            fault = ""
            if waiting and waiting[0].startswith(method):
                fault = waiting.pop(0).split()[1]
        if name not in self.files:
            return self.refuse(handler, 404, {"X-Error-Code": "EntryNotFound"})
        if fault.isdigit():
            return self.refuse(handler, int(fault), {"Retry-After": "7"} if fault == "429" else {})
        whole = self.files[name]
        if self.cdn and not handler.path.startswith("/cdn/"):
            return self.redirect(handler, name, whole)
        start = int(re.match(r"bytes=(\d+)-", handler.headers.get("Range") or "bytes=0-")[1])
        body = whole[start:]
        etag = hashlib.sha256(whole).hexdigest() if self.sha256_etag else hashlib.sha1(whole).hexdigest()
        if fault == "wrong":
            body = body.translate(bytes(byte ^ 1 for byte in range(256)))
        if fault == "truncate":
            body = body[: len(body) // 2]
        handler.send_response(206 if start else 200)
        handler.send_header("ETag", f'"{etag}"')
        handler.send_header("X-Repo-Commit", COMMIT)
        handler.send_header("Content-Length", str(len(body)))
        if start:
            handler.send_header("Content-Range", f"bytes {start}-{len(whole) - 1}/{len(whole)}")
        handler.end_headers()
        if method == "HEAD":
            return None
        if fault not in ("drop", "reset", "stall"):
            handler.wfile.write(body)
            return None
        handler.wfile.write(body[: len(body) * 7 // 8])
        handler.wfile.flush()
        if fault == "stall":
            self.stopping.wait(30)
        if fault == "reset":  # with a linger time of 0, closing sends a reset
            handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            handler.connection.close()
        handler.close_connection = True
        return None

    def redirect(self, handler, name, whole):
        headers = {
            "Location": f"{self.url.replace('127.0.0.1', 'localhost')}/cdn/{name}",
            "ETag": '"of-the-redirect"',
            "X-Linked-ETag": f'"{hashlib.sha256(whole).hexdigest()}"',
            "X-Linked-Size": str(len(whole)),
            "X-Repo-Commit": COMMIT,
            "X-Xet-Hash": "f" * 64,
            "X-Xet-Refresh-Route": f"{self.url}/xet",
        }
        self.refuse(handler, 302, headers)

    def refuse(self, handler, status, headers):
        handler.send_response(status)
        for key, value in {**headers, "Content-Length": "0"}.items():
            handler.send_header(key, value)
        handler.end_headers()


class UploadServer:
    """A hub of models on localhost that takes uploads. `files` holds the committed files, by repository and name.

    With `status` it answers every request with that status instead.
    """

    def __init__(self, status: int | None = None) -> None:
        self.status = status
        self.files: dict[str, dict[str, bytes]] = {}
        self.large: dict[str, bytes] = {}  # by sha256
        self.tokens: set[str | None] = set()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def do_POST(self):
                hub.tokens.add(self.headers.get("Authorization"))
                hub.answer(self, self.rfile.read(int(self.headers.get("Content-Length", 0))))

            def do_PUT(self):
                content = self.rfile.read(int(self.headers["Content-Length"]))
                hub.large[hashlib.sha256(content).hexdigest()] = content
                hub.say(self, {})

            def do_GET(self):
                hub.answer(self, b"")

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def answer(self, handler, body):
        path = handler.path.partition("?")[0]
        if self.status:
            self.say(handler, {"error": "not you"}, self.status)
        elif path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'user'}/{asked['name']}"
            self.files.setdefault(name, {})
            self.say(handler, {"url": f"{self.url}/{name}", "name": name})
        elif match := re.fullmatch(r"/api/models/(.+)/preupload/main", path):
            kinds = [
                {
                    "path": file["path"],
                    "shouldIgnore": False,
                    "uploadMode": "lfs" if "safetensors" in file["path"] else "regular",
                }
                for file in json.loads(body)["files"]
            ]
            self.say(handler, {"files": kinds})
        elif path.endswith(".git/info/lfs/objects/batch"):
            objects = [
                {**each, "actions": {"upload": {"href": f"{self.url}/upload/{each['oid']}"}}}
                for each in json.loads(body)["objects"]
            ]
            self.say(handler, {"transfer": "basic", "objects": objects})
        elif match := re.fullmatch(r"/api/models/(.+)/commit/main", path):
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    self.files[match[1]][value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    self.files[match[1]][value["path"]] = self.large[value["oid"]]
            url = f"{self.url}/{match[1]}/commit/{COMMIT}"
            self.say(handler, {"success": True, "commitOid": COMMIT, "commitUrl": url})
        elif path == "/api/validate-yaml":
            self.say(handler, {"warnings": [], "errors": []})
        else:
            self.say(handler, {"error": f"no {path}"}, 404)

    def say(self, handler, answer, status=200):
        body = json.dumps(answer).encode()
        handler.send_response(status)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)
