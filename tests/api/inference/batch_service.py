"""For tests of batches: a client, and a trainer that answers with the last prompt."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from typing import Any

import openai

from catalog.db.database import Database, read_clock
from catalog.settings import Settings
from catalog.usage import report
from tests.api.fake_trainer import FakeTrainer, Json, Step, begun, ended, failed, prompt_of, said
from tests.api.site import Site, until
from tests.catalog.world import World

CHAT_URL = "/v1/chat/completions"
ENDED = {"completed", "failed", "cancelled", "expired"}


def input_line(custom_id: str, text: str = "Hi", *, url: str = CHAT_URL, **body: Any) -> dict[str, Any]:
    """Return a valid request about `text`."""
    prompt: dict[str, Any] = {"messages": [{"role": "user", "content": text}]} if url == CHAT_URL else {"prompt": text}
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": {"model": "smol", **prompt, **body}}


def jsonl(*rows: Any) -> bytes:
    """Return one line per row. Rows that are bytes are written unchanged."""
    return b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows)


def strict_client(site: Site, key: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{site.url}/v1", api_key=key, max_retries=0, _strict_response_validation=True)


def create(client: openai.OpenAI, *rows: Any, endpoint: Any = CHAT_URL, **given: Any) -> openai.types.Batch:
    file = client.files.create(file=("requests.jsonl", jsonl(*rows)), purpose="batch")
    return client.batches.create(input_file_id=file.id, endpoint=endpoint, completion_window="24h", **given)


def wait(client: openai.OpenAI, batch_id: str, statuses: set[str] = ENDED) -> openai.types.Batch:
    until(lambda: client.batches.retrieve(batch_id).status in statuses)
    return client.batches.retrieve(batch_id)


def rows_of(client: openai.OpenAI, file_id: str | None) -> list[dict[str, Any]]:
    return [] if file_id is None else [json.loads(line) for line in client.files.content(file_id).text.splitlines()]


def counts(batch: openai.types.Batch) -> tuple[int, int, int]:
    assert batch.request_counts is not None
    return (batch.request_counts.total, batch.request_counts.completed, batch.request_counts.failed)


def text_of(row: dict[str, Any]) -> str:
    return row["response"]["body"]["choices"][0]["message"]["content"]


class BatchTrainer(FakeTrainer):
    """Answers requests with their prompts in capital letters."""

    def __init__(self, db: Database, settings: Settings) -> None:
        super().__init__(db, settings)
        self.gate = threading.Event()
        """While it is not set, no request is answered."""
        self.gate.set()
        self.error: Callable[[str], str | None] = lambda _: None
        """Returns the error code of a prompt, or None."""
        self.holds: Callable[[str], bool] = lambda _: False
        """Whether a request with this prompt is accepted, but never answered."""
        self.suspends: Callable[[str], bool] = lambda _: False
        """Whether the answer to this prompt begins, but ends only after `resuming` is set."""
        self.resuming = threading.Event()

    def steps(self, request: Json) -> Iterator[Step]:
        prompt = prompt_of(request)
        yield threading.Event() if self.holds(prompt) else self.gate
        yield begun()
        if (code := self.error(prompt)) is not None:
            yield failed(code)
            return
        if self.suspends(prompt):
            yield self.resuming
        yield said(prompt.upper(), 3, finish="stop")
        yield ended(3)


def used_tokens(db: Database, world: World) -> tuple[float, float, float]:
    with db.read() as session:
        query = report.UsageQuery(start_time=read_clock(session) - 86400, group_by=("project_id",))
    found = report.report(db, caller=world.caller, query=query)
    used = [used.amounts for day in found.days for used in day.used]
    names = ("num_completions", "prompt_tokens", "completion_tokens")
    first, second, third = (sum(amounts[name] for amounts in used) for name in names)
    return first, second, third
