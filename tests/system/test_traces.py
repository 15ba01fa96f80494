"""One trace from the request that submits a job to the published adapter, across API server, worker and trainer.

The tests play the trainer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from pydantic import SecretStr
from starlette.testclient import TestClient

from api.app import create_app
from api.settings import ApiSettings
from catalog import tracing
from catalog.lifecycle.preparation import FilesToPrepare
from catalog.queue import claims
from catalog.queue.claiming import Claim
from catalog.states import EndReason
from catalog.tables.jobs import Job
from catalog.tasks.task_queue import TaskKind
from catalog.tenancy import authentication
from tests.api.site import PEPPER
from tests.catalog.prepared_data import REPORT
from tests.worker.pack_site import PASSED, PackSite, emit, emit_for, pack_site, step
from worker.background import tokenization
from worker.background.task_runner import run_next
from worker.protocol.mailbox import InboxReader
from worker.session.session_job import End

CLIENTS = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
SECRET_WORDS = "the words of a row"


@pytest.fixture
def site(tmp_path: Path, migrated_database: Path) -> Iterator[PackSite]:
    with pack_site(tmp_path, migrated_database) as site:
        yield site


@pytest.fixture
def exporter() -> Iterator[InMemorySpanExporter]:
    exporter = InMemorySpanExporter()
    tracing.start("worker", exporter=exporter)
    yield exporter
    tracing.stop()


@pytest.fixture
def client(site: PackSite) -> Iterator[TestClient]:
    """Yield a client for the project of the site's world, with its own key."""
    settings = site.settings.model_copy(
        update={"database_url": SecretStr(site.db.url), "pepper": SecretStr(PEPPER.decode())}
    )
    app = create_app(settings, ApiSettings())
    project_id = site.world.caller.project_id
    _, secret = authentication.create(site.db, project_id=project_id, name="k", pepper=app.state.services.pepper)
    with closing(app.state.services.db):
        yield TestClient(app, base_url="http://127.0.0.1", headers={"authorization": f"Bearer {secret}"})


def submit(client: TestClient, site: PackSite, **headers: str) -> str:
    body = {"model": "smol", "training_file": site.world.file_id, "suffix": "named-by-a-person"}
    answer = client.post("/v1/fine_tuning/jobs", json=body, headers=headers)
    assert answer.status_code == 200, answer.text
    return answer.json()["id"]


