"""Sweeps in the database: created atomically, advanced and ended by any process, and pruned at rungs."""

from __future__ import annotations

import pytest

from catalog.errors import Conflict, InvalidRequest, NotFound
from catalog.history import queries
from catalog.jobs import commands as job_commands
from catalog.jobs import explanation
from catalog.lifecycle import recording
from catalog.queue import claims
from catalog.registry import adapters, base_models
from catalog.spec.sweep import TPE_AT_ONCE
from catalog.states import EndReason, JobState
from catalog.storage import files
from catalog.sweeps import controller, creation
from catalog.sweeps import queries as sweep_commands
from catalog.sweeps import queries as sweep_queries
from catalog.tables.jobs import Sweep
from tests.catalog.read_costs import statements_of
from tests.catalog.sweeping import (
    ON_ONE_DATABASE,
    advance,
    board,
    finish,
    make,
    measure,
    of,
    send,
    sweep_request,
    train,
    view,
)
from tests.catalog.world import World


@ON_ONE_DATABASE
def test_each_trial_is_its_own_job_and_all_pack_together(world: World) -> None:
    sweep_id = make(world)

    claimed = train(world)

    assert view(world, sweep_id).counts == {"running": 4}
    assert [claimed[number].job.spec["lora"]["rank"] for number in range(4)] == [2, 4, 8, 16]
    assert len({claim.job.trainer_id for claim in claimed.values()}) == 1
    assert len({claim.job.spec["seed"] for claim in claimed.values()}) == 1


def test_finished_sweep_promotes_the_best_adapter(world: World) -> None:
    sweep_id = make(world)
    claimed = train(world)
    for number, loss in enumerate((1.5, 1.2, 1.4, 1.9)):
        assert view(world, sweep_id).sweep.state == "running"
        with pytest.raises(NotFound):
            adapters.get(world.db, project_id=world.caller.project_id, name=sweep_id)
        finish(world, claimed[number], loss)
        advance(world)

    ended = view(world, sweep_id)

    assert ended.sweep.state == "succeeded"
    assert ended.best is not None
    assert (ended.best.trial.number, ended.best.value) == (1, 1.2)
    assert [each.trial.number for each in board(world, sweep_id)] == [1, 2, 0, 3]
    found = adapters.get(world.db, project_id=world.caller.project_id, name=sweep_id)
    assert (found.adapter.id, found.adapter.job_id) == (ended.best_adapter, claimed[1].job.id)
    with pytest.raises(NotFound):
        adapters.get(world.db, project_id=world.stranger.project_id, name=sweep_id)


@ON_ONE_DATABASE
def test_keep_best_deletes_other_adapters_except_continued_ones(world: World) -> None:
    sweep_id = make(world, keep_adapters="best")
    claimed = train(world)
    for number in (1, 2, 3):
        finish(world, claimed[number], float(number))
    adapter_of = adapters.ids_by_job(world.db, [claimed[number].job.id for number in (1, 2, 3)])
    child = world.submit(parent_adapter=adapter_of[claimed[3].job.id])
    finish(world, claimed[0], 5.0)

    advance(world)

    kept = adapters.list_page(world.db, project_id=world.caller.project_id, after=None, limit=10)
    assert {view.adapter.job_id for view in kept.items} == {claimed[1].job.id, claimed[3].job.id}
    assert world.job(child.id).state == JobState.VALIDATING_FILES
    assert view(world, sweep_id).sweep.best_job == claimed[1].job.id


