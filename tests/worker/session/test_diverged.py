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
    ("before", "losses", "kept_step", "warning"),
    [
        (None, [4.0] * 6 + [17.0] * 5, 11, "at 17, above its initial value of 4. Test the adapter before you use it,"),
        (None, [4.0] * 6 + [0.5] * 5, 11, None),
        (None, [4.0] * 6 + [17.0] * 5, 6, None),
        (2.0, [3.0] * 6, 35, "at 3, above its initial value of 2."),
    ],
    ids=["risen", "fallen", "earlier weights are kept", "risen since an earlier attempt"],
)
def test_a_job_whose_loss_has_risen_has_a_warning(
    site: PackSite, before: float | None, losses: list[float], kept_step: int, warning: str | None
) -> None:
    claim = site.claim()
    session = site.session(claim)
    if before is not None:
        recording.record_metrics(site.db, claim.claim_id, [{"kind": "train", "step": 1, "loss": before}])

    first = 1 if before is None else 30
    for number, loss in enumerate(losses, first):
        event = {**step(number), "loss": loss}
        emit(session, {"type": "stepped", "claim_id": claim.claim_id, "seconds": float(number), **event})
    emit_for(session, claim, "finished", step=first + len(losses) - 1, kept_step=kept_step, stopped_early=None)
    session.read_events()

    warnings = [event.message for event in site.world.events(claim.job.id) if event.level == "warn"]
    assert len(warnings) == (warning is not None)
    assert all(f"The training loss ended {warning}" in message for message in warnings)
