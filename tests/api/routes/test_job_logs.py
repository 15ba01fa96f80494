"""/v1/fine_tuning/jobs/{id}/logs: the output of a job's trainers, visible only to its project."""

from __future__ import annotations

import pytest
from sqlalchemy import update
from starlette.testclient import TestClient

from api.deps import Services
from catalog.errors import StaleClaim
from catalog.history import job_logs
from catalog.maintenance import garbage_collection
from catalog.queue import claims
from catalog.queue.claiming import Claim
from catalog.states import EndReason
from catalog.tables.jobs import Job
from tests.api.site import error_of
from tests.catalog.world import World


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


def test_logs_of_another_project_are_not_found(stranger: TestClient, claim: Claim) -> None:
    assert error_of(stranger.get(path(claim)))["code"] == "job_not_found"


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
