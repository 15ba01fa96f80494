"""Jobs whose losses or weights are not finite: a checkpoint remains from which a user can continue."""

from __future__ import annotations

import pytest

from catalog.lifecycle import recording
from catalog.registry.adapters import list_checkpoint_models
from catalog.states import EndReason
from tests.worker.pack_site import PackSite, emit, emit_for, step
from worker.session.event_handlers import DIVERGED_DETAIL, NONE_IS_GOOD


@pytest.mark.parametrize(
    ("steps_before", "steps_now", "good_step", "kept_steps", "left"),
    [
        ((), (), 5, (), NONE_IS_GOOD),
        ((), (), None, (), NONE_IS_GOOD),
        ((), (4, 6), 6, (4, 6), "The checkpoint of step 6 is kept."),
        ((), (4, 6), 5, (4,), "The checkpoint of step 4 is kept."),
        ((), (6,), 5, (), NONE_IS_GOOD),
        ((5,), (), 5, (5,), "The checkpoint of step 5 is kept."),
        ((3, 6), (), 5, (3,), "The checkpoint of step 3 is kept."),
    ],
)
def test_a_diverged_job_names_its_good_checkpoint_and_its_packmate_continues(
    site: PackSite,
    steps_before: tuple[int, ...],
    steps_now: tuple[int, ...],
    good_step: int | None,
    kept_steps: tuple[int, ...],
    left: str,
) -> None:
    bad = site.claim_with_checkpoints(*steps_before)
    good = site.claim()
    session = site.session(bad, good)
    for number in steps_now:
        emit_for(session, bad, "checkpointed", step=number, folder=site.checkpoint(session, bad, number))
    emit_for(session, bad, "diverged", step=6, good_step=good_step, message="The loss of train slice 1 is not finite.")
    emit(session, {"type": "stepped", "claim_id": good.claim_id, "seconds": 0.0, **step(7)})

    session.read_events()

    job = site.world.job(bad.job.id)
    assert (job.state, site.reason(bad)) == ("failed", EndReason.DIVERGED)
    assert job.error == {
        "code": "diverged",
        "message": "The loss of train slice 1 is not finite. "
        f"Lower the learning rate, or check the data around the step that the message names. {left}",
        "param": "optimizer.learning_rate",
    }
    kept = {row.step: row.artifact for row in site.checkpoints(bad) if row.artifact is not None}
    assert tuple(kept) == kept_steps
    for number, digest in kept.items():
        assert site.store.get_manifest(digest).files, number
    assert site.world.job(good.job.id).state == "running"
    assert {bad.claim_id, good.claim_id} & site.held() == {good.claim_id}


def test_a_revoked_checkpoint_is_explained_in_the_jobs_events(site: PackSite) -> None:
    claim = site.claim()
    session = site.session(claim)
    emit_for(session, claim, "checkpointed", step=6, folder=site.checkpoint(session, claim, 6))
    emit_for(session, claim, "diverged", step=6, good_step=5, message="The loss of train slice 1 is not finite.")

    session.read_events()

    events = site.world.events(claim.job.id)
    (warning,) = [event.message for event in events if event.level == "warn"]
    assert (
        warning == f"The checkpoint of step 6 can't be used: {DIVERGED_DETAIL} The loss of train slice 1 is not finite."
    )
    assert list_checkpoint_models(site.db, project_id=claim.job.project_id).items == []


@pytest.mark.parametrize(
    ("last_loss", "kept_step", "warned"),
    [(17.0, 11, True), (0.5, 11, False), (17.0, 6, False)],
    ids=["risen", "fallen", "earlier weights are kept"],
)
def test_a_job_whose_loss_has_risen_has_a_warning(
    site: PackSite, last_loss: float, kept_step: int, warned: bool
) -> None:
    claim = site.claim()
    session = site.session(claim)
    for number in range(1, 12):
        event = {**step(number), "loss": 4.0 if number <= 6 else last_loss}
        emit(session, {"type": "stepped", "claim_id": claim.claim_id, "seconds": float(number), **event})
    emit_for(session, claim, "finished", step=11, kept_step=kept_step, stopped_early=None)

    session.read_events()

    events = site.world.events(claim.job.id)
    warnings = [event.message for event in events if event.level == "warn"]
    warning = (
        "The training loss ended at 17, above its initial value of 4. Test the adapter before you use it, and try "
    )
    assert warnings == ([warning + "a lower learning rate."] if warned else [])


def test_the_initial_loss_is_that_of_the_job_not_of_its_attempt(site: PackSite) -> None:
    claim = site.claim()
    session = site.session(claim)
    recording.record_metrics(site.db, claim.claim_id, [{"kind": "train", "step": 1, "loss": 2.0}])
    for number in range(30, 36):
        event = {**step(number), "loss": 3.0}
        emit(session, {"type": "stepped", "claim_id": claim.claim_id, "seconds": float(number), **event})
    emit_for(session, claim, "finished", step=35, kept_step=35, stopped_early=None)

    session.read_events()

    events = site.world.events(claim.job.id)
    (warning,) = [event.message for event in events if event.level == "warn"]
    assert warning.startswith("The training loss ended at 3, above its initial value of 2.")
