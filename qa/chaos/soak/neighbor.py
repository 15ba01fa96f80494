"""`python -m qa.chaos.soak.neighbor URL KEY FOLDER`: a tenant that behaves as badly as its rights allow.

It sends only requests that its key may send, waits at most a second after a 429, and exits at the end of its input.
Then it prints one line of JSON: per behavior, how often each status was returned.
"""

from __future__ import annotations

import http.client
import json
import random
import resource
import selectors
import socket
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from qa.chaos.service import BASE
from tests import tiny_base

NUM_STREAMS = 1_000
NUM_READERS = 70
"""Open downloads that are never read: as many as once exhausted the memory of an API server of 2 GiB."""
NUM_ENDPOINTS = 16
BIG_ROWS = 60_000
"""About 20 MB."""
MAX_QUEUED = 40
PAUSE_SECONDS = 0.05
CANCEL_TRIES = 30
"""Each refusal by the rate limit is followed by a pause of up to a second, and a sweep may cost ten seconds of it."""
MAX_BACKOFF_SECONDS = 1.0
TIMEOUT_SECONDS = 60.0
JOBS = "/v1/fine_tuning/jobs"
CRASH_SUFFIX = "crash"
"""The soak kills every trainer that holds a job of this suffix: such a job crashes whatever trains it."""
SLOW_PATTERN = "(?:.*?.*?.*?.*?z0z|q_proj)"
"""Four of these on the paths of the base model take 40 ms, of the 100 ms that the service allows."""
Json = dict[str, Any]


class Tenant:
    """One key of the misbehaving project, and the state that its behaviors share."""

    def __init__(self, url: str, key: str, folder: Path) -> None:
        address = urlsplit(url)
        self.host, self.port = str(address.hostname), int(address.port or 80)
        self.key, self.folder = key, folder
        self.is_over = threading.Event()
        self.statuses: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self.chats = self.big = self.adapter = ""
        self.job_ids: list[str] = []
        self.endpoints: list[str] = []
        self._lock = threading.Lock()

    def ask(self, behavior: str, method: str, path: str, body: Json | None = None) -> Json:
        """Send a request and count its status. Returns the JSON content; {} for an error."""
        content = None if body is None else json.dumps(body).encode()
        return self._exchange(behavior, method, path, content, "application/json")

    def upload(self, behavior: str, path: Path) -> str:
        """Upload a file. Returns its id; "" if it was not accepted."""
        edge = "soak-neighbor"
        head = f'--{edge}\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n--{edge}\r\n'
        head += f'Content-Disposition: form-data; name="file"; filename="{path.name}"\r\n\r\n'
        content = head.encode() + path.read_bytes() + f"\r\n--{edge}--\r\n".encode()
        answer = self._exchange(behavior, "POST", "/v1/files", content, f"multipart/form-data; boundary={edge}")
        return str(answer.get("id", ""))

    def count(self, behavior: str, status: object) -> None:
        with self._lock:
            self.statuses[behavior][str(status)] += 1

    def request_head(self, path: str) -> bytes:
        return f"GET {path} HTTP/1.1\r\nHost: {self.host}\r\nAuthorization: Bearer {self.key}\r\n\r\n".encode()

    def _exchange(self, behavior: str, method: str, path: str, content: bytes | None, kind: str) -> Json:
        headers = {"authorization": f"Bearer {self.key}", "content-type": kind}
        connection = http.client.HTTPConnection(self.host, self.port, timeout=TIMEOUT_SECONDS)
        backoff = 0.0
        try:
            connection.request(method, path, body=content, headers=headers)
            response = connection.getresponse()
            told = response.read()
            self.count(behavior, f"{response.status} {_code(told)}" if response.status >= 400 else response.status)
            if response.status == 429:
                backoff = min(float(response.headers.get("retry-after") or 0), MAX_BACKOFF_SECONDS)
            return json.loads(told) if response.status == 200 else {}
        except (OSError, http.client.HTTPException, ValueError) as error:
            self.count(behavior, type(error).__name__)
            return {}
        finally:
            connection.close()
            self.is_over.wait(backoff)


def _code(told: bytes) -> str:
    """Return the error's code."""
    try:
        return str(json.loads(told)["error"]["code"])
    except (ValueError, KeyError, TypeError):
        return "no JSON"


