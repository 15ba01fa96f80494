"""An HTTP connection with timeouts: a client that sends or reads too slowly is disconnected.

uvicorn limits only the wait between two requests. This module also limits headers that never end, a body that trickles
in, and a response that the client does not read.
"""

from __future__ import annotations

import asyncio
import json
import logging
from dataclasses import dataclass
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from catalog.error_texts import ErrorText

MIN_BODY_BYTES = 2**14
"""Bytes of a body that a client must send within `body_seconds`, unless the body ends earlier."""
MIN_RESPONSE_BYTES = 2**18
"""Bytes of a response that a client must receive within `send_seconds` of waiting, unless it receives all waiting
bytes earlier. asyncio resumes a writer after 48 KiB, so one resumption is not enough."""
log = logging.getLogger("lorry.api")


@dataclass(frozen=True, kw_only=True, slots=True)
class Timeouts:
    """Time limits of a client."""

    header_seconds: float = 20.0
    """Time from the connection, or from the first byte of a further request, to the end of the request's headers."""
    body_seconds: float = 60.0
    """Time for each MIN_BODY_BYTES of a request's body, counted while this process reads."""
    send_seconds: float = 60.0
    """Time for each MIN_RESPONSE_BYTES of a response, counted while bytes wait to be sent."""


class HttpConnection(H11Protocol):
    """uvicorn's HTTP protocol with `Timeouts`."""

    timeouts = Timeouts()

    def __init__(self, *args: Any, **given: Any) -> None:
        super().__init__(*args, **given)
        self._num_received = 0
        self._header_timer: asyncio.TimerHandle | None = None
        self._body_timer: asyncio.TimerHandle | None = None
        self._send_timer: asyncio.TimerHandle | None = None
        self._wait_began_at = 0.0
        self._num_waiting = 0
        """Bytes that waited to be sent when the timer started."""
        self._seconds_waited = 0.0
        self._num_taken = 0
        """Bytes that the client received in this period of `send_seconds` before the timer started."""
        self._is_of_ended_response = False
        """Whether the period began with the end of a response. The last bytes of that response may have waited."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        super().connection_made(transport)
        self._header_timer = self.loop.call_later(self.timeouts.header_seconds, self._header_timeout)

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel_header_timer()
        self._cancel_body_timer()
        self._stop_send_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._num_received += len(data)
        super().data_received(data)
        self._watch_request()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch_request()
        self._begin_send_period()
        self._watch_response()
        self._is_of_ended_response = True

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._is_of_ended_response:  # since then, the connection was idle or carried another response
            self._begin_send_period()
        self._watch_response()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_send_timer()
        if self.cycle.response_complete:
            self._watch_response()

    def _watch_request(self) -> None:
        """Start and stop the timers of headers and body by the state of the request."""
        state = self.conn.their_state
        if state is h11.IDLE and self.conn.trailing_data[0]:
            if self._header_timer is None:
                self._header_timer = self.loop.call_later(self.timeouts.header_seconds, self._header_timeout)
        elif state is not h11.IDLE:
            self._cancel_header_timer()
        if state is not h11.SEND_BODY:
            self._cancel_body_timer()
        elif self._body_timer is None:
            self._start_body_timer()

    def _header_timeout(self) -> None:
        self._header_timer = None
        if self.transport.is_closing():
            return
        if self.conn.trailing_data[0]:
            self._send_408()
        self._close("headers", is_abrupt=False)

    def _send_408(self) -> None:
        text = ErrorText.of("request_timeout", seconds=self.timeouts.header_seconds)
        error = {**text.report(), "message": text.sentence(), "type": "invalid_request_error", "param": None}
        body = json.dumps({"error": error}).encode("ascii")
        headers = [("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close")]
        response = h11.Response(status_code=408, headers=headers, reason=b"Request Timeout")
        for event in (response, h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")

    def _start_body_timer(self) -> None:
        self._body_timer = self.loop.call_later(self.timeouts.body_seconds, self._check_body, self._num_received)

    def _check_body(self, num_received: int) -> None:
        """Close the connection if too few bytes arrived. Time in which this process did not read does not count."""
        is_reading = not self.flow.read_paused and not self.cycle.waiting_for_100_continue
        if is_reading and self._num_received - num_received < MIN_BODY_BYTES:
            self._body_timer = None
            self._close("body")
        else:
            self._start_body_timer()

    def _watch_response(self) -> None:
        """Start the timer while bytes wait. Time in which this process produces nothing does not count."""
        self._stop_send_timer()
        self._num_waiting = self.transport.get_write_buffer_size()
        if self._num_waiting:
            self._wait_began_at = self.loop.time()
            remaining = self.timeouts.send_seconds - self._seconds_waited
            self._send_timer = self.loop.call_later(max(0.0, remaining), self._check_response)

    def _stop_send_timer(self) -> None:
        """Stop the timer and add up the bytes received. While the timer runs, no bytes are added to the buffer: writing
        is paused, or the response is complete. So the client has received what the buffer shrank by."""
        if self._send_timer is not None:
            self._send_timer.cancel()
            self._send_timer = None
            self._seconds_waited += self.loop.time() - self._wait_began_at
            self._num_taken += max(0, self._num_waiting - self.transport.get_write_buffer_size())

    def _begin_send_period(self) -> None:
        self._stop_send_timer()
        self._is_of_ended_response = False
        self._seconds_waited, self._num_taken = 0.0, 0

    def _check_response(self) -> None:
        self._stop_send_timer()
        is_slow = self._num_taken < MIN_RESPONSE_BYTES and self.transport.get_write_buffer_size() > 0
        if is_slow and (self.flow.write_paused or self.cycle.response_complete):
            self._close("response")
        else:
            self._begin_send_period()
            self._is_of_ended_response = self.cycle.response_complete
            self._watch_response()

    def _close(self, reason: str, *, is_abrupt: bool = True) -> None:
        """Close the connection. An abrupt close discards unsent bytes; a normal close would wait for them."""
        address = self.client[0] if self.client else None
        log.info("closed a connection that made no progress: part=%s address=%s", reason, address)
        if is_abrupt:
            self.transport.abort()
        else:
            self.transport.close()

    def _cancel_header_timer(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _cancel_body_timer(self) -> None:
        if self._body_timer is not None:
            self._body_timer.cancel()
            self._body_timer = None