def test_trial_that_ranks_too_low_at_a_rung_is_pruned(world: World) -> None:
    search = {"type": "asha", "trials": 4, "min_steps": 2, "reduction_factor": 2, "seed": 1}
    sweep_id = make(world, search=search, parameters={"lora.rank": {"min": 1, "max": 64}})
    claimed = train(world, num_steps=100)

    stopped = [measure(world, claimed[number], 2, loss) for number, loss in enumerate((1.0, 2.0, 0.9, 3.0))]

    assert stopped == [False, True, False, True]
    worker_hears = world.beat(*(claim.claim_id for claim in claimed.values()))
    assert [worker_hears[claimed[number].claim_id].cancel for number in range(4)] == stopped
    claims.end(world.db, claimed[1].claim_id, reason=EndReason.CANCELLED_BY_USER, detail="Cancelled.")
    pruned = world.job(claimed[1].job.id)
    assert (pruned.state, pruned.reason) == (JobState.CANCELLED, EndReason.PRUNED)
    trial = sweep_queries.trial(world.db, **of(world, sweep_id), number=1)
    assert (trial.trial.rung, trial.value) == (0, 2.0)
    assert "rung 0" in str(trial.trial.stopped)
    assert f"trial 1 of sweep {sweep_id}" in explanation.explain(world.db, **world.of(pruned.id))["explanation"]
    assert measure(world, claimed[2], 4, 1.5) is False  # the only trial at rung 1 so far


@ON_ONE_DATABASE
def test_stopped_trial_whose_worker_is_lost_still_ends_as_pruned(world: World) -> None:
    search = {"type": "asha", "trials": 2, "min_steps": 2, "reduction_factor": 2, "seed": 1}
    make(world, search=search, parameters={"lora.rank": {"min": 1, "max": 64}})
    claimed = train(world, num_steps=100)
    measure(world, claimed[0], 2, 1.0)
    measure(world, claimed[1], 2, 2.0)

    claims.end(world.db, claimed[1].claim_id, reason=EndReason.TRAINER_CRASHED, detail="It crashed.")

    job = world.job(claimed[1].job.id)
    assert (job.state, job.reason) == (JobState.CANCELLED, EndReason.PRUNED)
    (attempt,) = queries.attempts(world.db, **world.of(job.id))
    assert attempt.reason == EndReason.TRAINER_CRASHED


@ON_ONE_DATABASE
def test_stopped_trial_does_not_compete_at_later_rungs(world: World) -> None:
    search = {"type": "asha", "trials": 3, "min_steps": 2, "reduction_factor": 2, "seed": 1}
    sweep_id = make(world, search=search, parameters={"lora.rank": {"min": 1, "max": 64}})
    claimed = train(world, num_steps=100)
    stopped = [measure(world, claimed[number], 2, loss) for number, loss in enumerate((1.0, 2.0, 0.9))]

    measure(world, claimed[1], 4, 0.1)  # before its worker receives the stop request

    assert stopped == [False, True, False]
    assert sweep_queries.trial(world.db, **of(world, sweep_id), number=1).trial.rung == 0
    assert measure(world, claimed[2], 4, 0.8) is False


@ON_ONE_DATABASE
def test_trial_that_trains_on_while_no_api_server_runs_is_judged_by_its_score_at_the_rung(world: World) -> None:
    search = {"type": "asha", "trials": 2, "min_steps": 2, "reduction_factor": 2, "seed": 1}
    sweep_id = make(world, search=search, parameters={"lora.rank": {"min": 1, "max": 64}})
    claimed = train(world, num_steps=100)
    for step, losses in ((2, (1.0, 2.0)), (3, (3.0, 0.1))):
        for number, loss in enumerate(losses):
            point = {"kind": "valid", "step": step, "loss": loss}
            recording.record_metrics(world.db, claimed[number].claim_id, [point])

    advance(world)

    assert [world.job(claimed[number].job.id).cancel_requested for number in (0, 1)] == [False, True]
    assert [each.value for each in board(world, sweep_id)] == [0.1, 3.0]


