"""The page of a job, and the values that the page and the list both show."""

from __future__ import annotations

import re

from playwright.sync_api import expect
from sqlalchemy import select

from catalog.jobs import reproduction, submission
from catalog.lifecycle import recording
from catalog.tables.history import Attempt
from catalog.tables.jobs import Job
from tests.dashboard import seed
from tests.dashboard.conftest import Visit
from tests.dashboard.service import Service


def test_result_is_the_validation_loss_of_the_kept_step(fresh: Service, visit: Visit) -> None:
    job = seed.submit(fresh.seeded, "best", evaluation={"keep": "best", "samples": {"prompts": ["How cold?"]}})
    seed.prepare(fresh.seeded)
    claim_id = seed.claim(fresh.seeded)[job.id]
    curve = [{"kind": "valid", "step": step, "loss": loss} for step, loss in ((0, 3.0), (120, 1.5), (240, 2.5))]
    recording.record_metrics(fresh.seeded.db, claim_id, curve)
    seed.succeed(fresh.seeded, claim_id, kept_step=120)
    visitor = visit(fresh)

    visitor.open("#/jobs")
    row = visitor.page.get_by_role("row").filter(has_text="best")
    assert row.get_by_role("cell").nth(2).inner_text().split()[:2] == ["validation", "1.500"]
    visitor.open(f"#/jobs/{job.id}")

    headline = visitor.page.get_by_role("region", name="Progress")
    expect(headline).to_contain_text("1.500")
    expect(headline).to_contain_text("best at step 120, used for the adapter; latest: 2.500")
    run = visitor.page.get_by_role("table", name="Run")
    assert run.get_by_role("row", name="sample prompts").inner_text().split("\t")[1:] == ['"How cold?"'] * 2


def test_job_duration_excludes_waiting_time(fresh: Service, visit: Visit) -> None:
    job_id = _done_after_waiting(fresh, waited=7200, ran=95)
    visitor = visit(fresh)

    visitor.open("#/jobs")

    row = visitor.page.get_by_role("row").filter(has_text="waited-long")
    row.get_by_text("took 1 min 35 s").wait_for()
    visitor.open(f"#/jobs/{job_id}")
    visitor.page.get_by_role("region", name="Progress").get_by_text("took 1 min 35 s").wait_for()


def test_failed_job_shows_its_error_and_remedy(filled: Service, visit: Visit) -> None:
    visitor = visit(filled)

    visitor.open(filled.address("#/jobs/hot-lr"))

    assert "The loss became NaN at step 38. Lower the learning rate" in visitor.text()


def test_current_attempt_has_the_state_running(filled: Service, visit: Visit) -> None:
    visitor = visit(filled)

    visitor.open(filled.address("#/jobs/titles-r16"))

    attempts = visitor.page.get_by_role("table", name="Attempts, newest first")
    state = attempts.get_by_role("row").nth(1).get_by_role("cell").first
    expect(attempts.get_by_role("columnheader").nth(1)).to_have_text("State")
    expect(state).to_have_text("running", use_inner_text=True)  # its label is for narrow windows
    visitor.open(filled.address("#/jobs/hot-lr"))
    expect(state).to_have_text("diverged", use_inner_text=True)


def test_epochs_are_fractional_if_max_steps_ends_the_job_first(fresh: Service, visit: Visit) -> None:
    job = seed.submit(fresh.seeded, "short", max_steps=60)
    seed.prepare(fresh.seeded, num_steps=60)
    claim_id = seed.claim(fresh.seeded)[job.id]
    seed.train(fresh.seeded, claim_id, until=30, num_steps=60)
    visitor = visit(fresh)

    visitor.open(f"#/jobs/{job.id}")

    visitor.page.get_by_text("step 30 of 60").wait_for()
    visitor.page.get_by_text("epoch 0.38 of 0.75").wait_for()  # 30 and 60 batches of 4 out of 320 rows
    run = visitor.page.get_by_role("table", name="Run")
    assert run.get_by_role("row", name="epochs").inner_text().split("\t")[1:] == [
        "3",
        "0.75 of 3 (max_steps)",
    ]
    visitor.open("#/jobs")
    assert (
        "epoch 0.38" in visitor.page.get_by_role("row").filter(has_text="short").inner_text()
    )  # as the worker reports it


