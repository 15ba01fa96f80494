"""Layer patterns are resolved before the write transaction, and the result is checked again within it."""

from __future__ import annotations

from typing import Any

import pytest

from catalog.admission.target_layers import MAX_ATTEMPTS, Targets
from catalog.errors import Conflict, InvalidRequest
from catalog.jobs import submission
from catalog.plans import claims
from catalog.registry import base_models
from catalog.spec import target_modules
from catalog.spec.job import ParentSpec, PlannedJob
from catalog.spec.lora import LoraRequest, resolve_lora
from catalog.tables.storage import BaseModelRow
from catalog.write_guard import WithinTransaction
from tests.catalog.plan_data import SETTINGS, know, plan
from tests.catalog.sweeping import ON_ONE_DATABASE, advance, finish, make, train, view
from tests.catalog.world import World, begin_plan, sha

PATHS = {"linear_paths": [{"path": "model.layers.*.q_proj", "shape": [64, 64], "layers": [0, 1]}]}
LORA = {"rank": 4, "target_modules": r"re:.*\.q_proj", "rank_pattern": {r"layers\.1\..*": 2}}


@pytest.fixture
def wide(world: World) -> World:
    """Return a world whose base model `wide` has layer paths that patterns match."""
    world.base("wide", **PATHS)
    return world


def num_parameters(world: World, job_id: str) -> int:
    return world.job(job_id).adapter_parameters


def test_jobs_and_plans_match_patterns_outside_write_transactions(wide: World) -> None:
    job = wide.submit(model="wide", lora=LORA)
    row = plan(wide, model="wide", lora=LORA)
    claim = begin_plan(wide.db, "w1")
    assert claim is not None
    know(wide, row)
    claims.conclude(wide.db, claim.task, settings=SETTINGS)
    planned = submission.create(
        wide.db, caller=wide.caller, request=PlannedJob(plan=row.id), body_digest=sha("planned")
    )

    assert num_parameters(wide, job.id) == num_parameters(wide, planned.id) == (4 + 2) * 128


def test_child_jobs_match_parent_patterns_outside_write_transactions(wide: World) -> None:
    parent = wide.running(model="wide", lora=LORA)
    made = wide.complete(parent.claim_id)

    child = wide.submit(model="wide", parent_adapter=made.name)

    assert num_parameters(wide, child.id) == (4 + 2) * 128


@ON_ONE_DATABASE
def test_sweeps_match_patterns_outside_write_transactions(wide: World) -> None:
    search = {"type": "random", "trials": 15, "seed": 0}
    parameters = {"lora.rank": {"min": 3, "max": 64}}
    sweep_id = make(wide, model="wide", lora=LORA, search=search, parameters=parameters)
    advance(wide)

    assert view(wide, sweep_id).sweep.num_created == 15


def test_patterns_in_a_write_transaction_raise(wide: World) -> None:
    lora = resolve_lora(LoraRequest.model_validate(LORA))
    with wide.db.write():
        with pytest.raises(WithinTransaction):
            LoraRequest.model_validate(LORA)
        with pytest.raises(WithinTransaction):
            target_modules.adapted(PATHS, lora, base_name="wide", matcher=target_modules.Matcher())

    with wide.db.read():
        assert LoraRequest.model_validate(LORA)
        assert len(target_modules.adapted(PATHS, lora, base_name="wide", matcher=target_modules.Matcher())) == 2


def changing(world: World, monkeypatch: pytest.MonkeyPatch, *, times: int) -> list[str]:
    """Replace the base model after each of the next `times` resolutions. Returns the list of the new digests."""
    resolve, digests = submission.resolve_targets, list[str]()

    def resolve_and_change(*given: Any) -> Any:
        targets = resolve(*given)
        if len(digests) < times:
            digests.append(sha(f"another {len(digests)}"))
            base_models.delete(world.db, "wide")
            base_models.add(world.db, name="wide", kind="folder", source="/models/another")
            world.finish_import("wide", digest=digests[-1], description={"num_parameters": 1, **PATHS})
        return targets

    monkeypatch.setattr(submission, "resolve_targets", resolve_and_change)
    return digests


def test_layers_are_resolved_again_if_the_base_model_has_changed(wide: World, monkeypatch: pytest.MonkeyPatch) -> None:
    digests = changing(wide, monkeypatch, times=1)

    job = wide.submit(model="wide", lora=LORA)

    assert [job.base_digest] == digests


def test_base_model_that_changes_on_every_attempt_is_a_conflict(wide: World, monkeypatch: pytest.MonkeyPatch) -> None:
    digests = changing(wide, monkeypatch, times=MAX_ATTEMPTS)

    with pytest.raises(Conflict) as refusal:
        wide.submit(model="wide", lora=LORA)

    assert (refusal.value.code, len(digests)) == ("model_changed", MAX_ATTEMPTS)


def test_error_for_a_change_during_admission_names_the_parent_adapter(wide: World) -> None:
    parent = ParentSpec(adapter="adapter-1", name="ft:one", artifact="a", lineage="l")
    with wide.db.read() as session:
        base = session.get_one(BaseModelRow, "wide")

    for given, changed in ((parent, "Base model 'wide' or parent adapter 'ft:one'"), (None, "Base model 'wide'")):
        with pytest.raises(Conflict, match=f"^{changed} changed while the request was being checked") as refused:
            Targets().of(base, resolve_lora(LoraRequest()), parent=given)
        assert refused.value.code == "model_changed"


def test_all_patterns_of_a_round_of_trials_share_one_time_limit(wide: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target_modules, "MATCH_SECONDS", 0.0)

    with pytest.raises(InvalidRequest) as refusal:
        make(wide, model="wide", lora=LORA)

    assert refusal.value.code == "invalid_value"


@ON_ONE_DATABASE
def test_a_sweep_whose_base_model_was_replaced_continues_on_the_new_one(wide: World) -> None:
    sweep_id = make(wide, model="wide", lora=LORA, max_concurrent=1)
    finish(wide, train(wide)[0], 1.0)
    base_models.delete(wide.db, "wide")
    base_models.add(wide.db, name="wide", kind="folder", source="/models/another")
    wide.finish_import("wide", digest=sha("another"), description={"num_parameters": 1, **PATHS})

    advance(wide)

    assert view(wide, sweep_id).sweep.num_created == 2
