"""Limits of open uploads per project and per upload. Parts count until they are removed from the disk."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from catalog.errors import (
    InvalidRequest,
    QuotaExceeded,
    TooLarge,
)
from catalog.maintenance import garbage_collection
from catalog.settings import Settings
from catalog.storage import multipart_uploads
from catalog.tables.storage import Upload
from catalog.usage import quotas
from catalog.usage.ledger import DAY_SECONDS
from tests.catalog.part_sender import ONE, THREE, TWO, Sender
from tests.catalog.storage.test_multipart_uploads import blobs, sha


def test_open_uploads_and_their_bytes_are_limited_per_project(sender: Sender) -> None:
    sender.settings = Settings(data_dir=sender.folder, max_open_uploads=2, max_open_upload_bytes=500)
    first, _ = sender.begin(200), sender.begin(200)

    refused: list[QuotaExceeded] = []
    for num_bytes in (1, 101):
        with pytest.raises(QuotaExceeded) as refusal:
            sender.begin(num_bytes)
        refused.append(refusal.value)
        if num_bytes == 1:
            sender.cancel(first)
            sender.begin(200)
            sender.settings = sender.settings.model_copy(update={"max_open_uploads": 9})

    assert [error.quota["name"] for error in refused] == ["open_uploads", "open_upload_bytes"]
    assert refused[0].message == "Project 'ours' already has 2 open uploads, and the maximum is 2."
    assert "project 'ours' already use 400 of the 500 bytes" in refused[1].message
    assert ["deleted, within two days" in error.remedy for error in refused] == [False, True]
    assert refused[0].retry_after_seconds == pytest.approx(3600, abs=1)
    sender.project_id = sender.world.stranger.project_id
    sender.begin(200)
    sender.project_id = sender.world.caller.project_id
    sender.world.clock.advance(3601)
    sender.begin(500)


def test_upload_beyond_the_limit_of_all_open_uploads_suggests_a_smaller_file(sender: Sender) -> None:
    sender.settings = Settings(data_dir=sender.folder, max_open_upload_bytes=500)

    with pytest.raises(QuotaExceeded) as refused:
        sender.begin(501)

    assert refused.value.remedy == "Split the file, or ask the operator to raise LORRY_MAX_OPEN_UPLOAD_BYTES."
    sender.begin(500)
    with pytest.raises(QuotaExceeded, match=r"This upload needs 1 byte, but uploads of project 'ours' already use 500"):
        sender.begin(1)


def test_parts_count_until_they_are_cleaned_up(sender: Sender) -> None:
    sender.settings = Settings(data_dir=sender.folder, max_open_upload_bytes=1_000)
    cancelled, done, expired = sender.begin(500), sender.begin(len(ONE)), sender.begin(100)
    sender.part(cancelled, b"x" * 300)
    named = sender.part(done, ONE)
    sender.part(done, b"y" * 250)
    sender.part(expired, b"z" * 150)
    sender.cancel(cancelled)
    sender.complete(done, named)
    sender.world.clock.advance(multipart_uploads.OPEN_SECONDS)

    with pytest.raises(QuotaExceeded) as refused:
        sender.begin(301)
    sender.cancel(sender.begin(300))

    assert refused.value.quota["used"] == 300 + 250 + 150
    garbage_collection.drop_references(sender.world.db)
    with pytest.raises(QuotaExceeded):
        sender.begin(301)
    sender.world.clock.advance(multipart_uploads.KEPT_SECONDS)
    garbage_collection.drop_references(sender.world.db)
    sender.begin(1_000)


def test_joined_parts_count_in_addition_to_their_file(sender: Sender) -> None:
    joined_id, whole_id, repeated_id = (
        sender.begin(len(ONE + TWO)),
        sender.begin(len(THREE)),
        sender.begin(3 * len(ONE)),
    )
    parts = [sender.part(joined_id, content) for content in (ONE, TWO)]
    whole, repeated = sender.part(whole_id, THREE), sender.part(repeated_id, ONE)
    sender.part(repeated_id, b"unnamed")

    sender.complete(joined_id, *parts)
    sender.complete(whole_id, whole)
    sender.complete(repeated_id, repeated, repeated, repeated)

    held = {upload_id: part_bytes(sender, upload_id) for upload_id in (joined_id, whole_id, repeated_id)}
    assert held == {joined_id: len(ONE + TWO), whole_id: 0, repeated_id: len(ONE + b"unnamed")}


def test_rejection_states_when_enough_space_becomes_free(sender: Sender) -> None:
    """The end of the first upload is not the answer, because it may free nothing."""
    start, hour = int(sender.world.clock.now), multipart_uploads.OPEN_SECONDS
    cleaned = hour + multipart_uploads.KEPT_SECONDS + DAY_SECONDS
    sender.settings = Settings(data_dir=sender.folder, max_open_uploads=4, max_open_upload_bytes=1_000)
    over = sender.begin(400)
    sender.part(over, b"x" * 400)
    sender.cancel(over)
    sender.world.clock.advance(60)
    sender.part(sender.begin(300), b"y" * 100)
    sender.world.clock.advance(60)
    sender.begin(300)

    assert [resets_at(sender, num_bytes) for num_bytes in (200, 201, 500, 501, 900, 901, 1_001)] == [
        start + 60 + hour,
        start + 120 + hour,
        start + 120 + hour,
        start + cleaned,
        start + cleaned,
        start + 60 + cleaned,
        None,
    ]
    sender.settings = sender.settings.model_copy(update={"max_open_uploads": 1})
    assert resets_at(sender, 1) == start + 120 + hour, "both open uploads must end"
    sender.settings = sender.settings.model_copy(update={"max_open_uploads": 9})
    sender.world.clock.advance(cleaned)
    assert resets_at(sender, 900) is None, "the cleanup is overdue"


def test_completion_beyond_the_storage_quota_stores_nothing(sender: Sender) -> None:
    upload_id = sender.begin(len(ONE + TWO))
    parts = sender.part(upload_id, ONE), sender.part(upload_id, TWO)
    operator = replace(sender.world.caller, is_operator=True)
    quotas.limit(sender.world.db, caller=operator, project="ours", limits={"stored_bytes": 1})

    with pytest.raises(QuotaExceeded):
        sender.complete(upload_id, *parts)

    assert blobs(sender) == {sha(ONE), sha(TWO)}


def test_upload_holds_at_most_twice_its_announced_size(sender: Sender, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multipart_uploads, "SPARE_BYTES", 0)
    upload_id = sender.begin(10)
    sender.part(upload_id, b"x" * 12)

    with pytest.raises(TooLarge) as refused:
        sender.part(upload_id, b"y" * 9)

    assert "accepts at most 20, because it was created with 10 as 'bytes'" in refused.value.message
    sender.part(upload_id, b"y" * 8)


def test_total_size_and_number_of_parts_are_limited(sender: Sender, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multipart_uploads, "MAX_PARTS", 2)
    large_id, many_id = sender.begin(), sender.begin()
    sender.part(large_id, b"x" * 999)
    for content in (b"a", b"b"):
        sender.part(many_id, content)

    for upload_id, content, code in (
        (large_id, b"yy", "file_too_large"),
        (many_id, b"c", "file_too_large"),
    ):
        with pytest.raises(TooLarge) as refused:
            sender.part(upload_id, content)
        assert refused.value.code == code
        assert upload_id in refused.value.message
        assert "Create a new upload" in refused.value.remedy
    with pytest.raises(InvalidRequest, match="empty"):
        sender.part(large_id, b"")
    assert sender.part(many_id, b"a"), "a part that already exists takes no space"


def resets_at(sender: Sender, num_bytes: int) -> float | None:
    with pytest.raises(QuotaExceeded) as refused:
        sender.begin(num_bytes)
    resets, waits = refused.value.quota["resets_at"], refused.value.retry_after_seconds
    assert waits == math.inf if resets is None else resets == int(sender.world.clock.now + waits)
    return resets


def part_bytes(sender: Sender, upload_id: str) -> int:
    with sender.world.db.read() as session:
        return session.get_one(Upload, upload_id).part_bytes
