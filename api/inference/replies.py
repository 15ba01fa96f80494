"""Receives the answers to this process's inference requests from workers, on a port of its own.

The row of a request has TOKEN@HOST:PORT. A worker connects there and sends the token as the first line, which shows
that it reads the same database. Each further line is a JSON object: {"request_id", "claim_id", "event"}. The database
decides whether the claim may answer the request. This process replies {"request_id"} for a request that its client has
abandoned, so that the worker stops answering it.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import logging
import secrets
import socket
import sys
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, cast

from anyio import CapacityLimiter, to_thread
from sqlalchemy import make_url

from catalog.db.database import Database
from catalog.errors import LorryError
from catalog.inference import claims, requests
from catalog.settings import Settings

MAX_LINE_BYTES = 2**20
MAX_CONNECTIONS = 256
"""Maximum number of connections of workers. Each worker has one."""
MAX_STRANGERS = 16
"""Maximum number of connections that have not sent the token yet. One more closes the oldest of them: a worker sends
the token at once, so others can't take its place."""
TOKEN_SECONDS = 5.0
"""Time in which a connection must send the token."""
RETRY_SECONDS = 1.0
"""Wait before a claim is checked again, if the database does not answer."""
CHECK_THREADS = 4
"""Maximum number of claims that are checked at the same time."""
CHECK_SECONDS = 15.0
"""Interval of the checks that the open requests still have rows."""
MAX_ID_CHARS = 64
TOKEN_CHARS = 32
MAX_UNREAD_BYTES = 2**16
"""Maximum size of the replies that a worker has not read. Beyond it, the connection is closed."""
MAX_PENDING_BYTES = 2**20
"""Maximum size of the events that a client has not read for CATCH_UP_SECONDS. Beyond it, the request is abandoned."""
CATCH_UP_SECONDS = 60.0
MAX_BURST_BYTES = 2**24
"""Maximum size of the events that a client has not read, at any time. After a pause, a worker sends at once what it has
computed meanwhile: about 1 MiB per second for 16 answers with 20 log-probabilities for each token."""
SHARE_BYTES = 2**16
"""After this many bytes of one connection, the clients' tasks run before the next line is read. Otherwise a client that
had no chance to take its events would seem slow."""
DATABASE_PORT = 5432
Event = dict[str, Any]
log = logging.getLogger("lorry.api")


class TooSlow(Exception):
    """The client does not read its answer."""


class Reply:
    """The events of one request, in order, from the worker that holds it now."""

    def __init__(self, request_id: str, close: Callable[[Reply], None]) -> None:
        self.request_id = request_id
        self.claim_id: str | None = None
        """The claim whose events are accepted."""
        self.stale_claims: set[str] = set()
        """Claims that were rejected. The database is not asked again for each line that is on its way."""
        self.checking = asyncio.Lock()
        """Held while the database is asked for a claim, so that a late result does not replace a newer one."""
        self.is_submitted = False
        """The request has a row. If the row is deleted, the request fails."""
        self.connection: asyncio.StreamWriter | None = None
        self._events: deque[tuple[int, Event]] = deque()
        self._num_bytes = 0
        self._behind_since: float | None = None
        """Since when more than MAX_PENDING_BYTES are pending, by the monotonic clock."""
        self._change: asyncio.Future[None] | None = None
        self._is_too_slow = False
        self._close = close

    def put(self, event: Event, num_bytes: int) -> None:
        if self._is_too_slow:
            return
        self._events.append((num_bytes, event))
        self._num_bytes += num_bytes
        self._check_speed()
        if self._change is not None and not self._change.done():
            self._change.set_result(None)

    def take(self) -> Event | None:
        """Return the next event, or None if there is none yet. Raises TooSlow.

        Returns {"type": "restarted"} if another worker begins.
        """
        self._check_speed()
        if self._is_too_slow:
            raise TooSlow
        if not self._events:
            return None
        num_bytes, event = self._events.popleft()
        self._num_bytes -= num_bytes
        if self._num_bytes <= MAX_PENDING_BYTES:
            self._behind_since = None
        return event

    def _check_speed(self) -> None:
        """Abandon the request if its client reads too slowly."""
        if self._num_bytes <= MAX_PENDING_BYTES:
            return
        now = monotonic()
        self._behind_since = now if self._behind_since is None else self._behind_since
        if self._num_bytes > MAX_BURST_BYTES or now - self._behind_since >= CATCH_UP_SECONDS:
            self._is_too_slow = True
            self._events.clear()
            self.close()

    def changed(self) -> asyncio.Future[None]:
        """Return a future that is done after the next event. Call it when `take` has returned None."""
        self._change = asyncio.get_running_loop().create_future()
        return self._change

    def restart(self) -> None:
        """Forget the claim: its worker is lost, and another one may begin again."""
        self.claim_id = self.connection = None
        self.put({"type": "restarted"}, 0)

    def close(self) -> None:
        """Stop waiting for events: the worker stops answering."""
        self._close(self)


