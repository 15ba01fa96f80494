"""Sends the answers of this worker to the API processes that wait for them; api/inference/replies.py receives them.

Each API process has one connection, which begins with the token of its address. Threads read and write, so that a slow
API process delays nothing else. A failed connection is reported once, and loses its lines: the requests that it carried
must be answered again.
"""

from __future__ import annotations

import json
import logging
import queue
import socket
import struct
import threading
from contextlib import suppress

from worker.protocol.mailbox import Json

CONNECT_SECONDS = 5.0
SEND_SECONDS = 30
MAX_QUEUED_BYTES = 2**26
"""Maximum size of the events that wait to be sent to one API process. Beyond it, the connection is ended."""
MAX_LINE_BYTES = 2**16
log = logging.getLogger(__name__)


class _Connection:
    """One API process. After a failure it drops what it is given."""

    def __init__(self, address: str) -> None:
        """address: TOKEN@HOST:PORT."""
        self._token, _, self._place = address.rpartition("@")
        self.has_failed = False
        self._queue: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._num_queued_bytes = 0
        self._counting = threading.Lock()
        self._stopped: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._socket: socket.socket | None = None
        self._thread = threading.Thread(target=self._write, name="replies", daemon=True)
        self._thread.start()

    def send(self, line: bytes) -> None:
        if self.has_failed:
            return
        self._count(len(line))
        self._queue.put(line)
        if self._num_queued_bytes > MAX_QUEUED_BYTES:
            log.warning("The API server at %s receives answers too slowly.", self._place)
            self.abandon()

    def _count(self, num_bytes: int) -> None:
        with self._counting:
            self._num_queued_bytes += num_bytes

    def stopped(self) -> list[str]:
        """Return the requests that their clients have abandoned, once each."""
        found: list[str] = []
        with suppress(queue.Empty):
            while True:
                found.append(self._stopped.get_nowait())
        return found

    def abandon(self) -> None:
        """End the connection at once."""
        self.has_failed = True
        if self._socket is not None:
            with suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
        self._queue.put(None)

    def close(self) -> None:
        """Send what is queued, then close. Waits at most CONNECT_SECONDS."""
        self._queue.put(None)
        self._thread.join(CONNECT_SECONDS)
        self.abandon()

    def _write(self) -> None:
        try:
            host, _, port = self._place.rpartition(":")
            with socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS) as connection:
                self._socket = connection
                connection.settimeout(None)  # a timeout of the socket would also apply to the thread that reads
                limit = struct.pack("ll", SEND_SECONDS, 0)
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                threading.Thread(target=self._read, args=(connection.dup(),), name="stops", daemon=True).start()
                try:
                    connection.sendall(self._token.encode() + b"\n")
                    while (line := self._queue.get()) is not None and not self.has_failed:
                        connection.sendall(line)
                        self._count(-len(line))
                finally:
                    with suppress(OSError):  # also ends the thread that reads, which has a duplicate of the socket
                        connection.shutdown(socket.SHUT_RDWR)
        except (OSError, ValueError) as error:
            if not self.has_failed:
                log.warning("The API server at %s does not receive answers: %s", self._place, error)
        self.abandon()

    def _read(self, connection: socket.socket) -> None:
        with suppress(OSError, ValueError, KeyError, TypeError), connection, connection.makefile("rb") as lines:
            while line := lines.readline(MAX_LINE_BYTES):
                self._stopped.put(str(json.loads(line)["request_id"]))
        self.abandon()


class ReplyConnections:
    """The connections to all API processes whose requests this worker answers."""

    def __init__(self) -> None:
        self._connections: dict[str, _Connection] = {}

    def send(self, address: str, *, request_id: str, claim_id: str, event: Json) -> None:
        """Queue an event for the process at `address`. It is dropped if the connection has failed."""
        line = json.dumps({"request_id": request_id, "claim_id": claim_id, "event": event}).encode() + b"\n"
        if address not in self._connections:
            self._connections[address] = _Connection(address)
        self._connections[address].send(line)

    def stopped(self) -> set[str]:
        """Return the requests that their clients have abandoned, once each."""
        return {request_id for connection in self._connections.values() for request_id in connection.stopped()}

    def failed(self) -> set[str]:
        """Return the addresses whose connection has failed, once each. Later events open another connection."""
        found = {address for address, connection in self._connections.items() if connection.has_failed}
        for address in found:
            del self._connections[address]
        return found

    def close(self) -> None:
        for connection in self._connections.values():
            connection.close()
        self._connections.clear()
