"""The history of a job over HTTP: events, metrics, checkpoints, attempts, data reports and logs."""

from __future__ import annotations

import pytest
from sqlalchemy import update
from starlette.testclient import TestClient

from api.deps import Services
from catalog.error_texts import ErrorText
from catalog.errors import StaleClaim
from catalog.history import job_logs
from catalog.lifecycle import preparation, recording
from catalog.maintenance import garbage_collection
from catalog.queue import claims
from catalog.queue.claiming import Claim
from catalog.states import EndReason
from catalog.tables.jobs import Job
from catalog.tasks import outcomes
from tests.api.site import error_of
from tests.catalog.prepared_data import REPORT
from tests.catalog.world import World, begin_preparation, manifest

JOBS = "/v1/fine_tuning/jobs"


def test_events_are_paginated_newest_first(client: TestClient, world: World) -> None:
    job = world.queued()
    path = f"{JOBS}/{job.id}/events"

    everything = client.get(path, params={"limit": 100}).json()["data"]
    first = client.get(path, params={"limit": 1}).json()
    rest = client.get(path, params={"after": first["data"][-1]["id"], "limit": 100}).json()

    assert everything == first["data"] + rest["data"]
    assert (first["has_more"], rest["has_more"]) == (True, False)
    assert everything[-1]["message"] == f"Created fine-tuning job: {job.id}"
    assert {event["object"] for event in everything} == {"fine_tuning.job.event"}
    assert {event["type"] for event in everything} <= {"message", "metrics"}


@pytest.mark.parametrize(
    ("name", "value"),
    [("after", after) for after in ("x", "ftevent-", "ftevent-99999999", "ftevent-" + "9" * 40, "-1")]
    + [("type", "transition")],
)
def test_unknown_event_cursor_or_type_is_rejected(client: TestClient, world: World, name: str, value: str) -> None:
    response = client.get(f"{JOBS}/{world.submit().id}/events", params={name: value})

    assert (response.status_code, error_of(response)["param"]) == (400, name)


def test_events_filtered_by_type_are_paginated(client: TestClient, world: World) -> None:
    world.worker()
    claim = world.running()
    for step in range(1, 4):
        recording.record_metrics(world.db, claim.claim_id, [{"kind": "train", "step": step, "loss": 1.0 / step}])
        recording.record_event(world.db, claim.claim_id, "info", f"word {step}")
    path = f"{JOBS}/{claim.job.id}/events"

    def pages(**query: str) -> list[str]:
        ids: list[str] = []
        while True:
            page = client.get(path, params={**query, "limit": "2", **({"after": ids[-1]} if ids else {})}).json()
            ids += [event["id"] for event in page["data"]]
            if not page["has_more"]:
                return ids

    everything = client.get(path, params={"limit": 100}).json()["data"]
    for kind in ("message", "metrics"):
        assert pages(type=kind) == [event["id"] for event in everything if event["type"] == kind]
    assert len(pages(type="metrics")) == 3
    after_a_metric = client.get(path, params={"type": "message", "after": everything[1]["id"]}).json()["data"]
    assert after_a_metric[0]["message"] == "word 2"


