"""A load generator in a separate process: `python -m benchmarks.api.load` reads a Load as one line of JSON.

It writes a report as JSON. Connections are kept open, and no client library adds overhead.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any
from urllib.parse import urlsplit

from benchmarks.workload import ROOT


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    url: str
    key: str
    method: str
    paths: list[str]
    """Requested in rotation."""
    body: dict[str, Any] | None = None
    connections: int = 16
    seconds: float = 5.0
    rate: float | None = None
    """Requests per second, started on schedule whether earlier ones are answered or not. None: as many as possible."""


def run(load: Load) -> dict[str, Any]:
    """Run a load in another process. Return its report: answered and refused requests, and percentiles of seconds."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.api.load"],
        input=json.dumps(asdict(load)),
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
    )
    return json.loads(done.stdout)


async def measure(load: Load) -> dict[str, Any]:
    waits: list[float] = []
    refused: dict[int, int] = {}
    began = time.perf_counter()
    ends = began + load.seconds
    turn = iter(range(10**9))
    messages = [_message(load, path) for path in load.paths]

    async def ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, due: float) -> None:
        writer.write(messages[next(turn) % len(messages)])
        status = await _answer(reader)
        waits.append(time.perf_counter() - due)
        if status >= 400:
            refused[status] = refused.get(status, 0) + 1

    async def connection(number: int) -> None:
        address = urlsplit(load.url)
        reader, writer = await asyncio.open_connection(address.hostname, address.port, limit=2**22)
        due = began + (number / load.rate if load.rate else 0.0)
        while max(due, time.perf_counter()) < ends:
            if load.rate:
                await asyncio.sleep(max(0.0, due - time.perf_counter()))
                await ask(reader, writer, due)
                due += load.connections / load.rate
            else:
                await ask(reader, writer, time.perf_counter())
        writer.close()
        await writer.wait_closed()

    await asyncio.gather(*(connection(number) for number in range(load.connections)))
    seconds = time.perf_counter() - began
    waits.sort()
    return {
        "requests": len(waits),
        "seconds": seconds,
        "refused": refused,
        **{f"p{part}_seconds": _part(waits, part) for part in (50, 95, 99)},
        "longest_seconds": waits[-1] if waits else None,
    }


def _message(load: Load, path: str) -> bytes:
    body = b"" if load.body is None else json.dumps(load.body).encode()
    head = f"{load.method} {path} HTTP/1.1\r\nhost: 127.0.0.1\r\nauthorization: Bearer {load.key}\r\n"
    if body:
        head += f"content-type: application/json\r\ncontent-length: {len(body)}\r\n"
    return f"{head}\r\n".encode() + body


async def _answer(reader: asyncio.StreamReader) -> int:
    head = await reader.readuntil(b"\r\n\r\n")
    length = int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0] or 0)
    if length:
        await reader.readexactly(length)
    return int(head[9:12])


def _part(waits: list[float], percent: int) -> float | None:
    return waits[min(len(waits) - 1, len(waits) * percent // 100)] if waits else None


if __name__ == "__main__":
    print(json.dumps(asyncio.run(measure(Load(**json.loads(sys.stdin.readline()))))))
