"""Markup in names and messages is shown as text and has no effect."""

from __future__ import annotations

from catalog.lifecycle import recording
from catalog.tenancy import projects
from tests.dashboard import seed
from tests.dashboard.conftest import Visit
from tests.dashboard.service import Service

MARKUP = "<img src=x onerror=\"document.title='owned'\">"


def test_markup_in_file_names_labels_events_and_errors_stays_text(fresh: Service, visit: Visit) -> None:
    seeded = fresh.seeded
    project = projects.ensure(seeded.db)
    file = seed.upload(seeded.db, seeded.store, seeded.settings, project, f"{MARKUP}.jsonl", 40)
    job = seed.submit(seeded, "hostile", training_file=file.id, metadata={MARKUP: MARKUP})
    seed.prepare(seeded)
    claim_id = seed.claim(seeded)[job.id]
    recording.record_event(seeded.db, claim_id, "error", f"broken by {MARKUP}")
    visitor = visit(fresh)

    visitor.open(f"#/jobs/{job.id}")

    visitor.page.get_by_text(f"broken by {MARKUP}").wait_for()
    visitor.page.get_by_text(f"{MARKUP}.jsonl").wait_for()
    assert MARKUP in visitor.page.get_by_role("region", name="Configuration").inner_text()
    assert visitor.page.locator("main img:not([role])").count() == 0
    assert "owned" not in visitor.page.title()
    visitor.assert_fits()


def test_very_long_name_does_not_break_the_list(fresh: Service, visit: Visit) -> None:
    seed.submit(fresh.seeded, "w" * 64)
    visitor = visit(fresh, width=390)

    visitor.open("#/jobs")

    visitor.page.get_by_role("link", name="w" * 64).wait_for()
    visitor.assert_fits()


def test_markup_in_the_address_stays_text(filled: Service, visit: Visit) -> None:
    visitor = visit(filled)

    visitor.open("#/jobs/%3Cimg%20src%3Dx%20onerror%3Dalert(1)%3E")

    visitor.page.get_by_role("alert").wait_for()
    assert visitor.page.locator("main img").count() == 0
