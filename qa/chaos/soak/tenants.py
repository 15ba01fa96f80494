"""`python -m qa.chaos.soak.tenants KIND URL KEY PATH …`: a tenant in a process of its own, `ordinary` or `noisy`.

Each response is a line of JSON in PATH. The process exits at the end of its input. The ordinary tenant sends requests
at a low, constant rate, and submits jobs by orders on its input: {"jobs": [{"key", "body"}, …], "every": SECONDS}. The
noisy one behaves as badly as its rights allow, and waits at most a second after a 429.
"""

from __future__ import annotations

import json
import queue
import random
import resource
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx

from tests import tiny_base
from tests.worker_site import BASE

GET_SECONDS, LIST_SECONDS = 0.25, 0.5
"""Intervals between two such requests of the ordinary tenant."""
TIMEOUT_SECONDS = 60.0
AGAIN_SECONDS = 0.5
"""Pause before a submission without a response is repeated."""
MAX_WAIT_SECONDS = 5.0
JOBS = "/v1/fine_tuning/jobs"

NUM_STREAMS = 1_000
NUM_READERS = 70
"""Open downloads that are never read: as many as once exhausted the memory of an API server of 2 GiB."""
NUM_ENDPOINTS = 16
BIG_ROWS = 60_000
"""About 20 MB."""
MAX_QUEUED = 40
PAUSE_SECONDS = 0.05
CANCEL_TRIES = 30
MAX_BACKOFF_SECONDS = 1.0
SLOW_PATTERN = "(?:.*?.*?.*?.*?z0z|q_proj)"
"""Four of these on the paths of the base model take 40 ms, of the 100 ms that the service allows."""
Json = dict[str, Any]


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
    """Sends requests, and writes a record of each to a file. Each has a new connection, so that no connection to an
    exited API server remains."""

    def __init__(self, url: str, api_key: str, path: Path, *, timeout_seconds: float = TIMEOUT_SECONDS) -> None:
        self._http = httpx.Client(
            base_url=url,
            headers={"authorization": f"Bearer {api_key}"},
            timeout=timeout_seconds,
            limits=httpx.Limits(max_keepalive_connections=0),
            trust_env=False,
        )
        self._out, self._lock = path.open("w", encoding="utf-8"), threading.Lock()
        self.job_ids: list[str] = []
        self.is_over = threading.Event()

    def ask(self, what: str, method: str, path: str, *, key: str | None = None, **given: Any) -> tuple[Sample, Json]:
        """Send a request and record it. Returns the record and the JSON content; {} for an error."""
        headers = {} if key is None else {"idempotency-key": key}
        began, at, answer = time.monotonic(), time.time(), Json()
        status, retry_after, told = 0, None, ""
        try:
            response = self._http.request(method, path, headers=headers, **given)
            status, retry_after = response.status_code, response.headers.get("retry-after")
            answer = _parsed(response)
            told = str((answer.get("error") or {}).get("code") or "") if status >= 400 else ""
        except httpx.TransportError as error:
            told = type(error).__name__
        seconds = time.monotonic() - began
        job_id = answer.get("id") if key is not None and status == 200 else None
        measured = {"what": what, "at": at, "seconds": seconds, "status": status, "retry_after": retry_after}
        sample = Sample(**measured, told=told, key=key, job_id=job_id)
        self.record(sample)
        return sample, answer if status == 200 else {}

    def record(self, sample: Sample) -> None:
        with self._lock:
            self._out.write(json.dumps(asdict(sample)) + "\n")
            self._out.flush()

    def open_unread(self, path: str) -> socket.socket:
        """Send a GET request on a socket with a small buffer, of which the caller reads as little as it likes."""
        url = self._http.base_url
        client = socket.create_connection((url.host, url.port or 80), timeout=5.0)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        head = [f"GET {path} HTTP/1.1", f"Host: {url.host}", f"Authorization: {self._http.headers['authorization']}"]
        client.sendall("\r\n".join([*head, "", ""]).encode())
        return client


def _parsed(response: httpx.Response) -> Json:
    """Return the JSON content. {} if it is not JSON, because the status is sufficient."""
    try:
        return response.json()
    except ValueError:
        return {}


def read_samples(path: Path) -> list[Sample]:
    return [Sample(**json.loads(line)) for line in path.read_text("utf-8").splitlines()]


# The ordinary tenant


