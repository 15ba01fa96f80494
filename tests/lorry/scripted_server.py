"""A real HTTP server that replies from a script, for the tests of the client."""

from __future__ import annotations

import json
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from lorry.transport import service_identity


@dataclass(kw_only=True)
class Reply:
    """Bytes in `body` are sent unchanged, and other values as JSON. `cut` announces more bytes than are sent."""

    body: Any = None
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    cut: bool = False


@dataclass(kw_only=True)
class Seen:
    """A received request."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes


class Script:
    """Replies per method and path (without the query), in order; the last one is repeated.

    It proves its identity with `identity_secret`, unless that is None. The requests for a proof are not in `seen`.
    While it is shutting down, it closes the connection after the proof.
    """

    def __init__(self) -> None:
        self.url = ""
        self.identity_secret: str | None = "5e" * 32
        self.is_shutting_down = False
        self.seen: list[Seen] = []
        self._replies: dict[tuple[str, str], list[Reply]] = defaultdict(list)
        self._lock = threading.Lock()

    def on(self, method: str, path: str, *replies: Reply | dict[str, Any]) -> None:
        self._replies[method, path] += [r if isinstance(r, Reply) else Reply(body=r) for r in replies]

    def answer(self, request: Seen) -> Reply:
        with self._lock:
            self.seen.append(request)
            replies = self._replies.get((request.method, request.path.partition("?")[0]))
            if not replies:
                error = {
                    "message": f"There is no route {request.path}.",
                    "type": "x",
                    "param": None,
                    "code": "no_route",
                }
                return Reply(status=404, body={"error": error})
            return replies.pop(0) if len(replies) > 1 else replies[0]

    def requests(self, method: str, path: str) -> list[Seen]:
        return [r for r in self.seen if r.method == method and r.path.partition("?")[0] == path]


@contextmanager
def serving() -> Iterator[Script]:
    script = Script()
    server = _QuietServer(("127.0.0.1", 0), _handler(script))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    script.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield script
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _QuietServer(ThreadingHTTPServer):
    """Ignores the errors of clients that disconnect."""

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass


def _handler(script: Script) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_any(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            headers = {name.lower(): value for name, value in self.headers.items()}
            reply = self.proof() or script.answer(Seen(method=self.command, path=self.path, headers=headers, body=body))
            content = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
            self.send_response(reply.status)
            for name, value in reply.headers.items():
                self.send_header(name, value)
            self.send_header("content-length", str(len(content) + (1000 if reply.cut else 0)))
            self.end_headers()
            self.wfile.write(content)
            self.close_connection = self.close_connection or reply.cut

        def proof(self) -> Reply | None:
            path, _, query = self.path.partition("?")
            if path != service_identity.PATH or script.identity_secret is None:
                return None
            host, port = self.connection.getsockname()
            nonce = query.removeprefix("nonce=")
            proof = service_identity.expected_proof(script.identity_secret, nonce=nonce, host=host, port=port)
            return Reply(body={"proof": proof}, headers={"connection": "close"} if script.is_shutting_down else {})

        do_GET = do_POST = do_DELETE = handle_any

        def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
            pass

    return Handler