@ON_ONE_DATABASE
def test_paused_trial_is_pruned_at_once(world: World) -> None:
    search = {"type": "asha", "trials": 2, "min_steps": 2, "reduction_factor": 2, "seed": 1}
    make(world, search=search, parameters={"lora.rank": {"min": 1, "max": 64}})
    claimed = train(world, num_steps=100)
    measure(world, claimed[0], 2, 1.0)
    recording.record_metrics(world.db, claimed[1].claim_id, [{"kind": "valid", "step": 2, "loss": 2.0}])
    job_commands.pause(world.db, **world.of(claimed[1].job.id))
    claims.end(world.db, claimed[1].claim_id, reason=EndReason.PAUSED_BY_USER, detail="Paused.")

    advance(world)

    job = world.job(claimed[1].job.id)
    assert (job.state, job.reason) == (JobState.CANCELLED, EndReason.PRUNED)


@ON_ONE_DATABASE
@pytest.mark.parametrize("stops", ["its client", "a rung"])
def test_trial_whose_job_is_being_canceled_ends_as_canceled(world: World, stops: str) -> None:
    search = {"type": "asha", "trials": 2, "min_steps": 2, "reduction_factor": 2, "seed": 1}
    sweep_id = make(world, search=search, parameters={"lora.rank": {"min": 1, "max": 64}})
    claimed = train(world, num_steps=100)
    measure(world, claimed[0], 2, 1.0)
    job_commands.cancel(world.db, **world.of(claimed[1].job.id))

    if stops == "its client":
        sweep_commands.stop_trial(world.db, **of(world, sweep_id), number=1)
    else:
        measure(world, claimed[1], 2, 2.0)
    claims.end(world.db, claimed[1].claim_id, reason=EndReason.CANCELLED_BY_USER, detail="Cancelled.")

    assert world.job(claimed[1].job.id).reason == EndReason.CANCELLED_BY_USER
    assert sweep_queries.trial(world.db, **of(world, sweep_id), number=1).trial.stopped is None


@ON_ONE_DATABASE
def test_rung_measured_again_after_a_resume_decides_nothing(world: World) -> None:
    search = {"type": "asha", "trials": 2, "min_steps": 2, "reduction_factor": 2, "seed": 1}
    make(world, search=search, parameters={"lora.rank": {"min": 1, "max": 64}})
    claimed = train(world, num_steps=100)
    assert measure(world, claimed[0], 2, 1.0) is False
    assert measure(world, claimed[1], 2, 0.5) is False

    assert measure(world, claimed[0], 2, 1.0) is False

    assert not world.job(claimed[0].job.id).cancel_requested


@ON_ONE_DATABASE
def test_trial_that_finishes_before_it_stops_has_succeeded(world: World) -> None:
    search = {"type": "asha", "trials": 2, "min_steps": 2, "reduction_factor": 2, "seed": 1}
    sweep_id = make(world, search=search, parameters={"lora.rank": {"min": 1, "max": 64}})
    claimed = train(world, num_steps=10)
    measure(world, claimed[0], 2, 1.0)
    assert measure(world, claimed[1], 2, 2.0) is True

    finish(world, claimed[1], 0.1)

    first = board(world, sweep_id)[0]
    assert (first.job.state, first.trial.stopped, first.value) == (JobState.SUCCEEDED, None, 0.1)


@ON_ONE_DATABASE
def test_training_metrics_are_compared_by_their_mean(world: World) -> None:
    objective = {"metric": "train_mean_token_accuracy"}
    sweep_id = make(world, objective=objective, validation_file=None, parameters={"lora.rank": {"values": [2, 4]}})
    claimed = train(world)
    for number, accuracies in ((0, (0.2, 0.4)), (1, (0.9, 0.1))):
        for step, accuracy in enumerate(accuracies, start=1):
            point = {"kind": "train", "step": step, "loss": 1.0, "token_accuracy": accuracy}
            recording.record_metrics(world.db, claimed[number].claim_id, [point])

    assert [(each.trial.number, each.value) for each in board(world, sweep_id)] == [(1, 0.5), (0, pytest.approx(0.3))]


