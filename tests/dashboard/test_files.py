"""The page of files: data reports, uploads, rejected files, downloads and deletion."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from catalog.registry import base_models
from catalog.storage import files
from tests.dashboard import seed
from tests.dashboard.conftest import Visit
from tests.dashboard.service import Service

GOOD = json.dumps({"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]})
BAD = ['{"messages": "none"}', '{"messages": [], "prompt": "2 + 2?"}']


def test_file_shows_purpose_size_rows_and_data_report(filled: Service, visit: Visit) -> None:
    visitor = visit(filled)

    visitor.open("#/files")

    row = visitor.page.get_by_role("row").filter(has_text="signatures-train.jsonl")
    expect(row).to_contain_text("2 rows truncated to 4\u202f096 tokens")
    shown = row.inner_text()
    for word in (
        "fine-tune",
        "kB",
        "320 rows",
        "5 duplicate rows, kept",
        "used by 11 jobs",
        filled.seeded.training.id[:14],
    ):
        assert word in shown


def test_data_report_remains_after_its_base_model_is_deleted(fresh: Service, visit: Visit) -> None:
    job = seed.submit(fresh.seeded, "done")
    seed.prepare(fresh.seeded)
    seed.succeed(fresh.seeded, seed.claim(fresh.seeded)[job.id])
    base_models.delete(fresh.seeded.db, seed.BASE)
    visitor = visit(fresh)

    visitor.open("#/files")

    row = visitor.page.get_by_role("row").filter(has_text="signatures-train.jsonl")
    row.get_by_text("5 duplicate rows, kept").wait_for()
    row.get_by_text(f"for {seed.BASE} (deleted)").wait_for()


def test_unreadable_data_report_shows_an_error(fresh: Service, visit: Visit) -> None:
    seed.submit(fresh.seeded, "reads-it")
    visitor = visit(fresh)
    visitor.page.route("**/report?*", lambda route: route.fulfill(status=500, body="{}"))

    visitor.open("#/files")

    row = visitor.page.get_by_role("row").filter(has_text="signatures-train.jsonl")
    row.get_by_text("Couldn't load the data report: The service responded with status 500").wait_for()


def test_file_shows_among_how_many_jobs_its_uses_were_counted(fresh: Service, visit: Visit) -> None:
    seeded = fresh.seeded
    old = seed.upload(seeded.db, seeded.store, seeded.settings, seed.projects.ensure(seeded.db), "old.jsonl", 1)
    seed.submit(fresh.seeded, "oldest", training_file=old.id)
    visitor = visit(fresh)
    visitor.open("#/files")
    visitor.page.get_by_role("row").filter(has_text="old.jsonl").get_by_text("used by 1 job", exact=True).wait_for()

    for number in range(100):
        seed.submit(fresh.seeded, f"newer-{number}")

    for name, shown in (("old.jsonl", "none"), ("signatures-train.jsonl", "100")):
        row = visitor.page.get_by_role("row").filter(has_text=name)
        row.get_by_text(f"used by {shown} of the newest 100 jobs", exact=True).wait_for()


def test_file_is_uploaded_with_the_keyboard(fresh: Service, visit: Visit, tmp_path: Path) -> None:
    visitor = visit(fresh)
    visitor.open("#/files")
    visitor.page.get_by_label("File", exact=True).set_input_files(_written(tmp_path, [GOOD, GOOD]))

    visitor.page.get_by_role("button", name="Upload").focus()
    visitor.page.keyboard.press("Enter")

    visitor.page.get_by_role("row").filter(has_text="sums.jsonl").wait_for()
    shown = visitor.page.locator("[aria-live]").filter(has_text="sums.jsonl was uploaded: 2 rows")
    expect(shown).to_have_count(1)
    assert _names(fresh)[0] == "sums.jsonl"


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_rejected_file_lists_its_lines_and_focuses_the_field(
    fresh: Service, visit: Visit, tmp_path: Path, width: int, scheme: str
) -> None:
    visitor = visit(fresh, width=width, scheme=scheme)
    visitor.open("#/files")
    visitor.page.get_by_label("File", exact=True).set_input_files(_written(tmp_path, [GOOD, *BAD]))

    visitor.page.get_by_role("button", name="Upload").click()

    alert = visitor.page.get_by_role("alert")
    expect(alert.get_by_role("listitem")).to_have_text(
        [
            "Line 2: messages is a string, not a list. "
            'Use a list of messages, such as [{"role": "user", "content": "..."}, '
            '{"role": "assistant", "content": "..."}].',
            re.compile(r"Line 3: the row has an unknown key, 'prompt'\. Remove the key, or correct .*"),
        ]
    )
    expect(alert.get_by_role("paragraph").last).to_have_text("Correct these lines, then upload the file again.")
    expect(visitor.page.get_by_label("File", exact=True)).to_be_focused()
    assert _description(visitor.page) == "upload-error"
    assert _names(fresh) == _initial_names(fresh)
    visitor.assert_fits()
    visitor.assert_accessible()


def test_upload_without_a_file_asks_for_one(fresh: Service, visit: Visit) -> None:
    visitor = visit(fresh)
    visitor.open("#/files")

    visitor.page.get_by_role("button", name="Upload").click()

    expect(visitor.page.get_by_role("alert")).to_contain_text("Select a file first.")


def test_file_for_another_purpose_is_not_validated(fresh: Service, visit: Visit, tmp_path: Path) -> None:
    visitor = visit(fresh)
    visitor.open("#/files")
    visitor.page.get_by_label("File", exact=True).set_input_files(_written(tmp_path, ["not json"]))
    visitor.page.get_by_label("Purpose").select_option("user_data")

    visitor.page.get_by_role("button", name="Upload").click()

    row = visitor.page.get_by_role("row").filter(has_text="sums.jsonl")
    expect(row).to_contain_text("user_data")


def test_deleting_a_file_requires_confirmation(fresh: Service, visit: Visit) -> None:
    visitor = visit(fresh)
    visitor.open("#/files")

    visitor.page.get_by_role("button", name="Delete signatures-train.jsonl").click()
    visitor.page.get_by_role("button", name="Keep the file").click()
    assert _names(fresh) == _initial_names(fresh)
    visitor.page.get_by_role("button", name="Delete signatures-train.jsonl").click()
    visitor.page.get_by_role("button", name="Delete the file").click()

    expect(visitor.page.get_by_role("row").filter(has_text="signatures-train.jsonl")).to_have_count(0)
    assert _names(fresh) == ["signatures-held-out.jsonl"]


def test_file_in_use_is_kept_with_an_explanation(fresh: Service, visit: Visit) -> None:
    job = seed.submit(fresh.seeded, "reads-it")
    visitor = visit(fresh)
    visitor.open("#/files")

    visitor.page.get_by_role("button", name="Delete signatures-train.jsonl").click()
    visitor.page.get_by_role("button", name="Delete the file").click()

    alert = visitor.page.get_by_role("alert").filter(has_text=f"in use by job {job.id}")
    expect(alert).to_contain_text("cancel it")
    assert _names(fresh) == _initial_names(fresh)


def test_file_is_downloaded_unchanged(filled: Service, visit: Visit, tmp_path: Path) -> None:
    visitor = visit(filled)
    visitor.open("#/files")

    with visitor.page.expect_download() as download:
        visitor.page.get_by_role("link", name="Download signatures-train.jsonl").click()

    download.value.save_as(tmp_path / "taken")
    assert len((tmp_path / "taken").read_text().splitlines()) == 320


def test_older_files_load_on_request_and_stay_during_updates(fresh: Service, visit: Visit) -> None:
    seeded = fresh.seeded
    project = seed.projects.ensure(seeded.db)
    for number in range(31):
        seed.upload(seeded.db, seeded.store, seeded.settings, project, f"part-{number}.jsonl", 1)
    visitor = visit(fresh)
    visitor.open("#/files")
    expect(visitor.page.locator("tbody tr")).to_have_count(30)

    visitor.page.get_by_role("button", name="Show older files").click()

    expect(visitor.page.locator("tbody tr")).to_have_count(33)
    expect(visitor.page.get_by_role("button", name="Show older files")).to_have_count(0)
    seed.submit(seeded, "reads-one")
    visitor.page.get_by_text("used by 1 job").first.wait_for()
    seed.prepare(seeded)
    visitor.page.get_by_text("5 duplicate rows, kept").first.wait_for()
    expect(visitor.page.locator("tbody tr")).to_have_count(33)


def test_empty_page_names_the_upload_command(fresh: Service, visit: Visit) -> None:
    for file in (fresh.seeded.training, fresh.seeded.validation):
        files.delete(fresh.seeded.db, project_id=fresh.seeded.caller.project_id, file_id=file.id)
    visitor = visit(fresh)

    visitor.open("#/files")

    assert "lorry files upload train.jsonl" in visitor.text()
    visitor.assert_accessible()


def _written(folder: Path, lines: list[str]) -> Path:
    path = folder / "sums.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def _names(service: Service) -> list[str]:
    page = files.list_page(service.seeded.db, project_id=service.seeded.caller.project_id)
    return [file.filename for file in page.items]


def _initial_names(service: Service) -> list[str]:
    return [service.seeded.validation.filename, service.seeded.training.filename]


def _description(page: Page) -> str | None:
    return page.get_by_label("File", exact=True).get_attribute("aria-describedby")
