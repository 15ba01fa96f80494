"""A TCP proxy that fails on demand: partitions, refused connections, slowness, and HTTP responses of its own.

It listens on loopback by default and runs in a thread of this process. It does not inspect the traffic, except for the
first line of an HTTP request.
"""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Literal

CHUNK_BYTES = 16_384
REQUEST = re.compile(rb"(GET|PUT|POST|HEAD|DELETE) (\S+) HTTP/1\.1\r\n")
Verdict = Literal["pass", "lose the answer"] | bytes
"""The decision about a request.

Pass it on; pass it on and drop its response with the connection; or respond with these bytes.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestLine:
    """The first line of an HTTP request."""

    method: str
    path: str


class FaultProxy:
    """`judge` decides about each HTTP request. By default all requests are passed on."""

    def __init__(self, host: str, port: int, *, address: str = "127.0.0.1") -> None:
        self.address, self.port = address, 0
        self.judge: Callable[[RequestLine], Verdict] = lambda _: "pass"
        self.bytes_per_second: float | None = None
        """The rate of each connection toward the server."""
        self._target = (host, port)
        self._is_refusing = False
        self._loop = asyncio.new_event_loop()
        self._whole = asyncio.Event()
        self._open: set[asyncio.StreamWriter] = set()

    def part(self) -> None:
        """Hold all traffic without closing connections. Sent data waits until `heal`."""
        self._loop.call_soon_threadsafe(self._whole.clear)

    def refuse(self) -> None:
        """Close all connections, and new ones as soon as they are opened."""
        self._is_refusing = True
        self._loop.call_soon_threadsafe(self._close_all)

    def heal(self) -> None:
        """Pass all traffic again."""
        self._is_refusing, self.bytes_per_second = False, None
        self.judge = lambda _: "pass"
        self._loop.call_soon_threadsafe(self._whole.set)

    def run(self, is_ready: threading.Event) -> None:
        asyncio.set_event_loop(self._loop)
        self._whole.set()
        server = self._loop.run_until_complete(asyncio.start_server(self._serve, self.address, 0))
        self.port = server.sockets[0].getsockname()[1]
        is_ready.set()
        self._loop.run_forever()
        server.close()
        self._close_all()
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        self._loop.run_until_complete(asyncio.sleep(0))
        self._loop.close()

    def end(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open.add(writer)
        try:
            if self._is_refusing:
                return
            with suppress(OSError, asyncio.CancelledError):
                await self._connect(reader, writer)
        finally:
            self._open.discard(writer)
            writer.close()

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        to_reader, to_writer = await asyncio.open_connection(*self._target)
        self._open.add(to_writer)
        connection = _Connection(proxy=self, client=writer, server=to_writer)
        pumps = [
            asyncio.create_task(self._pump(reader, connection.to_server)),
            asyncio.create_task(self._pump(to_reader, connection.to_client)),
        ]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for pump in pumps:
                pump.cancel()
            self._open.discard(to_writer)
            to_writer.close()

    async def _pump(self, reader: asyncio.StreamReader, put: Callable[[bytes], object]) -> None:
        """Copy until an end closes, or until `put` returns False."""
        with suppress(OSError):
            while chunk := await reader.read(CHUNK_BYTES):
                await self._whole.wait()
                if self.bytes_per_second is not None:
                    await asyncio.sleep(len(chunk) / self.bytes_per_second)
                if put(chunk) is False:
                    return

    def _close_all(self) -> None:
        for writer in list(self._open):
            writer.close()


@dataclass(kw_only=True, slots=True)
class _Connection:
    """A connection, with the decision about its current request."""

    proxy: FaultProxy
    client: asyncio.StreamWriter
    server: asyncio.StreamWriter
    loses_answer: bool = False

    def to_server(self, chunk: bytes) -> bool:
        """Pass a chunk on. The rest of a rejected request is never read: its body breaks off in the middle."""
        request = REQUEST.match(chunk)
        if request is not None:
            first_line = RequestLine(method=request[1].decode(), path=request[2].decode())
            verdict = self.proxy.judge(first_line)
            self.loses_answer = verdict == "lose the answer"
            if isinstance(verdict, bytes):
                self.client.write(verdict)
                return False
        self.server.write(chunk)
        return True

    def to_client(self, chunk: bytes) -> bool:
        if self.loses_answer:
            return False
        self.client.write(chunk)
        return True


def http_answer(status: str, body: str) -> bytes:
    """Return a complete response, after which the connection closes. `status`: "500 Internal Server Error"."""
    head = f"HTTP/1.1 {status}\r\ncontent-type: application/xml\r\ncontent-length: {len(body)}\r\nconnection: close"
    return f"{head}\r\n\r\n{body}".encode()


@contextmanager
def fault_proxy(host: str, port: int, *, address: str = "127.0.0.1") -> Iterator[FaultProxy]:
    """Run a proxy in front of `host`:`port` during the block. `address` is where the proxy itself listens."""
    proxy, is_ready = FaultProxy(host, port, address=address), threading.Event()
    thread = threading.Thread(target=proxy.run, args=(is_ready,), name="fault-proxy", daemon=True)
    thread.start()
    is_ready.wait()
    try:
        yield proxy
    finally:
        proxy.end()
        thread.join()
