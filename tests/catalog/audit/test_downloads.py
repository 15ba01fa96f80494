"""The audit log records downloads, at most once per interval for each key, object and address."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
from sqlalchemy import select

from catalog.audit import downloads as read_audit
from catalog.audit import log
from catalog.audit.downloads import REPEAT_SECONDS, ReadAudit
from catalog.audit.log import Actor, Origin
from catalog.db.database import Database
from catalog.errors import Unavailable
from catalog.tables.tenancy import AuditEvent
from tests.catalog.world import World

MINE = Actor(type="api_key", id="key-me", name="mine")


class Time:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def downloads(db: Database) -> list[AuditEvent]:
    with db.read() as session:
        found = select(AuditEvent).where(AuditEvent.type == "file.downloaded").order_by(AuditEvent.seq)
        return list(session.scalars(found))


def download(reads: ReadAudit, world: World, *, file_id: str = "file-1", address: str = "192.0.2.7") -> None:
    with log.attributed_to(Origin(request_id="req_1", address=address, actor=MINE)):
        reads.record("file.downloaded", caller=world.caller, object_id=file_id)


def test_repeated_downloads_are_recorded_once_per_interval(world: World) -> None:
    clock = Time()
    reads = ReadAudit(world.db, clock=clock)

    for _ in range(3):
        download(reads, world)
    assert len(downloads(world.db)) == 1

    download(reads, world, file_id="file-2")
    download(reads, world, address="192.0.2.8")
    with log.attributed_to(Origin(address="192.0.2.7")):
        other = replace(world.caller, api_key_id="key-other")
        reads.record("file.downloaded", caller=other, object_id="file-1")
    assert len(downloads(world.db)) == 4

    clock.now += REPEAT_SECONDS - 1
    download(reads, world)
    assert len(downloads(world.db)) == 4
    clock.now += 1
    download(reads, world)
    assert len(downloads(world.db)) == 5


def test_remembered_downloads_are_bounded(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_audit, "MAX_REMEMBERED", 2)
    reads = ReadAudit(world.db)

    for number in (1, 2, 3, 1):
        download(reads, world, file_id=f"file-{number}")

    assert [event.object_id for event in downloads(world.db)] == ["file-1", "file-2", "file-3", "file-1"]


def test_unwritable_database_does_not_block_downloads(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def away() -> None:
        raise Unavailable("database_unavailable")

    reads = ReadAudit(world.db)
    with monkeypatch.context() as patched, caplog.at_level(logging.WARNING, logger="lorry.audit"):
        patched.setattr(world.db, "write", away)
        download(reads, world)

    assert downloads(world.db) == []
    assert "not in the audit log: file.downloaded" in caplog.text
    assert "address=192.0.2.7" in caplog.text
    download(reads, world)
    assert len(downloads(world.db)) == 1
