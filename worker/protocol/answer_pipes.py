"""The two named pipes of a trainer that carry inference: requests to it, and tokens from it. This module contains both
ends.

A message is one line of JSON. To the trainer: {"verb": "answer" | "stop_answering", "body"}, as in mailbox.py. From it:
the events `answering`, `generated`, `answered` and `unanswered`. Each end opens its pipe for reading and writing, so
that neither waits for the other, and no message is lost if one of them opens it late.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import select
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from worker.protocol.mailbox import LONGEST_LINE_BYTES, Json, MalformedEvent, TrainerMessage, parse_event

READ_BYTES = 2**16
PIPE_BYTES = 2**20
"""Capacity of a pipe where the system allows it."""
PARTIAL_SECONDS = 0.2
"""How long a trainer waits for the rest of a message that has begun to arrive."""


class Lines:
    """Divides what arrives at a pipe into lines."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self.partial = bytearray()
        """The begin of a line whose end has not arrived."""

    def read(self) -> list[bytes]:
        """Return the lines that are complete now."""
        lines: list[bytes] = []
        with suppress(BlockingIOError):
            while part := os.read(self._fd, READ_BYTES):
                self.partial += part
                if b"\n" in part:
                    *some, rest = bytes(self.partial).split(b"\n")
                    lines += some
                    self.partial = bytearray(rest)
                if len(self.partial) > LONGEST_LINE_BYTES:
                    break
        return lines


class WorkerPipes:
    """The worker's end, in its event loop."""

    def __init__(
        self, requests: Path, tokens: Path, *, receive: Callable[[Json], None], fail: Callable[[MalformedEvent], None]
    ) -> None:
        """receive: called with each event. fail: called once, if the trainer writes something else."""
        self._loop = asyncio.get_running_loop()
        self._requests, self._tokens = _opened(requests), _opened(tokens)
        self._receive, self._fail = receive, fail
        self._unsent = bytearray()
        self._lines = Lines(self._tokens)
        self._loop.add_reader(self._tokens, self._read)

    def send(self, verb: str, body: Json) -> None:
        """Queue a message, which is sent as fast as the trainer reads."""
        self._unsent += json.dumps({"verb": verb, "body": body}).encode() + b"\n"
        self._write()

    def close(self) -> None:
        self._loop.remove_reader(self._tokens)
        self._loop.remove_writer(self._requests)
        os.close(self._tokens)
        os.close(self._requests)

    def _write(self) -> None:
        with suppress(BlockingIOError):
            del self._unsent[: os.write(self._requests, self._unsent[:PIPE_BYTES])]
        if self._unsent:
            self._loop.add_writer(self._requests, self._write)
        else:
            self._loop.remove_writer(self._requests)

    def _read(self) -> None:
        try:
            for line in self._lines.read():
                self._receive(parse_event(line))
            if len(self._lines.partial) > LONGEST_LINE_BYTES:
                raise MalformedEvent(f"is longer than {LONGEST_LINE_BYTES:,} bytes")
        except MalformedEvent as error:
            self._loop.remove_reader(self._tokens)
            self._fail(error)


class TrainerPipes:
    """The trainer's end, on its leading rank."""

    def __init__(self, requests: Path, tokens: Path) -> None:
        self._requests, self._tokens = _opened(requests), os.open(tokens, os.O_RDWR)
        self._lines = Lines(self._requests)

    def take(self) -> list[TrainerMessage]:
        """Return the messages that have arrived. A long one is waited for, because a pipe is smaller."""
        lines = self._lines.read()
        while self._lines.partial and self.wait(PARTIAL_SECONDS):
            lines += self._lines.read()
        return [TrainerMessage(**json.loads(line)) for line in lines]

    def wait(self, seconds: float) -> bool:
        """Return True as soon as there is something to take, or False after `seconds`."""
        return bool(select.select([self._requests], [], [], seconds)[0])

    def write(self, event: Json) -> None:
        """Send an event. Waits while the pipe is full."""
        line = json.dumps(event | {"seconds": round(time.monotonic(), 4)}).encode() + b"\n"
        while line:
            line = line[os.write(self._tokens, line) :]

    def close(self) -> None:
        os.close(self._requests)
        os.close(self._tokens)


def _opened(path: Path) -> int:
    """Return a descriptor on which reads and writes do not block."""
    fd = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_NOFOLLOW)
    set_size: Any = getattr(fcntl, "F_SETPIPE_SZ", None)
    if set_size is not None:
        with suppress(OSError):  # the system's limit for this user
            fcntl.fcntl(fd, set_size, PIPE_BYTES)
    return fd