@ON_ONE_DATABASE
def test_rejected_trial_rolls_back_the_whole_sweep(world: World) -> None:
    with pytest.raises(InvalidRequest):
        make(world, parameters={"lora.target_modules": {"values": [["q_proj"], ["no_such_layer"]]}})

    assert job_commands.list_page(world.db, project_id=world.caller.project_id).items == []
    assert sweep_queries.list_page(world.db, project_id=world.caller.project_id).items == []


def test_remaining_trials_are_created_by_the_next_controller_step(world: World) -> None:
    search = {"type": "random", "trials": 2 * creation.AT_ONCE + 1, "seed": 0}
    sweep_id = make(world, search=search, parameters={"lora.rank": {"min": 1, "max": 64}})
    assert view(world, sweep_id).sweep.num_created == creation.AT_ONCE

    assert advance(world) == 2

    made = view(world, sweep_id)
    assert made.counts == {"validating_files": 2 * creation.AT_ONCE + 1}
    assert advance(world) == 0


@ON_ONE_DATABASE
def test_max_concurrent_limits_unfinished_trials(world: World) -> None:
    sweep_id = make(world, max_concurrent=2)
    advance(world)
    claimed = train(world)
    assert claimed.keys() == {0, 1}

    finish(world, claimed[0], 1.0)
    advance(world)

    assert view(world, sweep_id).counts == {"running": 1, "succeeded": 1, "validating_files": 1}


@ON_ONE_DATABASE
def test_file_of_a_sweep_with_future_trials_cannot_be_deleted(world: World) -> None:
    sweep_id = make(world, max_concurrent=1)
    (claim,) = train(world).values()
    finish(world, claim, 1.0)

    with pytest.raises(Conflict, match=f"sweep {sweep_id}"):
        files.delete(world.db, project_id=world.caller.project_id, file_id=world.file_id)

    sweep_commands.close(world.db, **of(world, sweep_id))
    files.delete(world.db, project_id=world.caller.project_id, file_id=world.file_id)


@ON_ONE_DATABASE
def test_sweep_that_cannot_create_trials_reports_why_and_ends(world: World) -> None:
    sweep_id = make(world, max_concurrent=1)
    claimed = train(world)
    finish(world, claimed[0], 1.0)
    base_models.delete(world.db, "smol")

    advance(world)

    ended = view(world, sweep_id)
    assert ended.sweep.error is not None
    assert (ended.sweep.state, ended.sweep.num_created) == ("succeeded", 1)
    assert ended.sweep.error["code"] == "model_not_found"


@ON_ONE_DATABASE
def test_outdated_sweep_creates_no_further_trials_and_reports_it(world: World) -> None:
    sweep_id = make(world, max_concurrent=1)
    with world.db.write() as session:
        sweep = session.get_one(Sweep, sweep_id)
        sweep.requested = {**sweep.requested, "of_old": True}

    finish(world, train(world)[0], 1.0)
    advance(world)

    ended = view(world, sweep_id).sweep
    assert (ended.state, ended.num_created) == ("succeeded", 1)
    assert ended.error is not None
    assert ended.error["code"] == "plan_outdated"
    assert "rejects 'of_old'" in ended.error["message"]


@ON_ONE_DATABASE
def test_tpe_sweep_creates_trials_as_earlier_ones_end_and_from_the_same_rows_the_same_ones(world: World) -> None:
    search = {"type": "tpe", "trials": 16, "seed": 3}
    sweep_id = make(world, search=search, parameters={"lora.rank": {"min": 1, "max": 64}})
    advance(world)
    assert view(world, sweep_id).counts == {"validating_files": TPE_AT_ONCE}
    for _ in range(12):
        claimed = train(world)
        number, claim = min(claimed.items())
        finish(world, claim, float(claim.job.spec["lora"]["rank"]))
        for other in claimed.keys() - {number}:
            claims.end(world.db, claimed[other].claim_id, reason=EndReason.PREEMPTED, detail="Preempted.")
        with world.db.read() as session:
            sweep = session.get_one(Sweep, sweep_id)
            past = controller._past(session, sweep)  # pyright: ignore[reportPrivateUsage]
        advance(world)

        (expected,) = creation.design_of(sweep).parameters_of([len(past)], past)
        assert sweep_queries.trial(world.db, **of(world, sweep_id), number=len(past)).trial.parameters == expected


