"""Daily anchors store the chain's head outside the database, so that a truncated log is detected."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from sqlalchemy import delete

from catalog.audit import chain
from catalog.audit.chain import Misfit
from catalog.maintenance import audit_anchors
from catalog.storage.object_storage import Objects
from catalog.tables.tenancy import AuditEvent, AuditHead
from catalog.tenancy import projects
from tests.catalog.world import PEPPER, World

DAY = 24 * 3600.0


@pytest.fixture
def objects(tmp_path: Path) -> Objects:
    return Objects((tmp_path / "store").as_uri())


def anchored(world: World, objects: Objects) -> list[str]:
    """Create a project and anchor the chain on each of three days. Returns the names of the anchors."""
    for number in range(3):
        projects.create(world.db, f"day-{number}")
        chain.seal(world.db, pepper=PEPPER.current)
        assert audit_anchors.anchor(world.db, objects, pepper=PEPPER.current)
        world.clock.advance(DAY)
    return sorted(entry.key for entry in objects.list_all(audit_anchors.PREFIX))


def cut_off(world: World, *, after: int) -> None:
    """Delete the newest events and set the head back to an earlier genuine one, which needs no pepper."""
    with world.db.write() as session:
        last = session.query(AuditEvent).filter(AuditEvent.link == after).one()
        head = session.get_one(AuditHead, 1)
        head.link, head.digest = after, last.digest or ""
        session.execute(delete(AuditEvent).where(AuditEvent.link > after))


def verified(world: World, objects: Objects) -> Misfit | None:
    return audit_anchors.verify(world.db, objects, peppers=PEPPER.all()).misfit


def test_each_day_has_one_anchor_and_an_empty_chain_has_none(world: World, objects: Objects) -> None:
    assert not audit_anchors.anchor(world.db, objects, pepper=PEPPER.current)

    names = anchored(world, objects)

    world.clock.advance(-DAY)
    assert not audit_anchors.anchor(world.db, objects, pepper=PEPPER.current)
    assert names == [f"audit/anchors/2027-01-{day}.json" for day in (15, 16, 17)]
    assert verified(world, objects) is None


def test_events_truncated_before_an_anchor_are_detected(world: World, objects: Objects) -> None:
    anchored(world, objects)
    with world.db.read() as session:
        end, _ = chain.head(session)

    cut_off(world, after=end - 1)

    assert chain.check(world.db, peppers=PEPPER.all()).misfit is None, "the chain alone cannot detect it"
    assert verified(world, objects) == Misfit(link=end, id=None, fault="missing")


def test_events_resealed_in_place_of_truncated_ones_are_detected(world: World, objects: Objects) -> None:
    """An attacker truncates the log and lets the service seal other events at the same positions."""
    anchored(world, objects)
    with world.db.read() as session:
        end, _ = chain.head(session)
    cut_off(world, after=end - 1)
    projects.create(world.db, "harmless")
    chain.seal(world.db, pepper=PEPPER.current)

    misfit = verified(world, objects)

    assert misfit is not None
    assert (misfit.link, misfit.fault) == (end, "changed")


@pytest.mark.parametrize("how", ["another place", "no JSON", "too large", "another shape"])
def test_changed_anchor_is_reported(world: World, objects: Objects, how: str) -> None:
    name = anchored(world, objects)[1]
    content = json.loads(b"".join(objects.read(name)))
    changed = {
        "another place": json.dumps({**content, "link": 1}),
        "no JSON": "{",
        "too large": json.dumps({**content, "x": "x" * audit_anchors.MAX_BYTES}),
        "another shape": "[]",
    }
    objects.put(name, changed[how].encode())

    assert verified(world, objects) == Misfit(link=0, id=name, fault="anchor_changed")


def test_each_page_of_the_chain_reads_only_its_own_anchors(
    world: World, objects: Objects, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_days = 32
    for number in range(num_days):
        projects.create(world.db, f"day-{number}")
        chain.seal(world.db, pepper=PEPPER.current)
        audit_anchors.anchor(world.db, objects, pepper=PEPPER.current)
        world.clock.advance(DAY)
    num_reads: list[int] = []
    read = objects.read
    monkeypatch.setattr(objects, "read", lambda key: (num_reads.append(1), read(key))[1])

    after, pages = 0, list[int]()
    while True:
        found = audit_anchors.verify(world.db, objects, peppers=PEPPER.all(), after=after, limit=16)
        assert found.misfit is None
        pages.append(len(num_reads))
        num_reads.clear()
        after = found.last_link
        if not found.has_more:
            break

    assert sum(pages) >= num_days
    assert max(pages) <= 16 + 1 + 6, "the anchors of 16 events, the next one, and a binary search"
    audit_anchors.verify(world.db, objects, peppers=PEPPER.all(), after=after)
    assert len(num_reads) <= 6


def test_old_anchor_under_a_newer_name_is_rejected(world: World, objects: Objects) -> None:
    """The MAC of the old anchor is valid. Without this check it would replace the anchor of the truncated events."""
    names = anchored(world, objects)
    cut_off(world, after=json.loads(b"".join(objects.read(names[0])))["link"])
    old = b"".join(objects.read(names[0]))
    for newer in names[1:]:
        objects.put(newer, old)

    assert verified(world, objects) == Misfit(link=0, id=names[1], fault="anchor_changed")


def test_anchors_sealed_under_the_previous_pepper_are_verified(world: World, objects: Objects) -> None:
    anchored(world, objects)
    rotated = b"n" * 32
    projects.create(world.db, "later")
    chain.seal(world.db, pepper=rotated)
    assert audit_anchors.anchor(world.db, objects, pepper=rotated)

    assert audit_anchors.verify(world.db, objects, peppers=[rotated, PEPPER.current]).misfit is None
