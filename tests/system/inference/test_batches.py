"""End to end without fakes: batches of the real openai client, answered by a worker's trainer."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from catalog.tables.serving import BatchLine
from tests.system.api_process import Service, api_process
from tests.worker_site import BASE, PEPPER, SHORT_LEASE, WorkerSite, worker_site

URL = "/v1/chat/completions"
ENDED = {"completed", "failed", "cancelled", "expired"}


@pytest.fixture
def site(tmp_path: Path) -> Iterator[WorkerSite]:
    with worker_site(tmp_path, LORRY_IDLE_SECONDS="60", **SHORT_LEASE) as site:
        yield site


@pytest.fixture
def service(site: WorkerSite) -> Iterator[Service]:
    with api_process(site.settings.data_dir, pepper=PEPPER) as service:
        yield service


def body(number: int, *, max_tokens: int = 8) -> dict[str, Any]:
    messages = [{"role": "user", "content": f"What color is crate {number}?"}]
    return {"model": BASE, "messages": messages, "temperature": 1.5, "seed": number, "max_tokens": max_tokens}


def create(client: openai.OpenAI, bodies: list[dict[str, Any]]) -> openai.types.Batch:
    lines = [{"custom_id": str(n), "method": "POST", "url": URL, "body": each} for n, each in enumerate(bodies)]
    content = "\n".join(json.dumps(line) for line in lines).encode()
    file = client.files.create(file=("requests.jsonl", content), purpose="batch")
    return client.batches.create(input_file_id=file.id, endpoint=URL, completion_window="24h")


def wait(site: WorkerSite, client: openai.OpenAI, batch_id: str) -> openai.types.Batch:
    site.wait_until(lambda: client.batches.retrieve(batch_id).status in ENDED)
    return client.batches.retrieve(batch_id)


def texts(client: openai.OpenAI, batch: openai.types.Batch) -> list[str]:
    assert batch.output_file_id is not None, batch
    rows = [json.loads(line) for line in client.files.content(batch.output_file_id).text.splitlines()]
    assert [row["custom_id"] for row in rows] == [str(number) for number in range(len(rows))]
    return [row["response"]["body"]["choices"][0]["message"]["content"] for row in rows]


def num_rows(site: WorkerSite) -> int:
    with site.db.read() as session:
        return session.query(BatchLine).count()


def test_batch_gives_the_answers_of_interactive_requests(site: WorkerSite, service: Service) -> None:
    bodies = [body(number) for number in range(40)]
    with service.client() as client:
        made = create(client, bodies)  # waits for a worker
        site.start_worker()
        batch = wait(site, client, made.id)
        alone = [client.chat.completions.create(**each) for each in bodies]

        assert (batch.status, batch.error_file_id) == ("completed", None)
        assert texts(client, batch) == [completion.choices[0].message.content for completion in alone]
        assert batch.usage is not None
        of_all = [completion.usage for completion in alone if completion.usage is not None]
        assert batch.usage.input_tokens == sum(usage.prompt_tokens for usage in of_all)
        assert batch.usage.output_tokens == sum(usage.completion_tokens for usage in of_all)
        site.wait_until(lambda: num_rows(site) == 0)


def test_interactive_request_is_answered_while_a_batch_runs(site: WorkerSite, service: Service) -> None:
    site.start_worker()
    with service.client() as client:
        made = create(client, [body(number, max_tokens=180) for number in range(200)])
        site.wait_until(lambda: (counts := client.batches.retrieve(made.id).request_counts) and counts.completed > 0)

        client.chat.completions.create(**body(1))

        assert client.batches.retrieve(made.id).status == "in_progress"
        client.batches.cancel(made.id)
        batch = wait(site, client, made.id)
        assert batch.status == "cancelled"
        assert batch.request_counts is not None
        assert batch.error_file_id is not None
        unanswered = client.files.content(batch.error_file_id).text.splitlines()
        assert len(unanswered) == 200 - batch.request_counts.completed
        site.wait_until(lambda: num_rows(site) == 0)


def test_batch_survives_the_loss_of_a_worker_and_a_restart_of_the_api_server(site: WorkerSite) -> None:
    bodies = [body(number, max_tokens=40) for number in range(120)]
    first = site.start_worker()
    with api_process(site.settings.data_dir, pepper=PEPPER) as service, service.client() as client:
        made = create(client, bodies)
        site.wait_until(lambda: (counts := client.batches.retrieve(made.id).request_counts) and counts.completed > 5)
        first.send_signal(signal.SIGKILL)
        site.start_worker()

    with api_process(site.settings.data_dir, pepper=PEPPER) as service, service.client() as client:
        batch = wait(site, client, made.id)
        found = texts(client, batch)
        some = [client.chat.completions.create(**each).choices[0].message.content for each in bodies[::20]]

    assert batch.status == "completed"
    assert found[::20] == some
    assert len(found) == 120
