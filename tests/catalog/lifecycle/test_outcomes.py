"""The end of an attempt determines the state of its job, and transitions that the table lacks are rejected."""

from __future__ import annotations

import itertools

import pytest

from catalog.error_texts import templates
from catalog.errors import Conflict
from catalog.jobs import commands
from catalog.lifecycle.failures import MAX_OUT_OF_MEMORY
from catalog.lifecycle.outcomes import BACK_OFF_SECONDS, decide
from catalog.lifecycle.transitions import move
from catalog.states import (
    ENDINGS,
    FINAL_STATES,
    MAX_COUNTED_ATTEMPTS,
    MAX_LOSSES,
    EndReason,
    JobState,
    Verb,
    next_state,
)
from tests.catalog.world import World

REASONS = [reason for reason in EndReason if reason is not EndReason.COMPLETED]
EVERYTHING = list(itertools.product(REASONS, (False, True), (False, True), range(MAX_COUNTED_ATTEMPTS)))


@pytest.mark.parametrize(("reason", "cancel", "pause", "counted"), EVERYTHING)
def test_every_end_reason_leaves_the_running_state(reason: EndReason, cancel: bool, pause: bool, counted: int) -> None:
    verdict = decide(reason, cancel_requested=cancel, pause_requested=pause, counted_attempts=counted)

    assert next_state(JobState.RUNNING, verdict.verb) is not None
    assert counted <= verdict.counted_attempts <= counted + 1
    if cancel and ENDINGS[reason].retryable:
        assert verdict.verb is Verb.APPLY_CANCEL
    if verdict.verb in (Verb.REQUEUE, Verb.RELEASE):
        assert verdict.counted_attempts < MAX_COUNTED_ATTEMPTS


@pytest.mark.parametrize("reason", REASONS)
def test_end_reason_decides_without_user_requests(reason: EndReason) -> None:
    ending = ENDINGS[reason]

    verdict = decide(
        reason, cancel_requested=False, pause_requested=reason is EndReason.PAUSED_BY_USER, counted_attempts=0
    )

    state = next_state(JobState.RUNNING, verdict.verb)
    assert state == (JobState.QUEUED if ending.retryable else ending.state)
    assert verdict.verb is not Verb.REQUEUE or verdict.wait_seconds == BACK_OFF_SECONDS[0]


def test_every_quarantine_reason_has_a_remedy() -> None:
    counted = MAX_COUNTED_ATTEMPTS - 1

    quarantined = {
        reason
        for reason in REASONS
        if decide(
            reason,
            cancel_requested=False,
            pause_requested=False,
            counted_attempts=counted,
            losses=MAX_LOSSES,
            num_shortages=MAX_OUT_OF_MEMORY,
        ).is_quarantine
    }

    assert quarantined == {
        EndReason(name.removeprefix("quarantined_after_"))
        for name in templates()
        if name.startswith("quarantined_after_") and name != "quarantined_after_known_error"
    }


def test_user_error_is_reported_despite_a_cancel_request() -> None:
    verdict = decide(EndReason.USER_ERROR, cancel_requested=True, pause_requested=False, counted_attempts=0)

    assert verdict.verb is Verb.FAIL


def test_final_states_are_final_and_reachable_from_every_state() -> None:
    for state in JobState:
        moves = [verb for verb in Verb if next_state(state, verb) is not None]
        assert bool(moves) is (state not in FINAL_STATES)

    reached: set[JobState] = set(FINAL_STATES)
    for _ in JobState:
        reached |= {s for s in JobState if any(next_state(s, verb) in reached for verb in Verb)}
    assert reached == set(JobState)


@pytest.mark.parametrize(
    ("act", "remedy"),
    [
        (None, "Use an action that is allowed in this state: pause or cancel."),
        (commands.pause, "Use an action that is allowed in this state: resume or cancel."),
        (commands.cancel, "To train again, create a new job: a finished job can't be changed."),
    ],
)
def test_rejected_transition_names_the_allowed_actions(world: World, act: object, remedy: str) -> None:
    job = world.queued()
    if callable(act):
        act(world.db, **world.of(job.id))
    state = world.job(job.id).state

    with (
        pytest.raises(
            Conflict, match=f"'complete' is not allowed for job {job.id}, whose state is '{state}'"
        ) as refused,
        world.db.write() as session,
    ):
        move(session, world.job(job.id), Verb.COMPLETE, now=world.clock(), message="Done.")

    assert (refused.value.code, refused.value.remedy) == ("invalid_transition", remedy)