def test_metrics_checkpoints_and_attempts_are_listed(client: TestClient, world: World) -> None:
    world.worker()
    first, second = world.queued(suffix="a"), world.queued(suffix="b")
    taken = {claim.job.id: claim for claim in world.claim()}
    claim = taken[first.id]
    claims.started(world.db, claim.claim_id, trainer_id="trainer-w1", resumed_from_step=0)
    points = [{"kind": "train", "step": step, "loss": 3.0 / step, "num_tokens": 10} for step in range(1, 6)]
    recording.record_metrics(world.db, claim.claim_id, [*points, {"kind": "valid", "step": 5, "loss": 0.5}])
    exported = recording.Exported(artifact=manifest("weights"), lineage={}, lineage_id="1" * 64)
    files = manifest("c", kind="checkpoint")
    recording.record_checkpoint(world.db, claim.claim_id, step=5, artifact=files, exported=exported)

    train = client.get(f"{JOBS}/{first.id}/metrics").json()["data"]
    valid = client.get(f"{JOBS}/{first.id}/metrics", params={"kind": "valid"}).json()["data"]
    (checkpoint,) = client.get(f"{JOBS}/{first.id}/checkpoints").json()["data"]
    (attempt,) = client.get(f"{JOBS}/{first.id}/attempts").json()["data"]

    assert [(point["step"], point["loss"]) for point in train] == [(step, 3.0 / step) for step in range(1, 6)]
    assert valid[0]["loss"] == 0.5
    assert checkpoint["fine_tuned_model_checkpoint"] == f"ft:smol:ours:a:{first.id[-8:]}:ckpt-step-5"
    assert (checkpoint["step_number"], checkpoint["metrics"]["train_loss"]) == (5, 0.6)
    assert checkpoint["metrics"]["full_valid_loss"] == 0.5
    assert checkpoint["available"] is True
    assert attempt["packmates"] == [second.id]
    assert (attempt["number"], attempt["trainer_id"]) == (1, "trainer-w1")


def test_checkpoint_has_only_the_metrics_of_its_own_step(client: TestClient, world: World) -> None:
    world.worker()
    claim = world.running()
    points = [{"kind": "train", "step": step, "loss": 3.0 / step, "token_accuracy": 0.5} for step in (2, 3)]
    recording.record_metrics(world.db, claim.claim_id, [*points, {"kind": "valid", "step": 2, "loss": 0.7}])
    for step in (2, 3, 4):
        recording.record_checkpoint(
            world.db, claim.claim_id, step=step, artifact=manifest(f"c{step}", kind="checkpoint")
        )

    listed = client.get(f"{JOBS}/{claim.job.id}/checkpoints").json()["data"]

    found = {one["step_number"]: (one["metrics"]["train_loss"], one["metrics"]["full_valid_loss"]) for one in listed}
    assert found == {2: (1.5, 0.7), 3: (1.0, None), 4: (None, None)}


def test_why_explains_a_waiting_job(client: TestClient, world: World) -> None:
    why = client.get(f"{JOBS}/{world.submit().id}/why").json()

    assert why["state"] == "validating_files"
    assert "No worker is running" in why["explanation"]


def test_data_report_appears_after_preparation(client: TestClient, world: World) -> None:
    job = world.submit()
    before = client.get(f"{JOBS}/{job.id}/data_report").json()

    world.prepare_all()

    after = client.get(f"{JOBS}/{job.id}/data_report").json()
    of_file = client.get(f"/v1/files/{world.file_id}/report", params={"model": "smol"}).json()
    assert (before["training"], after["training"], after["validation"]) == (None, REPORT, None)
    assert of_file["report"] == REPORT


def test_rejected_file_shows_its_rejection_report(client: TestClient, world: World) -> None:
    job = world.submit()
    unprepared = begin_preparation(world.db, "w")
    assert unprepared is not None
    wanted, report = unprepared.files, {"refusal": {"code": "masked"}}
    world.put_tokens(wanted.train_key, file_digest=wanted.training.digest, artifact=None, report=report)
    error = ErrorText(code="masked", message="Only masked rows.", remedy="", param="training_file")
    outcomes.fail(world.db, unprepared.task, preparation.PREPARATION, error)

    shown = client.get(f"{JOBS}/{job.id}").json()
    report = client.get(f"{JOBS}/{job.id}/data_report").json()

    assert shown["status"] == "failed"
    assert (shown["error"]["code"], shown["error"]["param"]) == ("masked", "training_file")
    assert shown["error"]["message"] == "Only masked rows."
    assert report["training"] == {"refusal": {"code": "masked"}}


