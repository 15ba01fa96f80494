"""The chain's head, kept outside the database each day: events that were cut off at the end are missed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from sqlalchemy import delete

from catalog.audit import chain
from catalog.audit.chain import Misfit
from catalog.maintenance import audit_anchors
from catalog.storage.object_storage import Objects
from catalog.tables.audit import AuditEvent, AuditHead
from catalog.tenancy import projects
from tests.catalog.world import PEPPER, World

DAY = 24 * 3600.0


@pytest.fixture
def objects(tmp_path: Path) -> Objects:
    return Objects((tmp_path / "store").as_uri())


def anchored(world: World, objects: Objects) -> list[str]:
    """Three days, on each of which a project is made. Gives the names of the anchors."""
    for number in range(3):
        projects.create(world.db, f"day-{number}")
        chain.seal(world.db, pepper=PEPPER.current)
        assert audit_anchors.anchor(world.db, objects, pepper=PEPPER.current)
        world.clock.advance(DAY)
    return sorted(entry.key for entry in objects.list_all(audit_anchors.PREFIX))


def cut_off(world: World, *, after: int) -> None:
    """Delete the newest events, and set back the head to one that was genuine: that takes no pepper."""
    with world.db.write() as session:
        last = session.query(AuditEvent).filter(AuditEvent.link == after).one()
        head = session.get_one(AuditHead, 1)
        head.link, head.digest = after, last.digest or ""
        session.execute(delete(AuditEvent).where(AuditEvent.link > after))


def verified(world: World, objects: Objects) -> Misfit | None:
    return audit_anchors.verify(world.db, objects, peppers=PEPPER.all()).misfit


def test_a_day_has_one_anchor_and_an_empty_chain_has_none(world: World, objects: Objects) -> None:
    assert not audit_anchors.anchor(world.db, objects, pepper=PEPPER.current)

    names = anchored(world, objects)

    world.clock.advance(-DAY)
    assert not audit_anchors.anchor(world.db, objects, pepper=PEPPER.current)
    assert names == [f"audit/anchors/2027-01-{day}.json" for day in (15, 16, 17)]
    assert verified(world, objects) is None


def test_events_that_were_cut_off_before_an_anchor_are_missed(world: World, objects: Objects) -> None:
    anchored(world, objects)
    with world.db.read() as session:
        end, _ = chain.head(session)

    cut_off(world, after=end - 1)

    assert chain.check(world.db, peppers=PEPPER.all()).misfit is None, "the chain alone doesn't tell"
    assert verified(world, objects) == Misfit(link=end, id=None, fault="missing")


def test_other_events_in_the_place_of_those_that_were_cut_off_are_noticed(world: World, objects: Objects) -> None:
    """Whoever cuts off the end of the log, and lets the service seal other events at its places."""
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
def test_an_anchor_that_was_changed_is_named(world: World, objects: Objects, how: str) -> None:
    name = anchored(world, objects)[1]
    told = json.loads(b"".join(objects.read(name)))
    changed = {
        "another place": json.dumps({**told, "link": 1}),
        "no JSON": "{",
        "too large": json.dumps({**told, "x": "x" * audit_anchors.MAX_BYTES}),
        "another shape": "[]",
    }
    objects.put(name, changed[how].encode())

    assert verified(world, objects) == Misfit(link=0, id=name, fault="anchor_changed")


def test_each_part_of_the_chain_is_verified_with_its_own_anchors_and_reads_few_others(
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
    assert max(pages) <= 16 + 1 + 6, "those of 16 events, the one after them, and a binary search among 32"
    audit_anchors.verify(world.db, objects, peppers=PEPPER.all(), after=after)
    assert len(num_reads) <= 6


def test_an_old_anchor_under_a_newer_name_is_rejected(world: World, objects: Objects) -> None:
    """Its MAC is valid. Without this check it would stand in for the anchor of the events that were cut off."""
    names = anchored(world, objects)
    cut_off(world, after=json.loads(b"".join(objects.read(names[0])))["link"])
    old = b"".join(objects.read(names[0]))
    for newer in names[1:]:
        objects.put(newer, old)

    assert verified(world, objects) == Misfit(link=0, id=names[1], fault="anchor_changed")


def test_anchors_of_before_a_new_pepper_are_verified_by_the_previous_one(world: World, objects: Objects) -> None:
    anchored(world, objects)
    rotated = b"n" * 32
    projects.create(world.db, "later")
    chain.seal(world.db, pepper=rotated)
    assert audit_anchors.anchor(world.db, objects, pepper=rotated)

    assert audit_anchors.verify(world.db, objects, peppers=[rotated, PEPPER.current]).misfit is None
