"""A Hugging Face Hub on loopback that accepts uploads: repositories, preuploads, LFS objects and commits.

It has no Xet storage, so its clients set HF_HUB_DISABLE_XET.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_of_the_tests"
COMMIT = "c0ffee" + "0" * 34


class UploadHub:
    """The uploads that the hub has received. `repositories`: contents by path, by repository."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.messages: list[str] = []
        self.objects: dict[str, bytes] = {}
        self.refused_status: int | None = None
        """Status of every response, if it is not None."""
        self.is_read_only = False
        """Whether the token may not write to any repository."""
        self.url = ""


@contextmanager
def upload_hub() -> Iterator[UploadHub]:
    hub = UploadHub()

    class Handler(_Handler):
        received = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    received: UploadHub

    def do_POST(self) -> None:
        body = self._body()
        if self._is_refused():
            return
        if self.path == "/api/repos/create":
            self._create(json.loads(body))
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            modes = [{"path": file["path"], "uploadMode": _mode(file["path"])} for file in files]
            self._answer(200, {"files": [{**mode, "shouldIgnore": False} for mode in modes]})
        elif self.path.endswith("/info/lfs/objects/batch"):
            self._answer(
                200, {"transfer": "basic", "objects": [self._object(one) for one in json.loads(body)["objects"]]}
            )
        elif "/commit/" in self.path:
            self._commit(body)
        else:
            self._answer(200, {})

    def do_PUT(self) -> None:
        content = self._body()
        digest = self.path.rpartition("/")[2]
        assert hashlib.sha256(content).hexdigest() == digest
        self.received.objects[digest] = content
        self._answer(200, {})

    def do_GET(self) -> None:
        if self.received.is_read_only and self.path.endswith("/auth-check/write"):
            self._answer(403, {"error": "no"})
        elif not self._is_refused():
            self._answer(200, {"id": "x", "sha": COMMIT, "siblings": []})

    def _create(self, wanted: dict[str, Any]) -> None:
        name = f"{wanted['organization']}/{wanted['name']}" if wanted.get("organization") else wanted["name"]
        if name in self.received.repositories:
            self._answer(409, {"error": "You already created this model repo", "url": f"{self.received.url}/{name}"})
            return
        self.received.repositories[name] = {}
        self.received.private[name] = bool(wanted.get("private")) or wanted.get("visibility") == "private"
        self._answer(200, {"url": f"{self.received.url}/{name}"})

    def _object(self, wanted: dict[str, Any]) -> dict[str, Any]:
        if wanted["oid"] in self.received.objects:
            return {"oid": wanted["oid"], "size": wanted["size"]}
        upload = {"href": f"{self.received.url}/lfs/{wanted['oid']}", "header": {}}
        return {"oid": wanted["oid"], "size": wanted["size"], "actions": {"upload": upload}}

    def _commit(self, body: bytes) -> None:
        repository = self.path.removeprefix("/api/models/").partition("/commit/")[0]
        files = self.received.repositories[repository]
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                self.received.messages.append(value["summary"])
            elif entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.received.objects[value["oid"]]
        url = f"{self.received.url}/{repository}/commit/{COMMIT}"
        self._answer(200, {"success": True, "commitOid": COMMIT, "commitUrl": url, "hookOutput": ""})

    def _is_refused(self) -> bool:
        status = self.received.refused_status
        if status is None and self.headers.get("authorization") != f"Bearer {TOKEN}":
            status = 401
        if status is not None:
            self._answer(status, {"error": "no"})
        return status is not None

    def _body(self) -> bytes:
        if self.headers.get("transfer-encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("content-length") or 0))

    def _answer(self, status: int, content: object) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass


def _mode(path: str) -> str:
    return "lfs" if path.endswith((".safetensors", ".gguf")) else "regular"
