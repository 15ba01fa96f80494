"""A real HTTP server on loopback that receives webhooks."""

from __future__ import annotations

import queue
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

WAIT_SECONDS = 60.0
"""Long enough for a heavily loaded machine."""


@dataclass(frozen=True, kw_only=True)
class Received:
    path: str
    headers: dict[str, str]
    body: bytes


@dataclass(kw_only=True)
class Answer:
    status: int = 204
    headers: dict[str, str] = field(default_factory=dict[str, str])
    body: bytes = b""


class Receiver:
    """Records requests and answers them with `answer`, which may block to simulate a slow receiver."""

    def __init__(self) -> None:
        self.url = ""
        self.answer: Callable[[Received], Answer] = lambda _: Answer()
        self._received: queue.Queue[Received] = queue.Queue()

    def take(self) -> Received:
        """Wait for the next request and return it."""
        return self._received.get(timeout=WAIT_SECONDS)

    def is_quiet(self) -> bool:
        return self._received.empty()

    def put(self, request: Received) -> Answer:
        self._received.put(request)
        return self.answer(request)


@contextmanager
def receiving(context: ssl.SSLContext | None = None) -> Iterator[Receiver]:
    receiver = Receiver()
    server = _Quiet(("127.0.0.1", 0), _handler(receiver))
    if context is not None:
        server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    receiver.url = f"http{'s' if context else ''}://127.0.0.1:{server.server_address[1]}"
    try:
        yield receiver
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Quiet(ThreadingHTTPServer):
    """Ignores the errors of senders that disconnect."""

    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass


def _handler(receiver: Receiver) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            headers = {name.lower(): value for name, value in self.headers.items()}
            answer = receiver.put(Received(path=self.path, headers=headers, body=body))
            self.send_response(answer.status)
            for name, value in answer.headers.items():
                self.send_header(name, value)
            if "transfer-encoding" not in answer.headers:
                self.send_header("content-length", str(len(answer.body)))
            self.end_headers()
            self.wfile.write(answer.body)

        def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
            pass

    return Handler
