"""A hub of datasets on localhost, which answers well or misbehaves as it is told."""

from __future__ import annotations

import hashlib
import re
import socket
import struct
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class HubServer:
    """Serves `files` of one dataset.

    `faults[name]` is a list of what goes wrong, one after the other, with the next requests for that file. Each is
    "METHOD kind": "HEAD 503", "GET 500", "HEAD 429", "GET drop" (the connection ends halfway), "GET reset" (broken off
    halfway), "GET stall" (halfway, then silence), "GET truncate" (half of the file, as if it were all), "GET wrong"
    (other bytes of the right number). `requests` is what was asked for: (method, name, Range header). With `cdn` the hub
    answers as the real one does for large files: it redirects to another host and offers Xet.
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
            body = bytes(byte ^ 1 for byte in body)
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
        if fault == "reset":  # with nothing left to linger for, closing sends a reset
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
