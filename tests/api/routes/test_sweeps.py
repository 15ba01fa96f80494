"""Sweeps over HTTP and through the SDK: creation, queries, and a search that prunes and learns."""

from __future__ import annotations

from typing import Any

from starlette.testclient import TestClient

from api.deps import Services
from catalog.lifecycle import recording
from catalog.lifecycle.recording import Course
from catalog.queue import claiming, claims
from catalog.states import EndReason
from catalog.sweeps import controller
from catalog.tenancy import authentication
from lorry import Lorry
from tests.api.site import Site, error_of
from tests.catalog.world import World


def sweep_body(world: World, **fields: Any) -> dict[str, Any]:
    files = {"training_file": world.file_id, "validation_file": world.file_id}
    usual = {"model": "smol", "search": {"type": "grid"}, "parameters": {"lora.rank": {"values": [2, 4, 8]}}}
    return {**usual, **files, **fields}


def test_sweep_is_created_listed_and_cancelled(client: TestClient, world: World) -> None:
    made = client.post("/v1/sweeps", json=sweep_body(world, suffix="try")).json()

    assert (made["status"], made["num_trials"], made["counts"]) == ("running", 3, {"validating_files": 3})
    assert made["search"] | {"seed": 0} == {
        **{"type": "grid", "trials": 3, "seed": 0},
        **{"pruner": None, "min_steps": None, "reduction_factor": None},
    }
    assert made["objective"] == {"metric": "valid_loss", "goal": "minimize"}
    assert [sweep["id"] for sweep in client.get("/v1/sweeps").json()["data"]] == [made["id"]]
    trials = client.get(f"/v1/sweeps/{made['id']}/trials").json()["data"]
    assert [trial["parameters"] for trial in trials] == [{"lora.rank": rank} for rank in (2, 4, 8)]
    job = client.get(f"/v1/fine_tuning/jobs/{trials[1]['id']}").json()
    assert job["sweep"] == {"id": made["id"], "trial": 1, "parameters": {"lora.rank": 4}}
    assert (job["suffix"], job["priority"]) == ("try", "batch")

    assert client.post(f"/v1/sweeps/{made['id']}/cancel").json()["counts"] == {"cancelled": 3}

    assert client.get(f"/v1/sweeps/{made['id']}/trials/0").json()["status"] == "cancelled"


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"parameters": {"lora.rnak": {"values": [4]}}}, "parameters.lora.rnak", "Did you mean 'lora.rank'?"),
    ({"parameters": {"lora.rank": {"values": [4, 1000]}}}, "parameters.lora.rank", "1000"),
    ({"parameters": {"lora.rank": {"value": [4]}}}, "parameters.lora.rank.value", "Unknown field"),
    ({"search": {"type": "grid", "trials": 3}}, "search", "remove it"),
    ({"search": {"type": "gird"}}, "search.type", "'grid'"),
    ({"search": None}, "search", "one of 'grid', 'random', 'tpe', 'asha'"),
    ({"parametres": {}}, "parametres", "'parameters'"),
    ({"model": "gone"}, "model", "gone"),
    ({"training_file": "file-gone"}, "training_file", "file-gone"),
]
"""A change of the body, the rejected field, and a part of the message."""


def test_rejection_names_the_field_and_creates_no_job(client: TestClient, world: World) -> None:
    for change, param, words in REFUSED:
        body = {name: value for name, value in sweep_body(world, **change).items() if value is not None}
        response = client.post("/v1/sweeps", json=body)

        assert response.status_code in (400, 404), change
        error = error_of(response)
        assert error["param"] == param
        assert words in error["message"]
    assert client.get("/v1/fine_tuning/jobs").json()["data"] == []


def test_each_trial_counts_as_a_job(client: TestClient, world: World, services: Services) -> None:
    with services.db.write() as session:
        for row in session.query(authentication.ApiKey):
            row.jobs_per_day = 4

    assert client.post("/v1/sweeps", json=sweep_body(world)).status_code == 200
    assert client.post("/v1/sweeps", json=sweep_body(world)).status_code == 429

    assert len(client.get("/v1/sweeps").json()["data"]) == 1


class Fleet:
    """Simulates workers: each `work` call is one step of each trial. The final loss of a trial depends on its rank."""

    def __init__(self, world: World, num_steps: int) -> None:
        self._world = world
        self._num_steps = num_steps
        self._running: dict[str, tuple[claiming.Claim, int]] = {}
        world.worker()

    def work(self, _seconds: float) -> None:
        self._world.prepare_all(num_steps=self._num_steps)
        self._running |= {claim.claim_id: (claim, 0) for claim in self._world.claim()}
        for claim_id, (claim, step) in list(self._running.items()):
            self._running[claim_id] = (claim, step + 1)
            if self._step(claim, step + 1):
                del self._running[claim_id]
        while controller.advance(self._world.db):
            pass

    def _step(self, claim: claiming.Claim, step: int) -> bool:
        """Return whether the trial has ended."""
        db, rank = self._world.db, claim.job.spec["lora"]["rank"]
        if self._world.job(claim.job.id).cancel_requested:
            claims.end(db, claim.claim_id, reason=EndReason.CANCELLED_BY_USER, detail="Cancelled.")
            return True
        point = {"kind": "valid", "step": step, "loss": abs(rank - 20) + 10.0 / step}
        recording.record_metrics(db, claim.claim_id, [point])
        if step < self._num_steps:
            return False
        course = Course(steps=step, kept_step=step, stopped_early=None)
        self._world.complete(claim.claim_id, f"adapter of {claim.job.id}", course=course)
        return True


def test_search_prunes_trials_and_learns_from_finished_ones(site: Site, world: World) -> None:
    fleet = Fleet(world, num_steps=9)
    search: Any = {"type": "tpe", "pruner": "asha", "min_steps": 2, "reduction_factor": 2, "trials": 24, "seed": 1}

    with Lorry(site.url, site.key, sleep=fleet.work) as lorry:
        sweep = lorry.sweeps.create(
            model="smol",
            training_file=world.file_id,
            validation_file=world.file_id,
            search=search,
            parameters={"lora.rank": {"min": 1, "max": 64}},
        )
        ended = lorry.sweeps.wait(sweep.id)
        board = list(lorry.sweeps.trials(sweep.id))

    assert sweep.num_created == sweep.raw["max_concurrent"] == 4
    assert ended.search == {**search, "seed": 1}
    assert (ended.status, ended.num_created, len(board)) == ("succeeded", 24, 24)
    pruned = [trial for trial in board if trial.reason == "pruned"]
    assert 0 < len(pruned) < 24
    assert all(trial.stopped and "it was not among the best 1/2" in trial.stopped for trial in pruned)
    best = next(trial for trial in board if trial.status == "succeeded")
    assert ended.fine_tuned_model == best.fine_tuned_model

    def distance(numbers: range) -> float:
        return sum(abs(trial.parameters["lora.rank"] - 20) for trial in board if trial.number in numbers)

    assert distance(range(14, 24)) < distance(range(10))
