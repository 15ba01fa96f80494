"""A sweep on the real trainer: its trials share one pack, and bad ones are pruned at rungs."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from catalog.registry import adapters
from catalog.spec.sweep import SweepRequest
from catalog.states import EndReason, JobState
from catalog.sweeps import creation, queries
from tests.worker_site import BASE, PEPPER, WorkerSite, worker_site

pytestmark = pytest.mark.slow
NUM_STEPS = 120
"""Enough that no machine finishes them before its worker has processed the first rung."""


def make(site: WorkerSite, **fields: Any) -> str:
    files = {"training_file": site.upload(60), "validation_file": site.upload(12, seed=5)}
    shared = {"model": BASE, "precision": "float32", "max_steps": NUM_STEPS, "seed": 1}
    shared |= {"hyperparameters": {"batch_size": 8}}
    request = SweepRequest.model_validate({**shared, **files, **fields})
    return creation.create(site.db, caller=site.caller, request=request, body_digest=os.urandom(8).hex()).id


def test_trials_train_in_one_pack_and_bad_ones_are_pruned_at_rungs(tmp_path: Path) -> None:
    with worker_site(tmp_path) as site:
        search = {"type": "asha", "trials": 6, "min_steps": 4, "reduction_factor": 2, "seed": 3}
        rates = {"min": 1e-7, "max": 1e-2, "scale": "log"}
        sweep_id = make(site, search=search, parameters={"optimizer.learning_rate": rates})

        mine: dict[str, Any] = {"project_id": site.caller.project_id, "sweep_id": sweep_id}
        site.start([sys.executable, "-m", "api", "serve", "--port", "0"], LORRY_PEPPER=PEPPER)
        site.start_worker()

        site.wait_until(lambda: queries.get(site.db, **mine).sweep.finished_at is not None)
        view = queries.get(site.db, **mine)
        board = queries.leaderboard(site.db, **mine).items
        assert view.sweep.state == "succeeded", site.log()
        assert len({each.job.trainer_id for each in board}) == 1
        pruned = [each for each in board if each.job.reason == EndReason.PRUNED]
        assert {each.job.state for each in pruned} == {JobState.CANCELLED}
        assert len(pruned) >= 2
        assert all((each.job.progress or {})["step"] < NUM_STEPS for each in pruned)
        assert view.best is not None
        tried = {each.trial.number: each.trial.parameters["optimizer.learning_rate"] for each in board}
        assert tried[view.best.trial.number] == max(tried.values())
        assert board[0].job.id == view.best.job.id
        found = adapters.get(site.db, project_id=site.caller.project_id, name=sweep_id)
        assert found.adapter.job_id == view.best.job.id
        assert len(site.adapters()) == len(board) - len(pruned)