def test_epoch_is_the_workers_count_capped_at_the_last_epoch(fresh: Service, visit: Visit) -> None:
    job = seed.submit(fresh.seeded, "odd-batches")
    seed.prepare(fresh.seeded)
    claim_id = seed.claim(fresh.seeded)[job.id]
    progress = {"step": 120, "num_steps": seed.NUM_STEPS, "epoch": 1.234}  # the steps alone would give 1.5
    recording.record_progress(fresh.seeded.db, claim_id, progress)
    visitor = visit(fresh)
    visitor.open("#/jobs")
    row = visitor.page.get_by_role("row").filter(has_text="odd-batches")
    row.get_by_text("epoch 1.23", exact=True).wait_for()

    recording.record_progress(fresh.seeded.db, claim_id, {**progress, "step": seed.NUM_STEPS, "epoch": 3.2})

    row.get_by_text("epoch 3.00", exact=True).wait_for()
    visitor.open(f"#/jobs/{job.id}")
    visitor.page.get_by_text("epoch 3.00 of 3").wait_for()


def test_job_page_shows_requested_and_resolved_values(filled: Service, visit: Visit) -> None:
    visitor = visit(filled)

    visitor.open(filled.address("#/jobs/titles-r16"))

    adapter = visitor.page.get_by_role("table", name="Adapter")
    assert adapter.get_by_role("row", name=re.compile(r"^alpha \d")).inner_text().split() == ["alpha", "16", "16"]
    assert adapter.get_by_role("row", name="dropout").inner_text().split() == ["dropout", "default", "0"]
    visitor.page.get_by_text("signatures-train.jsonl").wait_for()


def test_job_page_links_to_packmates(filled: Service, visit: Visit) -> None:
    visitor = visit(filled)
    visitor.open(filled.address("#/jobs/titles-r16"))

    visitor.page.get_by_role("region", name="Attempts").get_by_role("link", name="titles-r8").click()

    visitor.page.get_by_role("heading", name="titles-r8", level=1).wait_for()


def test_unknown_job_shows_an_error_with_a_remedy(filled: Service, visit: Visit) -> None:
    visitor = visit(filled)

    visitor.open("#/jobs/ftjob-nothing")

    alert = visitor.page.get_by_role("alert")
    alert.wait_for()
    assert "No job with the ID 'ftjob-nothing'." in alert.inner_text()
    assert "Check the ID" in alert.inner_text()


def _done_after_waiting(service: Service, *, waited: float, ran: float) -> str:
    """Create a job that waited `waited` seconds for its only attempt, which took `ran` seconds. Returns its id."""
    job = seed.submit(service.seeded, "waited-long")
    seed.prepare(service.seeded)
    claim_id = seed.claim(service.seeded)[job.id]
    seed.train(service.seeded, claim_id, until=seed.NUM_STEPS)
    seed.succeed(service.seeded, claim_id)
    with service.seeded.db.write() as session:
        row = session.get_one(Job, job.id)
        attempt = session.scalars(select(Attempt).where(Attempt.job_id == job.id)).one()
        assert attempt.ended_at is not None
        attempt.started_at = attempt.ended_at - ran
        row.created_at = attempt.started_at - waited
    return job.id


def test_job_page_shows_the_result_of_a_reproduction(fresh: Service, visit: Visit) -> None:
    seeded, job = fresh.seeded, seed.submit(fresh.seeded, "audited")
    seed.prepare(seeded)
    adapter_id = seed.succeed(seeded, seed.claim(seeded)[job.id])
    prepared = reproduction.prepare(seeded.db, seeded.caller, adapter_id)
    again = submission.create(seeded.db, caller=seeded.caller, request=prepared, body_digest="b" * 64)
    seed.prepare(seeded)
    visitor = visit(fresh)

    visitor.open(f"#/jobs/{again.id}")
    panel = visitor.page.get_by_role("region", name="Configuration")
    panel.get_by_text("after the job has succeeded", exact=True).wait_for()
    panel.get_by_role("link", name=prepared.name).wait_for()
    seed.succeed(seeded, seed.claim(seeded)[again.id])

    panel.get_by_text("The reproduction is identical", exact=False).wait_for()
