"""Multipart uploads: at most one file per upload, in the requested part order, and no leftovers."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from catalog.datasets.check_process import CheckCrashed
from catalog.error_texts import ErrorText
from catalog.errors import (
    Conflict,
    InvalidRequest,
    LorryError,
    OutOfSpace,
    Unavailable,
)
from catalog.maintenance import garbage_collection
from catalog.settings import Settings
from catalog.storage import files, multipart_uploads
from catalog.tables.storage import File, Upload, UploadPart
from tests.catalog.part_sender import ONE, THREE, TWO, WHOLE, Sender
from tests.services.small_disk import small_disk


def test_parts_are_joined_in_the_requested_order(sender: Sender) -> None:
    upload_id = sender.begin()
    three, one, two = (sender.part(upload_id, content) for content in (THREE, ONE, TWO))

    done = sender.complete(upload_id, one, two, three, md5=hashlib.md5(WHOLE).hexdigest().upper())

    assert (done.status, done.upload.file_id) == ("completed", done.file and done.file.id)
    assert sender.content(done.file) == WHOLE
    assert [(file.filename, file.num_rows, file.num_bytes) for file in sender.made()] == [("a.jsonl", 3, len(WHOLE))]
    assert list((sender.folder / "spool").iterdir()) == []


def test_identical_parts_are_stored_once_and_may_repeat(sender: Sender) -> None:
    upload_id = sender.begin(len(ONE + TWO + ONE))
    one, two, again = (sender.part(upload_id, content) for content in (ONE, TWO, ONE))

    done = sender.complete(upload_id, one, two, again)

    assert one == again
    assert sender.content(done.file) == ONE + TWO + ONE


def test_unused_part_may_stay_unnamed(sender: Sender) -> None:
    upload_id = sender.begin(len(ONE))
    sender.part(upload_id, b"cut off on its w")

    assert sender.content(sender.complete(upload_id, sender.part(upload_id, ONE)).file) == ONE


def test_rejected_completion_makes_no_file_and_leaves_the_upload_open(sender: Sender) -> None:
    upload_id, other_id = sender.begin(), sender.begin(len(b"not JSON"))
    one, two, three = (sender.part(upload_id, content) for content in (ONE, TWO, THREE))
    bad = sender.part(other_id, b"not JSON")
    right, wrong = (hashlib.md5(content).hexdigest() for content in (WHOLE, ONE + THREE + TWO))
    refusals: list[tuple[str, str, tuple[str, ...], str | None, str]] = [
        ("upload_incomplete", upload_id, (one, two), None, f"upload {upload_id} was created with {len(WHOLE)} as"),
        ("upload_incomplete", upload_id, (one, two, three, three), None, f"total size of {len(WHOLE + THREE)} bytes"),
        ("upload_not_found", upload_id, (one, two, bad), None, f"'part_ids[2]' is '{bad}', but upload {upload_id}"),
        ("upload_not_found", upload_id, (one, "part-x", two), None, "'part_ids[1]' is 'part-x'"),
        ("upload_incomplete", upload_id, (one, three, two), right, f"{upload_id} have the MD5 checksum {wrong}"),
        ("invalid_row", other_id, (bad,), None, "Line 1"),
    ]

    for code, refused_id, part_ids, md5, fragment in refusals:
        with pytest.raises(InvalidRequest) as refused:
            sender.complete(refused_id, *part_ids, md5=md5)
        assert refused.value.code == code
        assert fragment in refused.value.message

    assert sender.made() == []
    assert list((sender.folder / "spool").iterdir()) == []
    assert sender.complete(upload_id, one, two, three).status == "completed"


@pytest.mark.parametrize("end", ["completed", "cancelled", "expired"])
def test_ended_upload_rejects_further_requests(sender: Sender, end: str) -> None:
    upload_id = sender.begin()
    parts = [sender.part(upload_id, content) for content in (ONE, TWO, THREE)]
    if end == "completed":
        sender.complete(upload_id, *parts)
    elif end == "cancelled":
        assert sender.cancel(upload_id).status == "cancelled"
    else:
        sender.world.clock.advance(multipart_uploads.OPEN_SECONDS)

    verbs: list[Callable[[], object]] = [
        lambda: sender.part(upload_id, b"more"),
        lambda: sender.complete(upload_id, *parts),
        lambda: multipart_uploads.check_open(sender.world.db, project_id=sender.project_id, upload_id=upload_id),
    ]
    for verb in verbs:
        with pytest.raises(Conflict) as refused:
            verb()
        assert refused.value.code == "invalid_transition"
    if end == "expired":
        assert sender.cancel(upload_id).status == "expired"
    else:
        with pytest.raises(Conflict):
            sender.cancel(upload_id)
    assert len(sender.made()) == (end == "completed")


def test_retried_requests_get_the_original_response(sender: Sender) -> None:
    done_id, dropped_id = sender.begin(len(ONE)), sender.begin()
    part = sender.part(done_id, ONE)
    done = sender.complete(done_id, part, again=True)
    sender.cancel(dropped_id)

    again = sender.complete(done_id, part, again=True)

    assert (again.status, again.file and again.file.id) == ("completed", done.file and done.file.id)
    assert sender.cancel(dropped_id, again=True).status == "cancelled"
    assert len(sender.made()) == 1


@pytest.mark.parametrize("is_retry", [True, False])
def test_completion_that_outlives_its_lease_makes_no_second_file(
    sender: Sender, monkeypatch: pytest.MonkeyPatch, is_retry: bool
) -> None:
    """The client gave up waiting for the first completion, which ends while the second one joins the parts."""
    monkeypatch.setattr(multipart_uploads, "JOIN_LEASE_SECONDS", 0.0)
    upload_id = sender.begin(len(ONE))
    part = sender.part(upload_id, ONE)
    as_it_was = files.stored

    def interrupted(*arguments: Any, **given: Any) -> File:
        monkeypatch.setattr(files, "stored", as_it_was)
        sender.complete(upload_id, part)
        return as_it_was(*arguments, **given)

    monkeypatch.setattr(files, "stored", interrupted)
    if is_retry:
        assert sender.complete(upload_id, part, again=True).file is not None
    else:
        with pytest.raises(Conflict):
            sender.complete(upload_id, part)

    assert len(sender.made()) == 1


def test_concurrent_completions_join_the_parts_once(sender: Sender, monkeypatch: pytest.MonkeyPatch) -> None:
    upload_id = sender.begin(len(ONE))
    part = sender.part(upload_id, ONE)
    as_it_was, refused = files.stored, list[str]()

    def meanwhile(*arguments: Any, **given: Any) -> File:
        with pytest.raises(Unavailable) as refusal:
            sender.complete(upload_id, part, again=True)
        refused.append(refusal.value.code)
        return as_it_was(*arguments, **given)

    monkeypatch.setattr(files, "stored", meanwhile)
    first = sender.complete(upload_id, part)

    assert refused == ["upload_completing"]
    assert first.file is not None
    monkeypatch.setattr(files, "stored", as_it_was)
    assert len(sender.made()) == 1
    again = sender.complete(upload_id, part, again=True).file
    assert again is not None
    assert again.id == first.file.id


def test_failed_completion_may_be_retried_at_once(sender: Sender) -> None:
    upload_id = sender.begin(len(ONE))
    part = sender.part(upload_id, ONE)
    with pytest.raises(InvalidRequest):
        sender.complete(upload_id, part, md5="0" * 32)

    assert sender.complete(upload_id, part).file is not None


def test_rejected_completions_are_limited(sender: Sender, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multipart_uploads, "MAX_COMPLETIONS", 2)
    upload_id = sender.begin(len(ONE))
    part = sender.part(upload_id, ONE)
    for _ in range(2):
        with pytest.raises(InvalidRequest):
            sender.complete(upload_id, part, md5="0" * 32)

    with pytest.raises(Conflict) as refused:
        sender.complete(upload_id, part)

    assert refused.value.code == "invalid_transition"
    assert sender.made() == []


def test_crashed_check_counts_as_a_completion(sender: Sender, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*_: Any, **__: Any) -> None:
        raise CheckCrashed(ErrorText(code="preparation_failed", message="The process ended.", remedy="Try again."))

    monkeypatch.setattr(multipart_uploads, "MAX_COMPLETIONS", 2)
    monkeypatch.setattr(files, "stored", crash)
    upload_id = sender.begin(len(ONE))
    part = sender.part(upload_id, ONE)
    for _ in range(2):
        with pytest.raises(CheckCrashed):
            sender.complete(upload_id, part)

    with pytest.raises(Conflict) as refused:
        sender.complete(upload_id, part)

    assert refused.value.code == "invalid_transition"


def test_completion_that_the_service_failed_does_not_count(sender: Sender, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*_: Any, **__: Any) -> None:
        raise Unavailable(
            ErrorText(code="store_unavailable", message="The store does not answer.", remedy="Try again.")
        )

    monkeypatch.setattr(multipart_uploads, "MAX_COMPLETIONS", 2)
    upload_id = sender.begin(len(ONE))
    part = sender.part(upload_id, ONE)
    with monkeypatch.context() as patched:
        patched.setattr(files, "put", away)
        for _ in range(4):
            with pytest.raises(Unavailable):
                sender.complete(upload_id, part)

    assert sender.complete(upload_id, part).file is not None


@pytest.mark.parametrize(
    ("given", "code", "param"),
    [
        ({"num_bytes": 1_001}, "file_too_large", "bytes"),
        ({"num_bytes": 0}, "file_empty", "bytes"),
        ({"purpose": "fine-tune-results"}, "wrong_file_kind", "purpose"),
    ],
)
def test_upload_that_would_fail_at_completion_is_rejected_at_creation(
    sender: Sender, given: dict[str, Any], code: str, param: str
) -> None:
    with pytest.raises(LorryError) as refused:
        sender.begin(**given)

    assert (refused.value.code, refused.value.param) == (code, param)


def test_disk_that_fills_while_joining_keeps_nothing(sender: Sender, tmp_path: Path) -> None:
    sender.settings = Settings(data_dir=tmp_path, max_file_bytes=10**6)
    content = ONE * 1_000
    upload_id = sender.begin(len(content))
    part, sender.spool = sender.part(upload_id, content), tmp_path / "disk" / "spool"

    with small_disk(tmp_path / "disk", 32_768):
        with pytest.raises(OutOfSpace):
            sender.complete(upload_id, part)
        assert list(sender.spool.iterdir()) == []

    assert sender.made() == []
    assert sender.complete(upload_id, part).status == "completed"


def test_lifetime_of_a_multipart_file_starts_at_completion(sender: Sender) -> None:
    upload_id = sender.begin(len(ONE), lifetime_seconds=7200)
    part = sender.part(upload_id, ONE)
    sender.world.clock.advance(3000)

    file = sender.complete(upload_id, part).file

    assert file is not None
    assert file.expires_at == file.created_at + 7200 > sender.world.clock.now + 7100


def test_cleanup_keeps_parts_of_open_uploads_only(sender: Sender) -> None:
    open_id, cancelled_id, done_id = (sender.begin(len(ONE)) for _ in range(3))
    sender.part(open_id, b"open")
    sender.part(cancelled_id, b"cancelled")
    done = sender.part(done_id, ONE)
    sender.part(done_id, b"unnamed")
    sender.cancel(cancelled_id)
    sender.complete(done_id, done)

    garbage_collection.clean(sender.world.db, sender.store, grace_seconds=-60)

    assert blobs(sender) == {sha(b"open"), sha(ONE)}
    sender.world.clock.advance(multipart_uploads.OPEN_SECONDS)
    garbage_collection.clean(sender.world.db, sender.store, grace_seconds=-60)
    assert blobs(sender) == {sha(ONE)}
    assert (rows(sender, UploadPart), rows(sender, Upload)) == (0, 3)
    sender.world.clock.advance(multipart_uploads.KEPT_SECONDS)
    garbage_collection.drop_references(sender.world.db)
    assert rows(sender, Upload) == 0
    assert len(sender.made()) == 1


def blobs(sender: Sender) -> set[str]:
    return {entry.key.rsplit("/", 1)[-1] for entry in sender.store.objects.list_all("blobs")}


def rows(sender: Sender, table: type[Upload | UploadPart]) -> int:
    with sender.world.db.read() as session:
        return len(list(session.scalars(select(table))))


def sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