@dataclass(kw_only=True, slots=True, eq=False)
class _Check:
    """The events of a claim that the database has not confirmed yet."""

    reply: Reply
    claim_id: str
    connection: asyncio.StreamWriter
    events: list[tuple[Event, int]] = field(default_factory=list[tuple[Event, int]])
    num_bytes: int = 0
    task: asyncio.Task[None] | None = None


class Replies:
    """The requests of this process that wait for an answer, and the server to which workers send it."""

    def __init__(self, db: Database, settings: Settings, *, address: str = "") -> None:
        """address: LORRY_REPLY_ADDRESS."""
        self.address = ""
        """TOKEN@HOST:PORT for the rows of requests, once the server runs."""
        host, _, port = address.rpartition(":")
        self._db = db
        self._port = int(port or 0)
        self._host = host or _own_host(settings)
        self._listens_at = "" if host else self._host
        """Empty: all addresses. A given host may be that of a proxy or of a published port."""
        self._open: dict[str, Reply] = {}
        self._checks: dict[tuple[str, str], _Check] = {}
        """By the ids of the request and of the claim."""
        self._check_threads: CapacityLimiter | None = None
        self._server: asyncio.Server | None = None
        self._token = secrets.token_hex(TOKEN_CHARS // 2)
        self._connections: set[asyncio.StreamWriter] = set()
        """Those of workers."""
        self._strangers: dict[asyncio.StreamWriter, None] = {}
        """Connections that have not sent the token, oldest first."""
        self._watching: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begin to listen."""
        receive, host = self._receive, self._host
        self._check_threads = CapacityLimiter(CHECK_THREADS)
        self._server = await asyncio.start_server(receive, self._listens_at or None, self._port, limit=MAX_LINE_BYTES)
        port = self._server.sockets[0].getsockname()[1]
        self.address = f"{self._token}@" + (f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
        self._watching = asyncio.create_task(self._watch_rows())

    async def stop(self) -> None:
        """Close all connections. The workers release the requests."""
        if self._watching is not None:
            self._watching.cancel()
        for check in self._checks.values():
            if check.task is not None:
                check.task.cancel()
        if self._server is not None:
            self._server.close()
            for connection in (*self._connections, *self._strangers):
                connection.close()
            await self._server.wait_closed()

    def open(self, request_id: str) -> Reply:
        """Begin to wait for the answer to a request. Close the result in every case."""
        reply = self._open[request_id] = Reply(request_id, self._forget)
        return reply

    async def _watch_rows(self) -> None:
        """Fail the requests whose rows were deleted, because too many workers could not answer them."""
        while True:
            await asyncio.sleep(CHECK_SECONDS)
            waiting = [reply for reply in self._open.values() if reply.is_submitted]
            if not waiting:
                continue
            try:
                ids = [reply.request_id for reply in waiting]
                existing = await to_thread.run_sync(requests.existing, self._db, ids)
            except LorryError as error:
                log.warning("The open inference requests could not be checked: %s", error)
                continue
            except Exception:  # the loop must survive any failure of one check
                log.exception("crash in the check of the open inference requests")
                continue
            for reply in waiting:
                if reply.request_id not in existing:
                    reply.put({"type": "unanswered", "error": claims.FAILED}, 0)

    def _forget(self, reply: Reply) -> None:
        if self._open.get(reply.request_id) is reply:
            del self._open[reply.request_id]
        connection, reply.connection = reply.connection, None
        if connection is not None:
            _send_stop(connection, reply.request_id)

    async def _receive(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            if await self._is_worker(reader, writer):
                self._connections.add(writer)
                await self._read(reader, writer)
        except (OSError, ValueError, asyncio.LimitOverrunError):
            log.warning("A connection for answers failed.")
        finally:
            self._connections.discard(writer)
            writer.close()
            with suppress(OSError):  # a lost machine causes ETIMEDOUT or EHOSTUNREACH, which are no ConnectionError
                await writer.wait_closed()
            await self._lose(writer)

    async def _is_worker(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Return whether the connection sends the token in time, and there is a place for it."""
        if len(self._strangers) >= MAX_STRANGERS:
            oldest = next(iter(self._strangers))
            del self._strangers[oldest]
            oldest.transport.abort()
        self._strangers[writer] = None
        try:
            async with asyncio.timeout(TOKEN_SECONDS):
                line = await reader.readexactly(TOKEN_CHARS + 1)
        except asyncio.IncompleteReadError:  # a probe of the port
            return False
        finally:
            self._strangers.pop(writer, None)
        if not secrets.compare_digest(line, self._token.encode() + b"\n"):
            log.warning("A connection for answers did not send the token of this server, and was closed.")
            return False
        if len(self._connections) >= MAX_CONNECTIONS:
            log.warning("A worker's connection for answers was rejected: %d are open.", MAX_CONNECTIONS)
            return False
        _detect_loss(writer.get_extra_info("socket"))
        return True

    async def _read(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Pass on the lines of a worker until it closes the connection."""
        num_bytes = 0
        while line := await reader.readline():
            if not self._take(line, writer):
                log.warning("A connection for answers sent a line that is not an answer, and was closed.")
                return
            num_bytes += len(line)
            if num_bytes >= SHARE_BYTES:
                num_bytes = 0
                await asyncio.sleep(0)

    def _take(self, line: bytes, writer: asyncio.StreamWriter) -> bool:
        """Pass an event to its request. Returns False for a line that is no answer."""
        try:
            sent = cast(Event, json.loads(line))
            request_id, claim_id, event = str(sent["request_id"]), str(sent["claim_id"]), cast(Event, sent["event"])
            event["type"]
        except (ValueError, KeyError, TypeError, RecursionError):
            return False
        if len(request_id) > MAX_ID_CHARS:
            return False
        reply = self._open.get(request_id)
        if reply is None or (reply.claim_id == claim_id and reply.connection is not writer):
            _send_stop(writer, request_id)  # in the second case, another connection has lost lines of this claim
            return True
        if reply.claim_id != claim_id:
            if claim_id not in reply.stale_claims:  # otherwise the worker already has the order to stop
                self._hold(reply, claim_id, writer, (event, len(line)))
            return True
        reply.put(event, len(line))
        return True

    def _hold(self, reply: Reply, claim_id: str, writer: asyncio.StreamWriter, event: tuple[Event, int]) -> None:
        """Keep an event until the database has confirmed its claim. The connection's other requests continue.

        With too many events, the claim is given up: its lease expires, and another worker answers.
        """
        key = (reply.request_id, claim_id)
        check = self._checks.get(key)
        if check is None:
            check = self._checks[key] = _Check(reply=reply, claim_id=claim_id, connection=writer)
            check.task = asyncio.create_task(self._confirm(check))
            check.task.add_done_callback(lambda _: self._checks.pop(key))
        elif check.connection is not writer:  # that connection has lost lines of this claim
            _send_stop(writer, reply.request_id)
            return
        check.events.append(event)
        check.num_bytes += event[1]
        if check.num_bytes > MAX_BURST_BYTES:
            self._give_up(check)

    async def _confirm(self, check: _Check) -> None:
        """Ask the database for the claim until it answers. Then pass the events to the request, or drop them."""
        reply = check.reply
        async with reply.checking:
            is_held: bool | None = None
            while is_held is None and self._open.get(reply.request_id) is reply:
                is_held = await to_thread.run_sync(self._holds, check, limiter=self._check_threads)
                if is_held is None:
                    await asyncio.sleep(RETRY_SECONDS)
            if not is_held or self._open.get(reply.request_id) is not reply:
                self._give_up(check)
            if check.claim_id in reply.stale_claims:
                return
            if reply.claim_id is not None:
                reply.restart()
            reply.claim_id, reply.connection = check.claim_id, check.connection
            for event, num_bytes in check.events:
                reply.put(event, num_bytes)

    def _give_up(self, check: _Check) -> None:
        check.events.clear()
        check.reply.stale_claims.add(check.claim_id)
        _send_stop(check.connection, check.reply.request_id)

    def _holds(self, check: _Check) -> bool | None:
        """Return None if the database does not answer."""
        try:
            return requests.is_held(self._db, check.reply.request_id, check.claim_id)
        except LorryError as error:
            log.warning("The claim of an answer could not be checked: %s", error)
            return None
        except Exception:  # the request must not wait forever
            log.exception("crash in the check of a claim")
            return False

    async def _lose(self, connection: asyncio.StreamWriter) -> None:
        """Release the requests that the worker of a closed connection was answering."""
        checks = [check.task for check in self._checks.values() if check.connection is connection and check.task]
        if checks:
            await asyncio.wait(checks)
        lost = [(reply, reply.claim_id) for reply in self._open.values() if reply.connection is connection]
        for reply, _ in lost:
            reply.connection = None
        for reply, claim_id in lost:
            assert claim_id is not None
            may_continue = True
            try:
                may_continue = await to_thread.run_sync(requests.release, self._db, reply.request_id, claim_id)
            except LorryError as error:  # its lease expires
                log.warning("Request %s was not released: %s", reply.request_id, error)
            if reply.claim_id == claim_id:
                reply.restart()
                if not may_continue:
                    reply.put({"type": "unanswered", "error": claims.FAILED}, 0)


def _send_stop(connection: asyncio.StreamWriter, request_id: str) -> None:
    if connection.transport.get_write_buffer_size() > MAX_UNREAD_BYTES:
        connection.close()
    if not connection.is_closing():
        connection.write(json.dumps({"request_id": request_id}).encode() + b"\n")


def _detect_loss(connected: socket.socket) -> None:
    """Let the system close the connection if the worker's machine is lost: on Linux after two minutes."""
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if sys.platform == "linux":
        for option, value in ((socket.TCP_KEEPIDLE, 60), (socket.TCP_KEEPINTVL, 15), (socket.TCP_KEEPCNT, 4)):
            connected.setsockopt(socket.IPPROTO_TCP, option, value)


def _own_host(settings: Settings) -> str:
    """Return the address of this machine from which it reaches the database. Workers use the same database, so they
    reach this machine there. For SQLite and a local database it is the loopback address."""
    url = make_url(settings.resolved_database_url())
    if url.get_backend_name() == "sqlite" or not url.host:
        return "127.0.0.1"
    try:
        family, kind, _, _, place = socket.getaddrinfo(url.host, url.port or DATABASE_PORT, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(place)  # a datagram socket sends nothing here
            host = str(probe.getsockname()[0])
    except OSError:
        return "127.0.0.1"
    return host if not ipaddress.ip_address(host.partition("%")[0]).is_unspecified else "127.0.0.1"
