"""The API server on PostgreSQL, with inputs that only PostgreSQL rejects."""

from __future__ import annotations

import pytest
from fastapi import FastAPI

from tests.api.conftest import new_key, with_key
from tests.api.site import chat_lines, error_of
from tests.catalog.world import Clock, World


@pytest.fixture
def database() -> str:
    return "postgresql"


def test_job_completes_on_postgresql(app: FastAPI) -> None:
    services = app.state.services
    world = World(services.db, Clock())
    world.worker()
    with with_key(app, new_key(services, world.caller.project_id)) as client:
        file = client.post(
            "/v1/files", data={"purpose": "fine-tune"}, files={"file": ("x.jsonl", chat_lines(9))}
        ).json()
        body = {"model": "smol", "training_file": file["id"], "metadata": {"k": "v"}}
        job = client.post("/v1/fine_tuning/jobs", json=body).json()
        world.prepare_all()
        (claim,) = world.claim()
        world.complete(claim.claim_id)

        done = client.get(f"/v1/fine_tuning/jobs/{job['id']}").json()
        answers = [
            client.get(path).status_code
            for path in (
                f"/v1/fine_tuning/jobs/{job['id']}/events",
                f"/v1/fine_tuning/jobs/{job['id']}/attempts",
                f"/v1/fine_tuning/jobs/{job['id']}/why",
                f"/v1/fine_tuning/jobs/{job['id']}/data_report",
                f"/v1/adapters/{done['adapter_id']}",
                f"/v1/models/{done['fine_tuned_model']}",
                "/v1/fine_tuning/jobs?metadata[k]=v",
                "/v1/queue",
                "/v1/workers",
                "/readyz",
            )
        ]
        stream = client.get(f"/v1/fine_tuning/jobs/{job['id']}/stream").text

    assert done["status"] == "succeeded"
    assert set(answers) == {200}
    assert '"status":"succeeded"' in stream


def test_null_characters_are_rejected_without_a_crash(app: FastAPI) -> None:
    services = app.state.services
    world = World(services.db, Clock())
    least = {"model": "smol", "training_file": world.file_id}
    with with_key(app, new_key(services, world.caller.project_id, is_operator=True)) as client:
        bodies = [
            {**least, "model": "a\0b"},
            {**least, "training_file": "a\0b"},
            {**least, "validation_file": "\0"},
        ]
        answers = [client.post("/v1/fine_tuning/jobs", json=body) for body in bodies]
        answers += [
            client.post("/v1/models", json={"name": "a\0", "kind": "hub", "source": "x"}),
            client.post("/v1/models", json={"name": "a", "kind": "hub", "source": "x\0"}),
            client.post("/v1/models", json={"name": "a", "kind": "hub", "source": "x", "revision": "\0"}),
            client.get("/v1/files", params={"after": "a\0"}),
            client.get("/v1/fine_tuning/jobs/a%00b"),
        ]

        odd = client.post("/v1/fine_tuning/jobs", json={**least, "metadata": {"k\0": "a\0b"}}).json()
        kept = client.get(f"/v1/fine_tuning/jobs/{odd['id']}").json()

    assert kept["metadata"] == {"k\0": "a\0b"}
    assert all(response.status_code in (400, 404) for response in answers), [r.text for r in answers]
    for response in answers:
        error_of(response)
