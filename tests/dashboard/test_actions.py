"""Actions on the pages: pause and cancel jobs, download adapters and verify them."""

from __future__ import annotations

import tarfile
from pathlib import Path

from playwright.sync_api import expect

from catalog.jobs import commands
from tests.dashboard import seed
from tests.dashboard.conftest import Visit
from tests.dashboard.service import Service


def test_pausing_a_job_requires_confirmation(fresh: Service, visit: Visit) -> None:
    job = seed.submit(fresh.seeded, "to-pause")
    visitor = visit(fresh)
    visitor.open(f"#/jobs/{job.id}")

    visitor.page.get_by_role("button", name="Pause").click()
    dialog = visitor.page.get_by_role("dialog", name="Pause to-pause?")
    visitor.assert_accessible()
    visitor.page.keyboard.press("Escape")
    dialog.wait_for(state="detached")
    assert _state(fresh, job.id) == "validating_files"
    visitor.page.get_by_role("button", name="Pause").click()
    dialog.get_by_role("button", name="Pause the job").click()

    visitor.page.get_by_role("button", name="Resume").wait_for()
    assert _state(fresh, job.id) == "paused"


def test_running_job_shows_its_requested_cancellation(fresh: Service, visit: Visit) -> None:
    job = seed.submit(fresh.seeded, "to-cancel")
    seed.prepare(fresh.seeded)
    seed.claim(fresh.seeded)
    visitor = visit(fresh)
    visitor.open(f"#/jobs/{job.id}")

    visitor.page.get_by_role("button", name="Cancel").click()
    visitor.page.get_by_role("button", name="Cancel the job").click()

    visitor.page.get_by_text("canceling").wait_for()
    expect(visitor.page.get_by_role("button", name="Cancel")).to_be_disabled()
    assert commands.get(fresh.seeded.db, project_id=fresh.seeded.caller.project_id, job_id=job.id).cancel_requested


def test_adapter_is_downloaded_as_one_archive(filled: Service, visit: Visit, tmp_path: Path) -> None:
    visitor = visit(filled)
    visitor.open(filled.address("#/adapters/docstrings-r16"))

    with visitor.page.expect_download() as download:
        visitor.page.get_by_role("link", name="Download").click()

    download.value.save_as(tmp_path / "adapter.tar")
    with tarfile.open(tmp_path / "adapter.tar") as archive:
        names = {Path(name).name for name in archive.getnames()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= names


def test_verify_now_reads_every_byte_again(fresh: Service, visit: Visit) -> None:
    job = seed.submit(fresh.seeded, "to-verify")
    seed.prepare(fresh.seeded)
    claim_id = seed.claim(fresh.seeded)[job.id]
    seed.succeed(fresh.seeded, claim_id)
    visitor = visit(fresh)
    visitor.open(fresh.address("#/adapters/to-verify"))

    visitor.page.get_by_role("button", name="Verify now").click()
    visitor.page.locator(".result").wait_for()
    first = visitor.page.locator(".result").inner_text()
    _damage(fresh)
    visitor.page.get_by_role("button", name="Verify now").click()

    visitor.page.get_by_text("The adapter does not match its records.").wait_for()
    assert "All files match the manifest" in first


def test_lineage_record_is_shown_formatted_and_as_json(filled: Service, visit: Visit) -> None:
    visitor = visit(filled)
    visitor.open(filled.address("#/adapters/docstrings-r16"))

    summary = visitor.page.get_by_role("region", name="Lineage").locator("dl").first.inner_text()
    visitor.page.get_by_text("results", exact=True).click()
    visitor.page.get_by_text("Loss log", exact=False).wait_for()
    visitor.page.get_by_text("The record as JSON").click()

    assert "240 steps, 81\u202f240 tokens" in summary
    assert '"format": "lorry.lineage/1"' in visitor.page.locator(".raw pre").inner_text()


def _state(service: Service, job_id: str) -> str:
    return commands.get(service.seeded.db, project_id=service.seeded.caller.project_id, job_id=job_id).state


def _damage(service: Service) -> None:
    """Flip a byte of the largest blob."""
    blobs = [path for path in (service.seeded.settings.data_dir / "store").rglob("*") if path.is_file()]
    largest = max(blobs, key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.chmod(0o644)
    largest.write_bytes(content)
