"""How an ending becomes a state: the decision, over everything that it can be given."""

from __future__ import annotations

import itertools

import pytest

from catalog.lifecycle.failures import MAX_OUT_OF_MEMORY
from catalog.lifecycle.outcomes import BACK_OFF_SECONDS, REMEDIES, decide
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

REASONS = [reason for reason in EndReason if reason is not EndReason.COMPLETED]
EVERYTHING = list(itertools.product(REASONS, (False, True), (False, True), range(MAX_COUNTED_ATTEMPTS)))


@pytest.mark.parametrize(("reason", "cancel", "pause", "counted"), EVERYTHING)
def test_every_ending_has_a_way_out_of_running(reason: EndReason, cancel: bool, pause: bool, counted: int) -> None:
    verdict = decide(reason, cancel_requested=cancel, pause_requested=pause, counted_attempts=counted)

    assert next_state(JobState.RUNNING, verdict.verb) is not None
    assert counted <= verdict.counted_attempts <= counted + 1
    if cancel and ENDINGS[reason].retryable:
        assert verdict.verb is Verb.APPLY_CANCEL
    if verdict.verb in (Verb.REQUEUE, Verb.RELEASE):
        assert verdict.counted_attempts < MAX_COUNTED_ATTEMPTS


@pytest.mark.parametrize("reason", REASONS)
def test_without_wishes_the_table_of_endings_decides(reason: EndReason) -> None:
    ending = ENDINGS[reason]

    verdict = decide(
        reason, cancel_requested=False, pause_requested=reason is EndReason.PAUSED_BY_USER, counted_attempts=0
    )

    state = next_state(JobState.RUNNING, verdict.verb)
    assert state == (JobState.QUEUED if ending.retryable else ending.state)
    assert verdict.verb is not Verb.REQUEUE or verdict.wait_seconds == BACK_OFF_SECONDS[0]


def test_of_every_ending_that_may_put_a_job_aside_somebody_can_do_something() -> None:
    counted = MAX_COUNTED_ATTEMPTS - 1

    put_aside = {
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

    assert put_aside == REMEDIES.keys()


def test_the_users_own_mistake_is_told_though_they_asked_to_cancel() -> None:
    verdict = decide(EndReason.USER_ERROR, cancel_requested=True, pause_requested=False, counted_attempts=0)

    assert verdict.verb is Verb.FAIL


def test_nothing_leaves_a_final_state_and_every_other_can_reach_one() -> None:
    for state in JobState:
        moves = [verb for verb in Verb if next_state(state, verb) is not None]
        assert bool(moves) is (state not in FINAL_STATES)

    reached: set[JobState] = set(FINAL_STATES)
    for _ in JobState:
        reached |= {s for s in JobState if any(next_state(s, verb) in reached for verb in Verb)}
    assert reached == set(JobState)