# Each behavior runs repeatedly in its own thread.


def send_slow_patterns(tenant: Tenant) -> None:
    """Sweeps of 50 trials whose patterns take long to match; cancelled at once, so that the next one is accepted."""
    patterns = {f"{SLOW_PATTERN}{'' if number == 0 else f'|z{number}'}": 4 for number in range(4)}
    body = {
        "model": BASE,
        "training_file": tenant.chats,
        "validation_file": tenant.chats,
        "search": {"type": "random", "trials": 50, "seed": random.randrange(10**6)},
        "parameters": {"hyperparameters.learning_rate_multiplier": {"min": 0.1, "max": 2.0}},
        "lora": {"rank": 4, "rank_pattern": patterns},
        "max_steps": 1,
    }
    made = tenant.ask("sweep with slow patterns", "POST", "/v1/sweeps", body)
    for _ in range(CANCEL_TRIES if made else 0):
        if tenant.is_over.is_set() or tenant.ask("sweep cancelled", "POST", f"/v1/sweeps/{made['id']}/cancel"):
            return


def send_plans(tenant: Tenant) -> None:
    """Create plans with different lengths, so that the file is tokenized again for each."""
    body = {"model": BASE, "training_file": tenant.chats, "max_length": random.randrange(8, 512)}
    tenant.ask("plan", "POST", "/v1/plans", body)


def call_webhooks(tenant: Tenant) -> None:
    """Test webhooks to hosts that do not resolve, and to a server that responds just before the timeout."""
    if len(tenant.endpoints) < NUM_ENDPOINTS:
        number = len(tenant.endpoints)
        url = f"http://soak-{number}-{random.randrange(10**9)}.invalid/" if number % 2 else tenant_hook(tenant)
        body = {"name": f"n{number}", "url": url, "event_types": ["fine_tuning.job.succeeded"]}
        made = tenant.ask("webhook created", "POST", "/v1/webhook_endpoints", body)
        tenant.endpoints += [made["id"]] if made else []
        return
    path = f"/v1/webhook_endpoints/{random.choice(tenant.endpoints)}/test"
    tenant.ask("webhook tested", "POST", path, {"event_type": "fine_tuning.job.succeeded"})


def tenant_hook(tenant: Tenant) -> str:
    return (tenant.folder / "slow-hook").read_text("utf-8")


def verify(tenant: Tenant) -> None:
    if not tenant.adapter:
        found = tenant.ask("adapters listed", "GET", "/v1/adapters").get("data") or [{"id": ""}]
        tenant.adapter = found[0]["id"]
        tenant.is_over.wait(1.0)
        return
    tenant.ask("adapter verified", "POST", f"/v1/adapters/{tenant.adapter}/verify")


def upload_and_delete(tenant: Tenant) -> None:
    """Upload a large file with an invalid last line, so that it is checked completely and then rejected."""
    tenant.upload("bad file", tenant.folder / "bad.jsonl")


def submit_urgent_jobs(tenant: Tenant) -> None:
    """Keep the queue full of urgent jobs."""
    counted = tenant.ask("jobs listed", "GET", f"{JOBS}?limit=100").get("data", [])
    waiting = [job for job in counted if job["status"] in ("queued", "validating_files")]
    if len(waiting) < MAX_QUEUED:
        body = {
            "model": BASE,
            "training_file": tenant.chats,
            "priority": "urgent",
            "precision": "float32",
            "seed": random.randrange(10**6),
            "hyperparameters": {"batch_size": 4, "n_epochs": 100},
            "lora": {"rank": 8},
            "max_steps": 150,
        }
        made = tenant.ask("urgent job", "POST", JOBS, body)
        tenant.job_ids += [made["id"]] if made else []
    else:
        tenant.is_over.wait(0.5)


def submit_crashing_jobs(tenant: Tenant) -> None:
    body = {
        "model": BASE,
        "training_file": tenant.chats,
        "precision": "float32",
        "seed": random.randrange(10**6),
        "suffix": CRASH_SUFFIX,
        "priority": "urgent",
        "max_steps": 400,
        "hyperparameters": {"batch_size": 4, "n_epochs": 100},
    }
    tenant.ask("crashing job", "POST", JOBS, body)
    tenant.is_over.wait(15.0)


