"""Batches: their input is validated, each line is answered once, and the results are files in the order of the input.

The worker is replaced by a thread; tests/system has the same with a real one.
"""

from __future__ import annotations

import asyncio
import threading
from functools import partial
from pathlib import Path
from typing import Any

import openai
import pytest
from pydantic import field_validator
from sqlalchemy import select

from api.app import create_app
from api.deps import Services
from api.inference import batch_input, batch_lease, batch_lines, batch_loop
from api.inference.batch_output import OutputFiles
from api.schemas.inference import ChatCompletionRequest
from api.settings import ApiSettings
from catalog.batches import execution
from catalog.db.database import Database
from catalog.settings import Settings
from catalog.tables.serving import Batch, BatchLine
from catalog.tables.storage import File
from catalog.tables.tasks import Task
from catalog.tables.tenancy import Project
from catalog.tasks.task_queue import TaskKind
from tests.api.fake_trainer import serving
from tests.api.inference.batch_service import (
    CHAT_URL,
    BatchTrainer,
    counts,
    create,
    input_line,
    jsonl,
    rows_of,
    strict_client,
    text_of,
    used_tokens,
    wait,
)
from tests.api.site import Site, error_of, running, until
from tests.catalog.world import World

pytestmark = pytest.mark.usefixtures("quick")


def test_batch_is_answered_in_the_order_of_the_input(
    client: openai.OpenAI, services: Services, world: World, batch_trainer: BatchTrainer
) -> None:
    made = create(client, *(input_line(f"id-{n}", f"text {n}") for n in range(100)), metadata={"run": "a"})
    batch = wait(client, made.id)

    assert (made.status, batch.status, batch.metadata) == ("validating", "completed", {"run": "a"})
    assert counts(batch) == (100, 100, 0)
    assert batch.error_file_id is None
    rows = rows_of(client, batch.output_file_id)
    assert [row["custom_id"] for row in rows] == [f"id-{n}" for n in range(100)]
    assert [text_of(row) for row in rows] == [f"TEXT {n}" for n in range(100)]
    assert {row["response"]["status_code"] for row in rows} == {200}
    assert len({row["id"] for row in rows}) == 100
    assert batch.usage is not None
    assert (batch.usage.input_tokens, batch.usage.output_tokens) == (200, 300)
    assert used_tokens(services.db, world) == (100, 200, 300)
    assert batch.output_file_id is not None
    file = client.files.retrieve(batch.output_file_id)
    assert (file.purpose, file.filename) == ("batch_output", f"{batch.id}_output.jsonl")
    assert [one.id for one in client.batches.list()] == [batch.id]
    until(lambda: not any_left(services))


def any_left(services: Services) -> bool:
    with services.db.read() as session:
        return session.scalar(select(BatchLine).limit(1)) is not None


