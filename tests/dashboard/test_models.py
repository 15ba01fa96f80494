"""The page of base models: details, import errors and deletion."""

from __future__ import annotations

import pytest
from playwright.sync_api import expect

from catalog.error_texts import ErrorText
from catalog.registry import base_models
from catalog.tasks import outcomes
from catalog.tasks.task_queue import TaskClaim
from catalog.tenancy import authentication
from tests.catalog.world import claim_import_of
from tests.dashboard import seed
from tests.dashboard.conftest import Visit
from tests.dashboard.service import Service

FAILED = {
    "code": "hub_unreachable",
    "message": "The hub did not answer: connection refused.",
    "remedy": "Check the worker's network, or add the model from a folder.",
}


def test_base_model_shows_state_size_digest_and_adapters(filled: Service, visit: Visit) -> None:
    digest = base_models.get(filled.seeded.db, seed.BASE).digest or ""
    visitor = visit(filled)

    visitor.open("#/models")

    row = visitor.page.get_by_role("row").filter(has_text=seed.BASE)
    expect(row).to_contain_text("7 unfinished jobs")
    shown = row.inner_text()
    for word in ("ready", "135 M", "up to 8\u202f192 tokens", digest[:12], "2 adapters of this project"):
        assert word in shown


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_failed_import_shows_error_and_remedy(fresh: Service, visit: Visit, width: int, scheme: str) -> None:
    _add(fresh, "llama-1b", error=FAILED)
    visitor = visit(fresh, width=width, scheme=scheme)

    visitor.open("#/models")

    shown = visitor.page.get_by_role("row").filter(has_text="llama-1b").inner_text()
    assert "import failed" in shown
    assert FAILED["message"] in shown
    assert FAILED["remedy"] in shown
    visitor.assert_fits()
    visitor.assert_accessible()


def test_end_of_an_import_appears_without_a_reload(fresh: Service, visit: Visit) -> None:
    task = _add(fresh, "llama-1b")
    visitor = visit(fresh)
    visitor.page.route("**/queue/stream*", lambda route: route.fulfill(status=204))  # no updates from the queue
    visitor.open("#/models")
    row = visitor.page.get_by_role("row").filter(has_text="llama-1b")
    row.get_by_text("importing").wait_for()
    visitor.page.wait_for_load_state("networkidle")

    outcomes.fail(fresh.seeded.db, task, base_models.IMPORT, ErrorText(**FAILED))

    row.get_by_text("import failed").wait_for()


def test_deleting_a_base_model_with_the_keyboard_requires_confirmation(fresh: Service, visit: Visit) -> None:
    _add(fresh, "llama-1b", error=FAILED)
    visitor = visit(fresh)
    visitor.open("#/models")
    button = visitor.page.get_by_role("button", name="Delete llama-1b")

    button.focus()
    visitor.page.keyboard.press("Enter")
    visitor.page.get_by_role("dialog", name="Delete llama-1b?").wait_for()
    visitor.assert_accessible()
    visitor.page.keyboard.press("Escape")
    assert [base.name for base in base_models.list_all(fresh.seeded.db)] == ["llama-1b", seed.BASE]
    expect(button).to_be_focused()
    visitor.page.keyboard.press("Enter")
    visitor.page.get_by_role("button", name="Delete the model").click()

    expect(visitor.page.get_by_role("row").filter(has_text="llama-1b")).to_have_count(0)
    expect(visitor.page.locator("[aria-live]").filter(has_text="Deleted llama-1b")).to_have_count(1)
    assert [base.name for base in base_models.list_all(fresh.seeded.db)] == [seed.BASE]


def test_base_model_in_use_is_kept_with_an_explanation(fresh: Service, visit: Visit) -> None:
    job = seed.submit(fresh.seeded, "needs-it")
    visitor = visit(fresh)
    visitor.open("#/models")

    visitor.page.get_by_role("button", name=f"Delete {seed.BASE}").click()
    visitor.page.get_by_role("button", name="Delete the model").click()

    alert = visitor.page.get_by_role("alert")
    expect(alert).to_contain_text(f"in use by job {job.id}")
    expect(alert).to_contain_text("Wait until all jobs that use the model finish")
    assert [base.name for base in base_models.list_all(fresh.seeded.db)] == [seed.BASE]


def test_operator_sees_use_of_a_base_model_by_another_project(fresh: Service, visit: Visit) -> None:
    seeded = fresh.seeded
    others = seed.another_project(seeded)
    visitor = visit(fresh)
    visitor.open("#/models")
    row = visitor.page.get_by_role("row").filter(has_text=seed.BASE)
    row.get_by_text("no unfinished jobs", exact=True).wait_for()

    seed.submit(others, "theirs")

    row.get_by_text("1 unfinished job", exact=True).wait_for()


def test_only_operators_can_delete_a_base_model(fresh: Service, visit: Visit) -> None:
    seeded = fresh.seeded
    project_id = seeded.caller.project_id
    _, secret = authentication.create(
        seeded.db, project_id=project_id, name="plain", pepper=seeded.pepper, is_operator=False
    )
    visitor = visit(fresh, signed_in=False)
    visitor.open("#/models")
    visitor.page.get_by_label("API key").fill(secret)
    visitor.page.keyboard.press("Enter")

    row = visitor.page.get_by_role("row").filter(has_text=seed.BASE)
    row.get_by_text("no unfinished jobs of this project", exact=True).wait_for()
    expect(visitor.page.get_by_role("button", name="Delete")).to_have_count(0)


def test_empty_page_names_the_add_command(fresh: Service, visit: Visit) -> None:
    base_models.delete(fresh.seeded.db, seed.BASE)
    visitor = visit(fresh)

    visitor.open("#/models")

    assert "lorry models add NAME SOURCE" in visitor.text()
    visitor.assert_accessible()


def _add(service: Service, name: str, *, error: dict[str, str] | None = None) -> TaskClaim:
    """Add a base model whose import is running or has failed."""
    db = service.seeded.db
    base_models.add(db, name=name, kind="hub", source="meta-llama/Llama-3.2-1B-Instruct")
    task = claim_import_of(db, name)
    if error is not None:
        outcomes.fail(db, task, base_models.IMPORT, ErrorText(**error))
    return task
