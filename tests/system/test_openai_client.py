"""The real openai package, with strict validation of every response, against the service in a separate process.

The tests replace the worker by calls of the catalog on the same database.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from catalog.db.database import Database
from catalog.fleet import workers
from catalog.history import result_files
from catalog.lifecycle import preparation, recording
from catalog.queue import claiming, claims
from catalog.registry import base_models
from catalog.scheduling.snapshot import Capacity
from catalog.settings import Settings
from catalog.storage import token_cache
from catalog.storage.store import ArtifactStore, open_store
from tests.catalog.prepared_data import DETAILS, REPORT
from tests.catalog.world import DESCRIPTION, begin_preparation, claim_import_of, manifest, sha
from tests.system.api_process import Service, api_process

httpx: Any = importlib.import_module(openai.DefaultHttpxClient.__mro__[1].__module__.partition(".")[0])
"""The HTTP library that this version of openai uses."""
CHAT = {"messages": [{"role": "user", "content": "What is 1+1?"}, {"role": "assistant", "content": "2"}]}
DATA = b"".join(json.dumps(CHAT).encode() + b"\n" for _ in range(20))


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("service")


@pytest.fixture(scope="module")
def database(data_dir: Path, module_database: None) -> Iterator[Database]:
    db = Database(Settings(data_dir=data_dir).resolved_database_url())
    db.migrate()
    yield db
    db.close()


@pytest.fixture(scope="module")
def service(data_dir: Path, database: Database) -> Iterator[Service]:
    with api_process(data_dir) as service:
        base_models.add(database, name="smol", kind="folder", source="/models/smol")
        imported = {"manifest": {"files": []}, "description": DESCRIPTION}
        base_models.finish_import(database, claim_import_of(database, "smol"), digest=sha("smol"), **imported)
        yield service


@pytest.fixture(scope="module")
def store(data_dir: Path) -> ArtifactStore:
    return open_store(Settings(data_dir=data_dir))


@pytest.fixture
def client(service: Service) -> Iterator[openai.OpenAI]:
    with service.client() as client:
        yield client


def prepare(db: Database) -> None:
    while unprepared := begin_preparation(db, "w"):
        file_digest = unprepared.files.training.digest
        key, project_id = unprepared.files.train_key, unprepared.files.project_id
        tokens = manifest("tokens", kind="tokens")
        of_file: dict[str, Any] = {"project_id": project_id, "file_digest": file_digest}
        token_cache.put(db, key, **of_file, artifact=tokens, report=REPORT, details=DETAILS)
        preparation.finish(db, unprepared.task, num_steps=2)


def train(db: Database, store: ArtifactStore, folder: Path) -> None:
    """Complete every queued job. `folder` is for the files to store."""
    prepare(db)
    workers.register_worker(
        db, worker_id="w", host="h", pid=1, devices=[{"kind": "cpu"}], version="1", memory_bytes=10**12
    )
    capacity = Capacity(max_jobs=8, memory_bytes_free=10**12)
    for claim in claiming.claim_pack(db, worker_id="w", trainer_id="t", capacity=capacity, lease_seconds=60):
        claims.started(db, claim.claim_id, trainer_id="t", resumed_from_step=0)
        points = [{"kind": "train", "step": step, "loss": 2.0 / step, "token_accuracy": 0.5} for step in (1, 2)]
        recording.record_metrics(db, claim.claim_id, points)
        recording.record_progress(db, claim.claim_id, {"step": 2, "num_steps": 2, "loss": 1.0, "seconds_left": 1.0})
        checkpoint = manifest(claim.job.id, kind="checkpoint")
        recording.record_checkpoint(db, claim.claim_id, step=1, artifact=checkpoint)
        claims.complete(
            db,
            claim.claim_id,
            artifact=manifest(f"adapter {claim.job.id}"),
            num_parameters=1,
            verification={"passed": True},
            evaluation=None,
            trained_tokens=100,
            course=claims.Course(steps=3, kept_step=3, stopped_early=None),
            curves=result_files.store_curves(db, store, job_id=claim.job.id, path=folder / "curves.csv"),
            lineage={},
            lineage_id=sha("lineage"),
        )


def test_openai_client_goes_from_files_to_a_deleted_model(
    client: openai.OpenAI, database: Database, store: ArtifactStore, tmp_path: Path
) -> None:
    training = client.files.create(file=("train.jsonl", DATA), purpose="fine-tune")
    validation = client.files.create(file=("valid.jsonl", DATA), purpose="fine-tune")
    client.files.wait_for_processing(training.id)
    job = client.fine_tuning.jobs.create(
        model="smol",
        training_file=training.id,
        validation_file=validation.id,
        suffix="docs",
        seed=7,
        metadata={"team": "search"},
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": "auto"}}},
        extra_body={"lora": {"rank": 8}, "priority": "batch"},
    )
    assert (job.status, job.seed, job.hyperparameters.n_epochs) == ("validating_files", 7, 2)
    assert job.fine_tuned_model is None

    train(database, store, tmp_path)
    done = client.fine_tuning.jobs.retrieve(job.id)

    assert (done.status, done.trained_tokens) == ("succeeded", 100)
    assert done.fine_tuned_model is not None
    (result_file,) = done.result_files
    assert client.files.retrieve(result_file).purpose == "fine-tune-results"
    head, *lines = client.files.content(result_file).text.splitlines()
    assert head == "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy"
    assert lines == ["1,2.0,0.5,,", "2,1.0,0.5,,"]
    assert result_file in [file.id for file in client.files.list(purpose="fine-tune-results")]
    assert client.files.delete(result_file).deleted is True
    events = list(client.fine_tuning.jobs.list_events(job.id, limit=2))
    assert events[0].message == "The job has successfully completed"
    assert events[-1].message == f"Created fine-tuning job: {job.id}"
    assert {event.type for event in events} == {"message", "metrics"}
    (checkpoint,) = client.fine_tuning.jobs.checkpoints.list(job.id)
    assert checkpoint.fine_tuned_model_checkpoint == f"{done.fine_tuned_model}:ckpt-step-1"
    assert checkpoint.metrics.train_loss == 2.0
    model = client.models.retrieve(done.fine_tuned_model)
    assert model.id in {listed.id for listed in client.models.list()}
    assert client.models.delete(model.id).deleted is True
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve(model.id)
    assert client.files.content(training.id).content == DATA
    assert client.files.delete(training.id).deleted is True


def test_openai_client_pages_through_jobs_and_files(client: openai.OpenAI) -> None:
    files = [client.files.create(file=("x.jsonl", DATA), purpose="fine-tune").id for _ in range(5)]
    made = [
        client.fine_tuning.jobs.create(model="smol", training_file=files[0], metadata={"batch": "paging"}).id
        for _ in range(5)
    ]

    listed = [job.id for job in client.fine_tuning.jobs.list(limit=2, metadata={"batch": "paging"})]
    found = [file.id for file in client.files.list(limit=2, order="desc", purpose="fine-tune")]

    assert listed == made[::-1]
    assert [file_id for file_id in found if file_id in files] == files[::-1]


def test_openai_client_cancels_pauses_and_resumes(client: openai.OpenAI, service: Service) -> None:
    file = client.files.create(file=("x.jsonl", DATA), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(model="smol", training_file=file.id)

    with service.client() as strict, pytest.raises(openai.APIResponseValidationError):
        strict.fine_tuning.jobs.pause(job.id)  # the client's own list of statuses has no `paused`
    paused = openai.OpenAI(base_url=f"{service.url}/v1", api_key=service.key).fine_tuning.jobs.retrieve(job.id)
    resumed = client.fine_tuning.jobs.resume(job.id)
    cancelled = client.fine_tuning.jobs.cancel(job.id)

    assert (paused.status, resumed.status, cancelled.status) == ("paused", "validating_files", "cancelled")
    with pytest.raises(openai.ConflictError) as conflict:
        client.fine_tuning.jobs.cancel(job.id)
    assert conflict.value.code == "job_already_final"


def test_openai_client_raises_its_own_errors_with_all_fields(client: openai.OpenAI, service: Service) -> None:
    with pytest.raises(openai.BadRequestError) as bad_file:
        client.files.create(file=("x.jsonl", b"nonsense\n"), purpose="fine-tune")
    with pytest.raises(openai.BadRequestError) as bad_rank:
        client.fine_tuning.jobs.create(model="smol", training_file="x", extra_body={"lora": {"rank": 0}})
    with pytest.raises(openai.NotFoundError) as no_model:
        client.fine_tuning.jobs.create(model="gpt-4o-mini", training_file="file-x")
    with service.client(project="elsewhere") as other, pytest.raises(openai.AuthenticationError) as wrong_project:
        other.files.list()
    with (
        openai.OpenAI(base_url=f"{service.url}/v1", api_key="sk-x") as alien,
        pytest.raises(openai.AuthenticationError) as wrong_key,
    ):
        alien.models.list()
    with pytest.raises(openai.NotFoundError) as no_route:
        client.vector_stores.list()

    assert (bad_file.value.param, "Line 1" in bad_file.value.message) == ("file", True)
    assert (bad_rank.value.param, bad_rank.value.code) == ("lora.rank", "invalid_value")
    assert (no_model.value.param, no_model.value.code) == ("model", "model_not_found")
    assert wrong_project.value.code == "mismatched_project"
    assert wrong_key.value.type == "authentication_error"
    assert no_route.value.code == "unknown_route"
    assert all(error.value.request_id for error in (bad_file, bad_rank, no_model, wrong_key, no_route))


def test_openai_client_creates_one_job_if_a_response_is_lost(client: openai.OpenAI, service: Service) -> None:
    file = client.files.create(file=("x.jsonl", DATA), purpose="fine-tune")
    counts: list[str] = []

    class Lossy(httpx.HTTPTransport):
        """Loses the first response to a new job."""

        def handle_request(self, request: Any) -> Any:
            response = super().handle_request(request)
            if request.method == "POST":
                counts.append(request.headers["x-stainless-retry-count"])
                if len(counts) == 1:
                    response.read()
                    response.close()
                    raise httpx.ReadError("the connection broke")
            return response

    with service.client(http_client=httpx.Client(transport=Lossy())) as lossy:
        made = lossy.fine_tuning.jobs.create(model="smol", training_file=file.id, metadata={"lost": "reply"})

    jobs = list(client.fine_tuning.jobs.list(metadata={"lost": "reply"}))
    assert counts == ["0", "1"]
    assert [job.id for job in jobs] == [made.id]