def prepare(site: PackSite, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prepare the files of a job as the worker does, without the child process that tokenizes."""
    manifest = site.store.put_folder(site.tokens, kind="tokens")

    def both_files(_: Any, files: FilesToPrepare, **__: Any) -> Any:
        return site.world.put_tokens(files.train_key, file_digest="0" * 64, artifact=manifest, report=REPORT), None

    monkeypatch.setattr(tokenization, "prepare_files", both_files)
    assert run_next(site.context, [TaskKind.PREPARATION])


def ended(name: str, began_at: float, ended_at: float) -> dict[str, Any]:
    """Return a span as a trainer reports it."""
    return {"name": name, "began_at": began_at, "ended_at": ended_at}


def claim_one(site: PackSite) -> Claim:
    (claim,) = site.claim_all()
    site.context.spans.claimed(claim, worker_id="w1")
    return claim


def trained(site: PackSite, claim: Claim) -> None:
    """Write the trainer's events from loading its base to the adapter, and let the worker record them."""
    pack = site.loading_session(claim)
    (admit,) = InboxReader(pack.directory).take()
    assert admit.body["trace"] == site.context.spans.of(claim.claim_id)
    ready = {"type": "ready", "memory": {"base_bytes": 1, "adapter_bytes": 0, "peak_bytes": 1}, "invariance": "bitwise"}
    emit(pack, ready | {"versions": {}, "spans": [ended("load", 1.0, 3.0)]})
    emit_for(pack, claim, "admitted", step=0, num_steps=10, num_parameters=1, steps_per_epoch=2.5)
    emit_for(pack, claim, "stepped", **step(1))
    saved = {"step": 1, "folder": site.checkpoint(pack, claim, 1), "adapter": None}
    emit_for(pack, claim, "checkpointed", **saved, spans=[ended("checkpoint", 4.0, 5.0)])
    emit_for(pack, claim, "finished", step=10, kept_step=10, stopped_early=None)
    folder = pack.directory.job_path(claim.claim_id) / "adapter"
    folder.mkdir(parents=True)
    (folder / "adapter_model.safetensors").write_text("weights")
    spans = [ended("export", 6.0, 7.0), ended("verify", 7.0, 8.0)]
    exported = {"step": 10, "kept_step": 10, "stopped_early": None, "num_parameters": 24, "trained_tokens": 100}
    exported |= {"folder": pack.directory.named(folder), "report": PASSED}
    emit_for(pack, claim, "exported", **exported, spans=spans)
    pack.read_events()
    assert pack.ready is not None
    assert "spans" not in pack.ready, "spans are not part of the recorded fields"


def test_a_job_is_one_trace_from_its_request_to_its_adapter(
    site: PackSite, client: TestClient, exporter: InMemorySpanExporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = submit(client, site, traceparent=CLIENTS)
    prepare(site, monkeypatch)
    claim = claim_one(site)

    trained(site, claim)

    assert site.world.job(job_id).state == "succeeded"
    spans = {span.name: span for span in exporter.get_finished_spans()}
    assert {_trace(span) for span in spans.values()} == {tracing.trace_id(CLIENTS)}
    request = "POST /v1/fine_tuning/jobs"
    assert {name: _parent(span, spans) for name, span in spans.items()} == {
        request: "00f067aa0ba902b7",
        "prepare": request,
        "queue": request,
        "claim": request,
        "load": "claim",
        "train": "claim",
        "checkpoint": "train",
        "export": "claim",
        "verify": "claim",
        "publish": "claim",
    }
    services = {name: span.resource.attributes["service.name"] for name, span in spans.items()}
    of_trainer = {"load", "train", "checkpoint", "export", "verify"}
    assert {name for name, service in services.items() if service == "lorry-trainer"} == of_trainer
    assert (spans["load"].start_time, spans["load"].end_time) == (10**9, 3 * 10**9)
    claimed = dict(spans["claim"].attributes or {})
    assert (claimed["lorry.job"], claimed["lorry.claim"]) == (job_id, claim.claim_id)
    assert (claimed["lorry.reason"], claimed["lorry.attempt"]) == ("completed", 1)
    assert all(span.status.is_ok or span.status.is_unset for span in spans.values())


def test_no_span_attribute_contains_text_of_users(
    site: PackSite, client: TestClient, exporter: InMemorySpanExporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit(client, site)
    client.get("/v1/files/file-secret-name")
    client.get(f"/v1/fine_tuning/jobs?after={SECRET_WORDS}")
    prepare(site, monkeypatch)
    trained(site, claim_one(site))

    exported = " ".join(span.to_json() for span in exporter.get_finished_spans())

    for words in ("named-by-a-person", SECRET_WORDS, "secret-name", "train.jsonl", "Bearer"):
        assert words not in exported


def test_a_failed_attempt_is_a_failed_span_in_the_same_trace_as_the_next(
    site: PackSite, exporter: InMemorySpanExporter
) -> None:
    job = site.queued()
    pack = site.loading_session(first := claim_one(site))
    pack.end_all(End(reason=EndReason.TRAINER_CRASHED, detail="boom"))
    site.world.clock.advance(60)
    second = claim_one(site)
    site.context.spans.ended(second.claim_id, EndReason.DRAINED)

    attempts = [span for span in exporter.get_finished_spans() if span.name == "claim"]

    assert [(span.attributes or {})["lorry.claim"] for span in attempts] == [first.claim_id, second.claim_id]
    assert [span.status.is_ok or span.status.is_unset for span in attempts] == [False, True]
    assert attempts[0].status.description == "trainer_crashed"
    assert {_trace(span) for span in attempts} == {tracing.trace_id(tracing.of_job(job.id, None))}


def test_a_claim_that_no_trainer_received_ends_its_span(site: PackSite, exporter: InMemorySpanExporter) -> None:
    site.queued()
    claim = claim_one(site)
    claims.end(site.db, claim.claim_id, reason=EndReason.DRAINED, detail="left")

    site.context.spans.ended(claim.claim_id, EndReason.DRAINED)
    site.context.spans.ended(claim.claim_id, None)

    (span,) = [span for span in exporter.get_finished_spans() if span.name == "claim"]
    assert (span.attributes or {})["lorry.reason"] == "drained"


def test_a_clients_trace_is_kept_with_tracing_disabled(site: PackSite, client: TestClient) -> None:
    job = _job(site, submit(client, site, traceparent=CLIENTS))
    odd = _job(site, submit(client, site, traceparent="00-words-of-a-stranger-01"))

    assert (job.trace, odd.trace) == (CLIENTS, None)


def _job(site: PackSite, job_id: str) -> Job:
    return site.world.job(job_id)


def _trace(span: ReadableSpan) -> str:
    assert span.context is not None
    return f"{span.context.trace_id:032x}"


def _parent(span: ReadableSpan, spans: dict[str, ReadableSpan]) -> str | None:
    """Return the parent's name, or its id if it is not one of these spans."""
    if span.parent is None:
        return None
    names = {other.context.span_id: name for name, other in spans.items() if other.context is not None}
    return names.get(span.parent.span_id, f"{span.parent.span_id:016x}")