def test_report_for_an_unknown_model_names_available_models(client: TestClient, world: World) -> None:
    response = client.get(f"/v1/files/{world.file_id}/report", params={"model": "none"})

    assert response.status_code == 404
    assert "smol" in error_of(response)["message"]


def path(claim: Claim) -> str:
    return f"/v1/fine_tuning/jobs/{claim.job.id}/logs"


def printed(services: Services, claim: Claim, text: str, *, rank: int = 0) -> None:
    blob = services.store.put_bytes(text.encode())
    job_logs.record(services.db, claim.claim_id, worker_id="w1", rank=rank, content=blob)


def ended_ago(services: Services, seconds: float) -> None:
    """Move the end of every job `seconds` into the past."""
    with services.db.write() as session:
        session.execute(update(Job).values(finished_at=Job.finished_at - seconds))


@pytest.fixture
def claim(services: Services, world: World) -> Claim:
    """Return a job's second claim. Attempt 1 printed three lines, attempt 2 one line on each of two ranks."""
    world.worker()
    first = world.running()
    printed(services, first, "Loading\nStep 1\nStep 2\n")
    claims.end(world.db, first.claim_id, reason=EndReason.DRAINED, detail="")
    (second,) = world.claim()
    printed(services, second, "Step 2 again\n")
    printed(services, second, "of the second process\n", rank=1)
    return second


def test_log_lines_are_paginated_and_searchable(client: TestClient, claim: Claim) -> None:
    whole = client.get(path(claim)).json()
    first = client.get(path(claim), params={"limit": 2}).json()
    second = client.get(path(claim), params={"limit": 3, "after": first["data"][-1]["id"]}).json()

    assert [(line["attempt"], line["rank"], line["number"], line["text"]) for line in whole["data"]] == [
        (1, 0, 1, "Loading"),
        (1, 0, 2, "Step 1"),
        (1, 0, 3, "Step 2"),
        (2, 0, 1, "Step 2 again"),
        (2, 1, 1, "of the second process"),
    ]
    assert (first["has_more"], second["has_more"]) == (True, False)
    assert first["data"] + second["data"] == whole["data"]
    for query, found in (
        ({"attempt": 2, "rank": 0}, ["Step 2 again"]),
        ({"contains": "STEP 2"}, ["Step 2", "Step 2 again"]),
        ({"contains": "nothing of it"}, []),
        ({"attempt": 3}, []),
    ):
        answer = client.get(path(claim), params=query).json()  # pyright: ignore[reportArgumentType]
        assert [line["text"] for line in answer["data"]] == found


def test_invalid_log_parameters_are_named(client: TestClient, claim: Claim) -> None:
    wrong = {"attempt": 0, "rank": -1, "limit": 1001, "contains": "", "after": "ftevent-1"}

    for name, value in wrong.items():
        assert error_of(client.get(path(claim), params={name: value}))["param"] == name


def test_worker_writes_logs_only_of_its_own_attempts(services: Services, claim: Claim) -> None:
    blob = services.store.put_bytes(b"forged\n")

    with pytest.raises(StaleClaim):
        job_logs.record(services.db, claim.claim_id, worker_id="w2", rank=0, content=blob)


def test_logs_are_kept_for_a_month_then_garbage_collected(
    client: TestClient, services: Services, world: World, claim: Claim
) -> None:
    world.complete(claim.claim_id)
    digests = {services.store.put_bytes(text).digest for text in (b"Loading\nStep 1\nStep 2\n", b"Step 2 again\n")}

    ended_ago(services, job_logs.KEPT_SECONDS - 60)
    garbage_collection.drop_references(world.db)
    assert digests <= garbage_collection.live_digests(world.db)
    assert len(client.get(path(claim)).json()["data"]) == 5

    ended_ago(services, 120)
    garbage_collection.drop_references(world.db)
    assert not digests & garbage_collection.live_digests(world.db)
    assert client.get(path(claim)).json()["data"] == []