def test_large_answers_do_not_delay_other_clients(client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are parsed outside the thread of the event loop."""
    threads: list[asyncio.AbstractEventLoop | None] = []
    success_result = batch_lines.success_result

    def parse(*given: Any) -> Any:
        threads.append(asyncio._get_running_loop())  # pyright: ignore[reportPrivateUsage]
        return success_result(*given)

    monkeypatch.setattr(batch_lines, "success_result", parse)

    assert wait(client, create(client, input_line("a")).id).status == "completed"
    assert threads == [None]


def test_texts_are_completed_too(client: openai.OpenAI) -> None:
    url = "/v1/completions"
    batch = wait(client, create(client, input_line("a", "one", url=url), endpoint=url).id)

    (row,) = rows_of(client, batch.output_file_id)
    assert row["response"]["body"]["object"] == "text_completion"
    assert row["response"]["body"]["choices"][0]["text"] == "ONE"


def test_requests_that_fail_are_in_the_error_file(client: openai.OpenAI, batch_trainer: BatchTrainer) -> None:
    batch_trainer.error = lambda prompt: "context_length_exceeded" if prompt == "bad" else None
    batch = wait(client, create(client, input_line("a"), input_line("b", "bad"), input_line("c")).id)

    assert (batch.status, *counts(batch)) == ("completed", 3, 2, 1)
    assert [row["custom_id"] for row in rows_of(client, batch.output_file_id)] == ["a", "c"]
    (row,) = rows_of(client, batch.error_file_id)
    assert (row["custom_id"], row["response"]["status_code"], row["error"]) == ("b", 400, None)
    assert row["response"]["body"]["error"]["code"] == "context_length_exceeded"


INVALID: list[tuple[Any, str, str | None]] = [
    (b"{", "invalid_json", None),
    (b"[1]", "invalid_row", None),
    (b"\xff", "invalid_row", None),
    ({**input_line("x"), "method": "GET"}, "invalid_value", "method"),
    ({**input_line("x"), "url": "/v1/completions"}, "invalid_value", "url"),
    ({**input_line("x"), "extra": 1}, "unknown_parameter", "extra"),
    ({"method": "POST", "url": CHAT_URL, "body": {}}, "missing_required_parameter", "custom_id"),
    (input_line(""), "invalid_value", "custom_id"),
    (input_line("first"), "invalid_row", "custom_id"),
    (input_line("x", model="unknown"), "model_not_found", "body.model"),
    (input_line("z", model="ft:unknown"), "adapter_not_found", "body.model"),
    (input_line("x", temperature=3), "invalid_value", "body.temperature"),
    (input_line("x", messages=[{"role": "robot", "content": "a"}]), "invalid_row", "body.messages"),
    (input_line("x", top_logprobs=2), "invalid_value", "body.top_logprobs"),
    (input_line("x", stream=True), "invalid_value", "body.stream"),
    (input_line("x", "y" * 70_000), "invalid_row", None),
]


def test_each_invalid_line_is_named_and_nothing_is_answered(client: openai.OpenAI, batch_trainer: BatchTrainer) -> None:
    batch = wait(client, create(client, input_line("first"), b"", *(row for row, _, _ in INVALID)).id)

    assert (batch.status, batch.output_file_id, batch.error_file_id) == ("failed", None, None)
    assert batch.errors is not None
    assert batch.errors.data is not None
    assert [(error.code, error.param, error.line) for error in batch.errors.data] == [
        (code, param, number) for number, (_, code, param) in enumerate(INVALID, 3)
    ]
    assert all(error.message for error in batch.errors.data)
    assert batch_trainer.prompts == []


def test_number_of_lines_and_of_errors_is_limited(client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("api.inference.batch_input.MAX_LINES", 3)
    monkeypatch.setattr("api.inference.batch_input.MAX_ERRORS", 2)
    long = wait(client, create(client, *(input_line(str(n)) for n in range(5))).id)
    bad = wait(client, create(client, *[b"{"] * 3).id)
    blank = wait(client, create(client, b" ").id)

    errors = [batch.errors.data for batch in (long, bad, blank) if batch.errors is not None and batch.errors.data]
    assert [[(error.code, error.line) for error in data] for data in errors] == [
        [("file_too_large", 4)],
        [("invalid_json", 1), ("invalid_json", 2)],
        [("file_empty", None)],
    ]


def test_cancelled_batch_keeps_the_answers_that_it_has(
    client: openai.OpenAI, batch_trainer: BatchTrainer, services: Services, world: World
) -> None:
    batch_trainer.holds = lambda prompt: prompt == "held"
    made = create(client, input_line("a"), input_line("b", "held"), input_line("c"))
    until(lambda: counts(client.batches.retrieve(made.id)) == (3, 2, 0))

    cancelling = client.batches.cancel(made.id)
    batch = wait(client, made.id)

    assert cancelling.status == "cancelling"
    assert (batch.status, *counts(batch)) == ("cancelled", 3, 2, 0)
    assert batch.cancelled_at is not None
    assert [row["custom_id"] for row in rows_of(client, batch.output_file_id)] == ["a", "c"]
    (row,) = rows_of(client, batch.error_file_id)
    assert (row["custom_id"], row["response"], row["error"]["code"]) == ("b", None, "batch_cancelled")
    assert used_tokens(services.db, world) == (2, 4, 6)
    assert client.batches.cancel(made.id) == batch
    until(lambda: not any_left(services))


def test_cancelled_batch_waits_for_an_answer_that_is_being_stored(
    client: openai.OpenAI, batch_trainer: BatchTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If it did not wait, it would end the batch before the lease is renewed several times."""
    storing, continuing = threading.Event(), threading.Event()
    store_result, end, renew = execution.store_result, batch_loop.BatchRunner._end, execution.renew
    renewals: list[str] = []

    def slow_store(*given: Any, **fields: Any) -> None:
        storing.set()
        assert continuing.wait(60)
        store_result(*given, **fields)

    def counted(*given: Any) -> execution.Directive:
        directive = renew(*given)
        renewals.append(directive.status)
        if renewals.count("cancelling") > 5:
            continuing.set()
        return directive

    monkeypatch.setattr(execution, "renew", counted)
    monkeypatch.setattr(batch_lines, "MAX_IN_FLIGHT", 1)
    monkeypatch.setattr(execution, "store_result", slow_store)
    monkeypatch.setattr(
        batch_loop.BatchRunner, "_end", lambda *given, **named: (end(*given, **named), continuing.set())
    )
    made = create(client, input_line("a"), input_line("b"))
    assert storing.wait(20)

    client.batches.cancel(made.id)
    batch = wait(client, made.id)

    assert (batch.status, *counts(batch)) == ("cancelled", 2, 1, 0)
    assert [row["custom_id"] for row in rows_of(client, batch.output_file_id)] == ["a"]
    assert [row["custom_id"] for row in rows_of(client, batch.error_file_id)] == ["b"]


@pytest.mark.parametrize("is_validated", [False, True])
def test_batch_that_expires_keeps_the_answers_that_it_has(
    client: openai.OpenAI,
    batch_trainer: BatchTrainer,
    services: Services,
    monkeypatch: pytest.MonkeyPatch,
    is_validated: bool,
) -> None:
    batch_trainer.holds = lambda prompt: prompt == "held"
    if not is_validated:
        monkeypatch.setattr("catalog.batches.commands.WINDOW_SECONDS", -1.0)
    made = create(client, input_line("a"), input_line("b", "held"))
    if is_validated:
        until(lambda: counts(client.batches.retrieve(made.id)) == (2, 1, 0))
        with services.db.write() as session:
            session.get_one(Batch, made.id).expires_at = 1.0

    batch = wait(client, made.id)

    assert (batch.status, batch.cancelled_at) == ("expired", None)
    assert [row["custom_id"] for row in rows_of(client, batch.output_file_id)] == ["a"] * is_validated
    assert [row["error"]["code"] for row in rows_of(client, batch.error_file_id)] == ["batch_expired"] * is_validated


def test_another_process_continues_without_repeating_finished_lines(
    services: Services, client: openai.OpenAI, batch_trainer: BatchTrainer, world: World
) -> None:
    batch_trainer.holds = lambda prompt: prompt == "held"
    made = create(client, input_line("a", "one"), input_line("b", "held"), input_line("c", "two"))
    until(lambda: counts(client.batches.retrieve(made.id)) == (3, 2, 0))
    batch_trainer.holds = lambda _: False

    with services.db.write() as session:  # as if another process had taken over, and was lost
        task = session.get_one(Task, (TaskKind.BATCH, made.id))
        task.claim_id, task.lease_expires_at = "task-other", 1.0
    batch = wait(client, made.id)

    assert (batch.status, *counts(batch)) == ("completed", 3, 3, 0)
    assert [row["custom_id"] for row in rows_of(client, batch.output_file_id)] == ["a", "b", "c"]
    assert sorted(batch_trainer.prompts) == ["held", "held", "one", "two"]
    assert used_tokens(services.db, world) == (3, 6, 9)


def test_restarted_server_continues(settings: Settings, key: str, world: World, services: Services) -> None:
    world.worker()
    trainer = BatchTrainer(services.db, settings)
    with serving(trainer):
        trainer.holds = lambda prompt: prompt == "held"
        app = create_app(settings, ApiSettings(requests_per_minute=0))
        with running(app, key) as first, strict_client(first, key) as client:
            made = create(client, input_line("a", "one"), input_line("b", "held"))
            until(lambda: counts(client.batches.retrieve(made.id)) == (2, 1, 0))
        trainer.holds = lambda _: False
        again = create_app(settings, ApiSettings(requests_per_minute=0))
        with running(again, key) as second, strict_client(second, key) as client:
            batch = wait(client, made.id)
            texts = [text_of(row) for row in rows_of(client, batch.output_file_id)]

    assert (batch.status, texts) == ("completed", ["ONE", "HELD"])
    assert sorted(trainer.prompts) == ["held", "held", "one"]


def test_batch_waits_for_tokens(
    client: openai.OpenAI, services: Services, world: World, batch_trainer: BatchTrainer
) -> None:
    def limit(tokens: int | None) -> None:
        with services.db.write() as session:
            session.get_one(Project, world.caller.project_id).max_tokens_per_day = tokens

    limit(0)
    made = create(client, input_line("a"))
    with pytest.raises(openai.RateLimitError) as refused:
        client.chat.completions.create(model="smol", messages=[{"role": "user", "content": "Hi"}])
    wait(client, made.id, {"in_progress"})
    assert batch_trainer.prompts == []
    limit(None)

    assert refused.value.code == "quota_exceeded"
    assert wait(client, made.id).status == "completed"


def test_input_file_can_not_be_deleted_while_it_is_read(client: openai.OpenAI, batch_trainer: BatchTrainer) -> None:
    batch_trainer.gate.clear()
    made = create(client, input_line("a"))
    with pytest.raises(openai.ConflictError) as refused:
        client.files.delete(made.input_file_id)
    batch_trainer.gate.set()
    wait(client, made.id)

    assert refused.value.code == "in_use"
    assert made.id in refused.value.message
    assert client.files.delete(made.input_file_id).deleted


def test_damaged_input_file_fails_the_batch(client: openai.OpenAI, services: Services) -> None:
    with services.db.write() as session:
        project_id = session.scalars(select(Project.id).where(Project.name == "ours")).one()
        session.add(
            File(
                id="file-lost", project_id=project_id, purpose="batch", filename="a", num_bytes=1, digest="0" * 64,
                created_at=1.0,
            )
        )  # fmt: skip
    made = client.batches.create(input_file_id="file-lost", endpoint=CHAT_URL, completion_window="24h")

    batch = wait(client, made.id)

    assert batch.status == "failed"
    assert batch.errors is not None
    assert batch.errors.data is not None
    assert batch.errors.data[0].param == "input_file_id"


@pytest.mark.parametrize("content", [None, "changed"])
def test_batch_whose_input_is_damaged_delivers_what_was_answered(
    client: openai.OpenAI, services: Services, batch_trainer: BatchTrainer, content: str | None
) -> None:
    """None: the file was removed."""
    batch_trainer.error = lambda prompt: "context_length_exceeded" if prompt == "bad" else None
    batch_trainer.holds = lambda prompt: prompt == "held"
    rows = [input_line("a"), input_line("b", "held"), input_line("c", "bad"), input_line("d")]
    made = create(client, *rows)
    until(lambda: counts(client.batches.retrieve(made.id)) == (4, 2, 1))

    path = input_path(services, made)
    path.chmod(0o644)
    path.unlink()
    if content is not None:
        path.write_bytes(jsonl(rows[0], b"{", *rows[2:]))
    with services.db.write() as session:  # as if the process had been lost
        task = session.get_one(Task, (TaskKind.BATCH, made.id))
        task.claim_id, task.lease_expires_at = "task-other", 1.0
    batch = wait(client, made.id)

    assert (batch.status, *counts(batch)) == ("failed", 4, 2, 2)
    assert batch.errors is not None
    assert batch.errors.data is not None
    (told,) = batch.errors.data
    assert (told.code, told.param) == ("artifact_damaged", "input_file_id")
    assert told.message is not None
    assert "3 of the 4 requests were answered" in told.message
    assert [row["custom_id"] for row in rows_of(client, batch.output_file_id)] == ["a", "d"]
    assert [row["custom_id"] for row in rows_of(client, batch.error_file_id)] == ["c"]
    until(lambda: not any_left(services))


def test_only_lines_that_break_stricter_rules_fail(
    client: openai.OpenAI, batch_trainer: BatchTrainer, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    class StricterRequest(ChatCompletionRequest):
        @field_validator("seed")
        @classmethod
        def _has_no_seed(cls, seed: int | None) -> int | None:
            if seed is not None:
                raise ValueError("can't be used")
            return seed

    batch_trainer.gate.clear()
    monkeypatch.setattr(batch_lines, "MAX_IN_FLIGHT", 1)
    long = input_line("long", "c" * 1000)
    made = create(client, input_line("a"), input_line("b", seed=1), long, input_line("d"))
    until(lambda: len(batch_trainer.prompts) == 1)  # the other lines wait for its place

    monkeypatch.setitem(batch_input.SCHEMAS, CHAT_URL, StricterRequest)
    parse = batch_lines.parse
    monkeypatch.setattr(
        batch_lines,
        "parse",
        lambda line, *, endpoint, max_line_bytes: parse(line, endpoint=endpoint, max_line_bytes=500),
    )
    batch_trainer.gate.set()
    batch = wait(client, made.id)

    assert (batch.status, *counts(batch)) == ("completed", 4, 2, 2)
    assert [row["custom_id"] for row in rows_of(client, batch.output_file_id)] == ["a", "d"]
    of_seed, of_long = rows_of(client, batch.error_file_id)
    error = of_seed["response"]["body"]["error"]
    assert (of_seed["custom_id"], of_seed["response"]["status_code"], error["param"]) == ("b", 400, "body.seed")
    assert "Line 2 of the input file is not valid any more" in error["message"]
    assert of_long["response"]["body"]["error"]["code"] == "invalid_row"


def test_invalid_line_of_a_damaged_input_fails_the_batch(
    client: openai.OpenAI, batch_trainer: BatchTrainer, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The damage is in a chunk that is read before the digest of the whole file is known."""
    monkeypatch.setattr(services.store, "open_blob", partial(services.store.open_blob, chunk_bytes=256))
    monkeypatch.setattr(batch_lines, "MAX_IN_FLIGHT", 1)
    monkeypatch.setattr(batch_lines, "LINES_AT_ONCE", 1)
    batch_trainer.gate.clear()
    rows = [input_line("a"), input_line("b"), input_line("c", "c" * 1000)]
    made = create(client, *rows)
    until(lambda: len(batch_trainer.prompts) == 1)

    path = input_path(services, made)
    path.chmod(0o644)
    path.write_bytes(path.read_bytes().replace(b'"b"', b"bad"))
    with services.db.write() as session:  # another process opens the file again
        task = session.get_one(Task, (TaskKind.BATCH, made.id))
        task.claim_id, task.lease_expires_at = "task-other", 1.0
    batch_trainer.gate.set()
    batch = wait(client, made.id)

    assert (batch.status, *counts(batch)) == ("failed", 3, 1, 2)
    assert batch.errors is not None
    assert batch.errors.data is not None
    assert [error.code for error in batch.errors.data] == ["artifact_damaged"]


def test_batch_whose_input_is_lost_after_its_last_line_is_completed(
    client: openai.OpenAI, services: Services, batch_trainer: BatchTrainer
) -> None:
    batch_trainer.gate.clear()
    made = create(client, input_line("a"), input_line("b"))
    until(lambda: len(batch_trainer.prompts) == 2)
    input_path(services, made).unlink()
    batch_trainer.gate.set()
    batch = wait(client, made.id)

    assert (batch.status, *counts(batch)) == ("completed", 2, 2, 0)
    assert [row["custom_id"] for row in rows_of(client, batch.output_file_id)] == ["a", "b"]


def input_path(services: Services, batch: openai.types.Batch) -> Path:
    with services.db.read() as session:
        digest = session.get_one(File, batch.input_file_id).digest
    (path,) = (path for path in services.settings.data_dir.rglob(f"*{digest}*") if path.is_file())
    return path


def test_leases_are_renewed_while_files_are_written(
    client: openai.OpenAI, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    released = threading.Event()
    writing: list[str] = []
    write = OutputFiles.write_results

    def slow(files: OutputFiles, db: Database, batch_id: str) -> None:
        writing.append(batch_id)
        assert released.wait(60)
        write(files, db, batch_id)

    monkeypatch.setattr(OutputFiles, "write_results", slow)
    made = [create(client, input_line("a")).id for _ in range(batch_lease.THREADS)]
    until(lambda: set(writing) == set(made))

    def expiries() -> list[float]:
        with services.db.read() as session:
            return [session.get_one(Task, (TaskKind.BATCH, batch_id)).lease_expires_at or 0.0 for batch_id in made]

    first = expiries()
    until(lambda: all(later > earlier for earlier, later in zip(first, expiries(), strict=True)))
    released.set()

    assert {wait(client, batch_id).status for batch_id in made} == {"completed"}
    assert sorted(writing) == sorted(made), "another process took over"


def test_output_files_expire_as_requested(client: openai.OpenAI) -> None:
    lifetime: Any = {"anchor": "created_at", "seconds": 3600}
    batch = wait(client, create(client, input_line("a"), output_expires_after=lifetime).id)

    assert batch.output_file_id is not None
    file = client.files.retrieve(batch.output_file_id)
    assert file.expires_at == file.created_at + 3600


def test_retried_creation_returns_the_batch_that_exists(site: Site, client: openai.OpenAI) -> None:
    made = create(client, input_line("a"), metadata={"run": "a"})
    body = {
        "input_file_id": made.input_file_id,
        "endpoint": CHAT_URL,
        "completion_window": "24h",
        "metadata": {"run": "a"},
    }
    with site.http() as http:
        retry = {"x-stainless-retry-count": "1"}
        same = http.post("/v1/batches", json=body, headers=retry).json()["id"]
        other = http.post("/v1/batches", json={**body, "metadata": {"run": "b"}}, headers=retry).json()["id"]
        new = http.post("/v1/batches", json=body).json()["id"]

    assert same == made.id
    assert len({made.id, other, new}) == 3


def test_creation_is_checked(site: Site, client: openai.OpenAI) -> None:
    file = client.files.create(file=("a.jsonl", jsonl(input_line("a"))), purpose="user_data")
    body = {"input_file_id": file.id, "endpoint": CHAT_URL, "completion_window": "24h"}
    with site.http() as http:
        purpose = error_of(http.post("/v1/batches", json=body))
        endpoint = error_of(http.post("/v1/batches", json={**body, "endpoint": "/v1/embeddings"}))
        window = error_of(http.post("/v1/batches", json={**body, "completion_window": "1h"}))
        metadata = error_of(http.post("/v1/batches", json={**body, "metadata": {"a": "b" * 513}}))
        missing = error_of(http.post("/v1/batches", json={**body, "input_file_id": "file-x"}))

    assert (purpose["code"], purpose["param"]) == ("wrong_file_kind", "input_file_id")
    assert [error["param"] for error in (endpoint, window, metadata)] == ["endpoint", "completion_window", "metadata"]
    assert missing["code"] == "file_not_found"


def test_number_of_open_batches_is_limited(client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("catalog.batches.commands.MAX_OPEN_BATCHES", 0)

    with pytest.raises(openai.RateLimitError) as refused:
        create(client, input_line("a"))

    assert refused.value.code == "limit_reached"