def behave(client: Client) -> None:
    told: queue.Queue[Json] = queue.Queue()

    def get_one() -> None:
        if client.job_ids:
            client.ask("get", "GET", f"{JOBS}/{random.choice(client.job_ids)}")

    def list_jobs() -> None:
        client.ask("list", "GET", f"{JOBS}?limit=20")

    threads = [
        threading.Thread(target=_every, args=(client, GET_SECONDS, get_one)),
        threading.Thread(target=_every, args=(client, LIST_SECONDS, list_jobs)),
        threading.Thread(target=_submit_all, args=(client, told)),
    ]
    for thread in threads:
        thread.start()
    for line in sys.stdin:
        told.put(json.loads(line))
    client.is_over.set()
    told.put({})
    for thread in threads:
        thread.join()


def _every(client: Client, seconds: float, act: Callable[[], object]) -> None:
    """Act at a constant interval. Actions that are missed because an earlier one took longer are skipped."""
    due = time.monotonic()
    while not client.is_over.wait(max(0.0, due - time.monotonic())):
        act()
        due = max(due + seconds, time.monotonic())


def _submit_all(client: Client, told: queue.Queue[Json]) -> None:
    while not client.is_over.is_set():
        order = told.get()
        due = time.monotonic()
        for job in order.get("jobs", ()):
            if client.is_over.wait(max(0.0, due - time.monotonic())):
                return
            _submit(client, job)
            due += order["every"]


def _submit(client: Client, job: Json) -> None:
    """Submit a job, again with the same key until it is accepted."""
    while not client.is_over.is_set():
        sample, _ = client.ask("submit", "POST", JOBS, json=job["body"], key=job["key"])
        if sample.job_id is not None:
            client.job_ids.append(sample.job_id)
        if 200 <= sample.status < 500:
            return
        client.is_over.wait(min(float(sample.retry_after or AGAIN_SECONDS), MAX_WAIT_SECONDS))


# The noisy tenant