def test_canceled_sweep_cancels_unfinished_trials_and_keeps_results(world: World) -> None:
    sweep_id = make(world, max_concurrent=3)
    claimed = train(world)
    finish(world, claimed[0], 1.0)

    sweep_commands.cancel(world.db, **of(world, sweep_id))
    advance(world)

    assert {world.job(claimed[number].job.id).cancel_requested for number in (1, 2)} == {True}
    assert view(world, sweep_id).sweep.state == "running"
    for number in (1, 2):
        claims.end(world.db, claimed[number].claim_id, reason=EndReason.CANCELLED_BY_USER, detail="Cancelled.")
    advance(world)
    ended = view(world, sweep_id)
    assert (ended.sweep.state, ended.counts) == ("cancelled", {"succeeded": 1, "cancelled": 2})
    assert ended.best is not None
    assert ended.best.trial.number == 0
    with pytest.raises(Conflict):
        sweep_commands.cancel(world.db, **of(world, sweep_id))
    assert sweep_commands.cancel(world.db, **of(world, sweep_id), is_client_retry=True).state == "cancelled"


@ON_ONE_DATABASE
def test_shared_rows_of_a_sweep_are_queried_once(world: World) -> None:
    shared = ("FROM files", "FROM base_models", "FROM projects", "FROM api_keys", "FROM workers", "FROM sweeps")

    def num_asked(num_trials: int) -> tuple[int, int]:
        ranks = {"lora.rank": {"values": list(range(1, num_trials + 1))}}
        made: list[str] = []
        asked_of = [
            statements_of(world.db, lambda: made.append(make(world, parameters=ranks))),
            statements_of(world.db, lambda: (sweep_commands.cancel(world.db, **of(world, made[0])), advance(world))),
        ]
        first, second = (sum(any(name in text for name in shared) for text, _ in some) for some in asked_of)
        assert sum("INSERT INTO jobs" in text for text, _ in asked_of[0]) == num_trials + 1, (
            "one trial is inserted first as a check"
        )
        return first, second

    assert num_asked(8) == num_asked(2)


@ON_ONE_DATABASE
def test_sweep_without_an_adapter_has_failed(world: World) -> None:
    sweep_id = make(world, parameters={"lora.rank": {"values": [4]}})
    (claim,) = train(world).values()
    claims.end(world.db, claim.claim_id, reason=EndReason.DIVERGED, detail="Its loss is not finite.")

    advance(world)

    assert (view(world, sweep_id).sweep.state, view(world, sweep_id).best) == ("failed", None)


def test_leaderboard_pages_end_with_unmeasured_trials(world: World) -> None:
    sweep_id = make(world)
    claimed = train(world)
    measure(world, claimed[3], 1, 1.0)
    measure(world, claimed[2], 1, 2.0)

    first = board(world, sweep_id, limit=3)
    rest = board(world, sweep_id, after=first[-1].job.id)

    assert [each.trial.number for each in [*first, *rest]] == [3, 2, 0, 1]
    assert [each.value for each in [*first, *rest]] == [1.0, 2.0, None, None]
    with pytest.raises(InvalidRequest):
        board(world, sweep_id, after="ftjob-gone")


def test_repeated_submission_creates_one_sweep(world: World) -> None:
    request = sweep_request(world)

    sweep = send(world, request, idempotency_key="one")

    assert send(world, request, idempotency_key="one").id == sweep.id
    assert send(world, request, is_client_retry=True).id == sweep.id
    assert send(world, request).id != sweep.id
    with pytest.raises(Conflict, match="already used to create sweep"):
        send(world, sweep_request(world, seed=3), idempotency_key="one")
    assert len(job_commands.list_page(world.db, project_id=world.caller.project_id).items) == 8