def list_everything(tenant: Tenant) -> None:
    tenant.ask("jobs listed", "GET", f"{JOBS}?limit=100")


BEHAVIORS: tuple[Callable[[Tenant], None], ...] = (
    send_slow_patterns,
    send_plans,
    call_webhooks,
    verify,
    upload_and_delete,
    submit_urgent_jobs,
    submit_crashing_jobs,
    list_everything,
)


def repeat(tenant: Tenant, behavior: Callable[[Tenant], None]) -> None:
    while not tenant.is_over.wait(PAUSE_SECONDS):
        behavior(tenant)


def hold_sockets(tenant: Tenant, name: str, number: int, path: Callable[[], str], *, is_read: bool) -> None:
    """Keep `number` responses open, and reopen those that end. is_read: read the content; else only the head."""
    selector = selectors.DefaultSelector()
    opened: set[socket.socket] = set()
    while not tenant.is_over.is_set():
        if len(opened) < number and (target := path()):
            try:
                client = socket.create_connection((tenant.host, tenant.port), timeout=5.0)
                client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                client.sendall(tenant.request_head(target))
            except OSError as error:
                tenant.count(name, type(error).__name__)
                tenant.is_over.wait(MAX_BACKOFF_SECONDS)
                continue
            client.setblocking(False)
            opened.add(client)
            selector.register(client, selectors.EVENT_READ, data="head")
        for key, _ in selector.select(PAUSE_SECONDS):
            client = key.fileobj
            assert isinstance(client, socket.socket)
            if not _read(tenant, name, client, is_head=key.data == "head"):
                selector.unregister(client)
                opened.discard(client)
                client.close()
                tenant.is_over.wait(0.02)
            elif key.data == "head" and not is_read:
                selector.unregister(client)  # stays open, and is never read again
            else:
                selector.modify(client, selectors.EVENT_READ, data="body")
    tenant.count(name, f"open at the end: {len(opened)}")
    for client in opened:
        client.close()


def _read(tenant: Tenant, name: str, client: socket.socket, *, is_head: bool) -> bool:
    """Return whether the response continues."""
    try:
        content = client.recv(4096)
    except OSError:
        return False
    if is_head and content:
        status = content.split(b" ", 2)[1].decode(errors="replace") if content.startswith(b"HTTP/") else "no HTTP"
        tenant.count(name, status)
        return status == "200"
    return bool(content)


def prepare(tenant: Tenant) -> None:
    """Create its files: one to train on, a large one to download, and a large one with an invalid last line."""
    chats = tiny_base.write_chat(tenant.folder / "chats.jsonl", 40, seed=7)
    row = chats.read_text("utf-8").splitlines()[0] + "\n"
    (tenant.folder / "big.jsonl").write_text(row * BIG_ROWS, "utf-8")
    (tenant.folder / "bad.jsonl").write_text(row * (BIG_ROWS // 2) + "{\n", "utf-8")
    while not (tenant.chats and tenant.big):
        tenant.chats = tenant.chats or tenant.upload("file", chats)
        tenant.big = tenant.big or tenant.upload("file", tenant.folder / "big.jsonl")


def main(url: str, key: str, folder: str) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    tenant = Tenant(url, key, Path(folder))
    prepare(tenant)
    holding = [
        ("stream", NUM_STREAMS, lambda: f"{JOBS}/{tenant.job_ids[0]}/stream" if tenant.job_ids else "", True),
        ("unread download", NUM_READERS, lambda: f"/v1/files/{tenant.big}/content", False),
    ]
    threads = [threading.Thread(target=repeat, args=(tenant, behavior)) for behavior in BEHAVIORS]
    for name, number, path, is_read in holding:
        threads.append(
            threading.Thread(target=hold_sockets, args=(tenant, name, number, path), kwargs={"is_read": is_read})
        )
    for thread in threads:
        thread.start()
    sys.stdin.read()
    tenant.is_over.set()
    until = time.monotonic() + TIMEOUT_SECONDS
    for thread in threads:
        thread.join(max(0.0, until - time.monotonic()))
    sys.stdout.write(json.dumps({name: dict(counted) for name, counted in tenant.statuses.items()}) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