class Noisy:
    """Each behavior runs repeatedly in a thread of its own."""

    def __init__(self, client: Client, folder: Path, slow_hook: str) -> None:
        self.client, self.folder, self.slow_hook = client, folder, slow_hook
        self.chats = self.big = ""
        self.endpoints: list[str] = []

    def run(self) -> None:
        self._prepare()
        behaviors = (
            *(self.send_slow_patterns, self.send_plans, self.call_webhooks, self.verify, self.upload_bad_file),
            *(self.submit_urgent_jobs, self.hold_streams, self.hold_downloads),
        )
        threads = [threading.Thread(target=self._repeat, args=(behavior,)) for behavior in behaviors]
        for thread in threads:
            thread.start()
        sys.stdin.read()
        self.client.is_over.set()
        until = time.monotonic() + TIMEOUT_SECONDS
        for thread in threads:
            thread.join(max(0.0, until - time.monotonic()))

    def ask(self, what: str, method: str, path: str, **given: Any) -> Json:
        sample, answer = self.client.ask(what, method, path, **given)
        if sample.status == 429:
            self.client.is_over.wait(min(float(sample.retry_after or 0), MAX_BACKOFF_SECONDS))
        return answer

    def _repeat(self, behavior: Callable[[], object]) -> None:
        while not self.client.is_over.wait(PAUSE_SECONDS):
            behavior()

    def _prepare(self) -> None:
        """Create its files: one to train on, a large one to download, and a large one with an invalid last line."""
        chats = tiny_base.write_chat(self.folder / "chats.jsonl", 40, seed=7)
        row = chats.read_text("utf-8").splitlines()[0] + "\n"
        (self.folder / "big.jsonl").write_text(row * BIG_ROWS, "utf-8")
        (self.folder / "bad.jsonl").write_text(row * (BIG_ROWS // 2) + "{\n", "utf-8")
        while not (self.chats and self.big):
            self.chats = self.chats or self._upload("chats.jsonl")
            self.big = self.big or self._upload("big.jsonl")

    def _upload(self, name: str) -> str:
        """Upload a file. Returns its id; "" if it was not accepted."""
        files = {"file": (name, (self.folder / name).read_bytes())}
        return self.ask(f"upload of {name}", "POST", "/v1/files", data={"purpose": "fine-tune"}, files=files).get(
            "id", ""
        )

    def upload_bad_file(self) -> None:
        """Upload a large file with an invalid last line, so that it is checked completely and then rejected."""
        self._upload("bad.jsonl")

    def send_slow_patterns(self) -> None:
        """Sweeps of 50 trials whose patterns take long to match; cancelled at once, so that the next is accepted."""
        patterns = {f"{SLOW_PATTERN}{'' if number == 0 else f'|z{number}'}": 4 for number in range(4)}
        body = {
            "model": BASE,
            "training_file": self.chats,
            "validation_file": self.chats,
            "search": {"type": "random", "trials": 50, "seed": random.randrange(10**6)},
            "parameters": {"hyperparameters.learning_rate_multiplier": {"min": 0.1, "max": 2.0}},
            "lora": {"rank": 4, "rank_pattern": patterns},
            "max_steps": 1,
        }
        made = self.ask("sweep with slow patterns", "POST", "/v1/sweeps", json=body)
        for _ in range(CANCEL_TRIES if made else 0):
            if self.client.is_over.is_set() or self.ask("sweep cancelled", "POST", f"/v1/sweeps/{made['id']}/cancel"):
                return

    def send_plans(self) -> None:
        """Create plans with different lengths, so that the file is tokenized again for each."""
        body = {"model": BASE, "training_file": self.chats, "max_length": random.randrange(8, 512)}
        self.ask("plan", "POST", "/v1/plans", json=body)

    def call_webhooks(self) -> None:
        """Test webhooks to hosts that do not resolve, and to a server that responds just before the timeout."""
        event = "fine_tuning.job.succeeded"
        if (number := len(self.endpoints)) < NUM_ENDPOINTS:
            url = f"http://soak-{number}-{random.randrange(10**9)}.invalid/" if number % 2 else self.slow_hook
            body = {"name": f"n{number}", "url": url, "event_types": [event]}
            made = self.ask("webhook created", "POST", "/v1/webhook_endpoints", json=body)
            self.endpoints += [made["id"]] if made else []
        else:
            path = f"/v1/webhook_endpoints/{random.choice(self.endpoints)}/test"
            self.ask("webhook tested", "POST", path, json={"event_type": event})

    def verify(self) -> None:
        for adapter in self.ask("adapters listed", "GET", "/v1/adapters").get("data", [])[:1]:
            self.ask("adapter verified", "POST", f"/v1/adapters/{adapter['id']}/verify")

    def submit_urgent_jobs(self) -> None:
        """Keep the queue full of urgent jobs."""
        listed = self.ask("jobs listed", "GET", f"{JOBS}?limit=100").get("data", [])
        if sum(job["status"] in ("queued", "validating_files") for job in listed) >= MAX_QUEUED:
            self.client.is_over.wait(0.5)
            return
        numbers = {"hyperparameters": {"batch_size": 4, "n_epochs": 100}, "lora": {"rank": 8}, "max_steps": 150}
        named = {"model": BASE, "training_file": self.chats, "priority": "urgent", "precision": "float32"}
        if made := self.ask("urgent job", "POST", JOBS, json={**named, **numbers, "seed": random.randrange(10**6)}):
            self.client.job_ids.append(made["id"])

    def hold_streams(self) -> None:
        if self.client.job_ids:
            self._hold("stream", NUM_STREAMS, f"{JOBS}/{self.client.job_ids[0]}/stream")

    def hold_downloads(self) -> None:
        self._hold("unread download", NUM_READERS, f"/v1/files/{self.big}/content")

    def _hold(self, what: str, number: int, path: str) -> None:
        """Keep `number` responses open of which only the first bytes are read, and replace the oldest one by one."""
        opened: deque[socket.socket] = deque()
        while not self.client.is_over.wait(PAUSE_SECONDS):
            if len(opened) == number:
                opened.popleft().close()
            began, status, told = time.time(), 0, ""
            try:
                opened.append(self.client.open_unread(path))
                status = int(opened[-1].recv(12)[9:] or 0)
            except (OSError, ValueError) as error:
                told = type(error).__name__
            self.client.record(Sample(what=what, at=began, seconds=time.time() - began, status=status, told=told))
            if status != 200:
                self.client.is_over.wait(MAX_BACKOFF_SECONDS)
        for client in opened:
            client.close()


def main(kind: str, url: str, api_key: str, path: str, *more: str) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    client = Client(url, api_key, Path(path))
    if kind == "ordinary":
        behave(client)
    else:
        Noisy(client, Path(path).parent, *more).run()


if __name__ == "__main__":
    main(*sys.argv[1:])
