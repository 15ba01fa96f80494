"""Round-trip time of a message to another process over loopback, on the same core and between two cores."""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
from statistics import median

ROUNDS, BATCH = 20, 200


def round_trip_seconds(cores: tuple[int, int]) -> float:
    """Return the median of several rounds between processes on the two cores, which may be the same."""
    kept = os.sched_getaffinity(0)
    with socket.create_server(("127.0.0.1", 0)) as server:
        echo = multiprocessing.get_context("fork").Process(target=_echo, args=(server.getsockname(), cores[1]))
        echo.start()
        connection, _ = server.accept()
        try:
            os.sched_setaffinity(0, {cores[0]})
            return median(_rounds(connection))
        finally:
            os.sched_setaffinity(0, kept)
            connection.close()
            echo.join()


def _rounds(connection: socket.socket) -> list[float]:
    found: list[float] = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        for _ in range(BATCH):
            connection.sendall(b"x" * 100)
            connection.recv(1000)
        found.append((time.perf_counter() - began) / BATCH)
    return found


def _echo(address: tuple[str, int], core: int) -> None:
    os.sched_setaffinity(0, {core})
    with socket.create_connection(address) as connection:
        while received := connection.recv(1000):
            connection.sendall(received)
