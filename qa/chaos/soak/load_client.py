"""`python -m qa.chaos.soak.load_client`: a client in a separate process that sends requests at a low, constant rate.

It records each response as a line of JSON: kind of request, time, latency, status. It reads orders as lines of JSON:
{"jobs": [{"key", "body"}, …], "every": SECONDS} submits these jobs, one after the other. It exits at the end of its
input. A submission is repeated with the same key until it is accepted.
"""

from __future__ import annotations

import http.client
import json
import queue
import random
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO
from urllib.parse import urlsplit

GET_SECONDS, LIST_SECONDS = 0.25, 0.5
"""Intervals between two such requests."""
TIMEOUT_SECONDS = 60.0
AGAIN_SECONDS = 0.5
"""Pause before a submission without a response is repeated."""
MAX_WAIT_SECONDS = 5.0
JOBS = "/v1/fine_tuning/jobs"
JsonObject = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One request. at: its beginning, in seconds since 1970. status: 0 if there was no response."""

    what: str
    at: float
    seconds: float
    status: int
    retry_after: str | None = None
    told: str = ""
    """The code of an error, or the reason why there was no response."""
    key: str | None = None
    job_id: str | None = None

    @property
    def until(self) -> float:
        return self.at + self.seconds


class Client:
    """Uses a new connection for each request, so that no connection to an exited API server remains."""

    def __init__(self, url: str, api_key: str, out: TextIO) -> None:
        self._address = urlsplit(url)
        self._headers = {"authorization": f"Bearer {api_key}"}
        self._out = out
        self._lock = threading.Lock()
        self.job_ids: list[str] = []
        self.is_over = threading.Event()

    def ask(self, what: str, method: str, path: str, *, body: Any = None, key: str | None = None) -> Sample:
        began, at = time.monotonic(), time.time()
        status, retry_after, told, job_id = 0, None, "", None
        try:
            status, retry_after, answer = self._exchange(method, path, body, key)
            told = str((answer.get("error") or {}).get("code") or "") if status >= 400 else ""
            job_id = answer.get("id") if key is not None and status == 200 else None
        except (OSError, http.client.HTTPException) as error:
            told = type(error).__name__
        seconds = time.monotonic() - began
        noted = {"what": what, "at": at, "seconds": seconds, "status": status, "retry_after": retry_after}
        sample = Sample(**noted, told=told, key=key, job_id=job_id)
        with self._lock:
            self._out.write(json.dumps(asdict(sample)) + "\n")
            self._out.flush()
        return sample

    def _exchange(self, method: str, path: str, body: Any, key: str | None) -> tuple[int, str | None, JsonObject]:
        host, port = str(self._address.hostname), self._address.port
        connection = http.client.HTTPConnection(host, port, timeout=TIMEOUT_SECONDS)
        headers = dict(self._headers)
        if body is not None:
            headers["content-type"] = "application/json"
        if key is not None:
            headers["idempotency-key"] = key
        try:
            connection.request(method, path, body=None if body is None else json.dumps(body), headers=headers)
            response = connection.getresponse()
            answer = _parsed(response.read())
        finally:
            connection.close()
        return response.status, response.headers.get("retry-after"), answer

    def submit(self, job: JsonObject) -> None:
        while not self.is_over.is_set():
            sample = self.ask("submit", "POST", JOBS, body=job["body"], key=job["key"])
            if sample.job_id is not None:
                self.job_ids.append(sample.job_id)
            if 200 <= sample.status < 500:
                return
            advised = float(sample.retry_after or AGAIN_SECONDS)
            self.is_over.wait(min(advised, MAX_WAIT_SECONDS))


def _parsed(content: bytes) -> JsonObject:
    """Return the JSON content. {} if it is not JSON, because the status is sufficient."""
    try:
        return json.loads(content)
    except ValueError:
        return {}


def every(client: Client, seconds: float, act: Callable[[], object]) -> None:
    """Act at a constant interval. After an action that took longer, the next one follows at once, and missed ones are
    skipped."""
    due = time.monotonic()
    while not client.is_over.wait(max(0.0, due - time.monotonic())):
        act()
        due = max(due + seconds, time.monotonic())


def submit_all(client: Client, told: queue.Queue[JsonObject]) -> None:
    while not client.is_over.is_set():
        order = told.get()
        due = time.monotonic()
        for job in order.get("jobs", ()):
            if client.is_over.wait(max(0.0, due - time.monotonic())):
                return
            client.submit(job)
            due += order["every"]


def get_one(client: Client) -> None:
    if client.job_ids:
        client.ask("get", "GET", f"{JOBS}/{random.choice(client.job_ids)}")


def main(url: str, api_key: str, path: str) -> None:
    told: queue.Queue[JsonObject] = queue.Queue()
    with Path(path).open("w", encoding="utf-8") as out:
        client = Client(url, api_key, out)
        threads = [
            threading.Thread(target=every, args=(client, GET_SECONDS, lambda: get_one(client))),
            threading.Thread(
                target=every, args=(client, LIST_SECONDS, lambda: client.ask("list", "GET", f"{JOBS}?limit=20"))
            ),
            threading.Thread(target=submit_all, args=(client, told)),
        ]
        for thread in threads:
            thread.start()
        for line in sys.stdin:
            told.put(json.loads(line))
        client.is_over.set()
        told.put({})
        for thread in threads:
            thread.join()


if __name__ == "__main__":
    main(*sys.argv[1:])
