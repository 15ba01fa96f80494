"""Events and signatures made under a replaced pepper stay verifiable, but its holder cannot forge later ones."""

from __future__ import annotations

from pathlib import Path

import pytest
from sqlalchemy import delete, select

from catalog.audit import chain, derived_keys, lineage_signatures
from catalog.audit.chain import Misfit
from catalog.audit.derived_keys import PepperReplaced
from catalog.db.database import Database
from catalog.maintenance import audit_anchors
from catalog.pepper import Pepper
from catalog.storage.object_storage import Objects
from catalog.tables.table import Json
from catalog.tables.tenancy import AuditEvent, AuditHead, RetiredKey
from catalog.tenancy import projects
from tests.catalog.world import PEPPER, World

OLD, NEW, NEWEST = PEPPER.current, b"n" * 32, b"m" * 32


@pytest.fixture
def objects(tmp_path: Path) -> Objects:
    return Objects((tmp_path / "store").as_uri())


def sealed_event(db: Database, name: str, pepper: bytes) -> int:
    """Seal an event and return its position in the chain."""
    projects.create(db, name)
    chain.seal(db, pepper=pepper)
    with db.read() as session:
        return chain.head(session)[0]


def rotated(world: World) -> int:
    """Rotate the pepper between two sealed events. Returns the last chain position under the old pepper."""
    last = sealed_event(world.db, "before", OLD)
    assert derived_keys.retire(world.db, Pepper(current=NEW, previous=OLD))
    sealed_event(world.db, "after", NEW)
    return last


def rows_of(world: World) -> list[Json]:
    with world.db.read() as session:
        return derived_keys.wire_rows(session)


def misfit(world: World, pepper: bytes = NEW) -> Misfit | None:
    return chain.check(world.db, peppers=[pepper]).misfit


def reseal(world: World, pepper: bytes, *, after: int) -> None:
    """Recompute the chain after a position, as an attacker with a pepper and write access to the database does."""
    key = derived_keys.chain_key(pepper)
    with world.db.write() as session:
        head = session.get_one(AuditHead, 1)
        for event in session.scalars(select(AuditEvent).where(AuditEvent.link > after).order_by(AuditEvent.link)):
            before = select(AuditEvent.digest).where(AuditEvent.link == (event.link or 0) - 1)
            event.previous = session.scalar(before) or chain.GENESIS
            event.digest = head.digest = chain.seal_of(chain.content(event), key)
            session.flush()


def test_new_pepper_alone_verifies_log_anchors_and_export_after_rotation(world: World, objects: Objects) -> None:
    sealed_event(world.db, "anchored", OLD)
    audit_anchors.anchor(world.db, objects, pepper=OLD)

    rotated(world)

    assert audit_anchors.verify(world.db, objects, peppers=[NEW]).misfit is None
    exported = list(chain.lines(world.db))
    found = chain.check_export(exported, peppers=[NEW])
    assert (found.misfit, exported[0]["object"]) == (None, "retired_key")
    assert found.num_events == len(exported) - 1
    assert chain.check_export(exported, peppers=[NEWEST]).misfit is not None


def test_newest_pepper_verifies_everything_after_two_rotations(world: World) -> None:
    rotated(world)
    assert derived_keys.retire(world.db, Pepper(current=NEWEST, previous=NEW))
    sealed_event(world.db, "after-the-second", NEWEST)

    assert misfit(world, NEWEST) is None
    assert chain.check_export(chain.lines(world.db), peppers=[NEWEST]).misfit is None
    assert misfit(world) is not None, "the intermediate pepper must no longer decrypt the rows"


def test_tampering_with_events_of_a_replaced_pepper_is_detected(world: World) -> None:
    last = rotated(world)
    with world.db.write() as session:
        event = session.scalars(select(AuditEvent).where(AuditEvent.link == last)).one()
        event.actor_name, ident = "another actor", event.id

    assert misfit(world) == Misfit(link=last, id=ident, fault="changed")


@pytest.mark.parametrize("first", [1, "the last of the old pepper", "the first of the new pepper"])
def test_replaced_pepper_cannot_forge_earlier_or_later_events(world: World, first: int | str) -> None:
    last = rotated(world)
    start = {"the last of the old pepper": last, "the first of the new pepper": last + 1}.get(str(first), 1)
    with world.db.write() as session:
        session.scalars(select(AuditEvent).where(AuditEvent.link == start)).one().actor_name = "another actor"

    reseal(world, OLD, after=start - 1)

    found = misfit(world)
    assert found is not None
    assert (found.link, found.fault) == (max(start, last), "changed")


def test_anchor_written_under_a_replaced_pepper_is_rejected(world: World, objects: Objects) -> None:
    rotated(world)
    rows = rows_of(world)
    with world.db.write() as session:
        session.execute(delete(RetiredKey))  # otherwise a server with the old pepper writes no anchor
    audit_anchors.anchor(world.db, objects, pepper=OLD)
    with world.db.write() as session:
        session.add_all(RetiredKey(id=row["id"], sealed=row["sealed"]) for row in rows)

    found = audit_anchors.verify(world.db, objects, peppers=[NEW]).misfit

    assert found is not None
    assert found.fault == "anchor_changed"


def test_retired_key_row_is_encrypted_and_bound_to_its_id(world: World) -> None:
    rotated(world)
    (row,) = rows_of(world)

    content = str(row)
    for pepper in (OLD, NEW):
        key = derived_keys.chain_key(pepper)
        assert key.hex() not in content
        assert pepper.hex() not in content
    assert len(derived_keys.chain_keys([row], [NEW])) == 2
    assert len(derived_keys.chain_keys([row], [NEWEST])) == 1
    assert len(derived_keys.chain_keys([{**row, "id": "another"}], [NEW])) == 1
    assert len(derived_keys.chain_keys([{**row, "sealed": "no base64!"}], [NEW])) == 1


@pytest.mark.parametrize("num_more", [1000, None])
def test_planted_keys_under_the_replaced_pepper_are_not_kept(world: World, num_more: int | None) -> None:
    """An attacker who had the old pepper and database access before the rotation gains nothing after it."""
    last = sealed_event(world.db, "before", OLD)
    last_link = None if num_more is None else last + num_more
    planted = derived_keys.Retired(
        chain_key=derived_keys.ChainKey(key=b"k" * 32, last_link=last_link), public_key={}, retired_at=0.0
    )
    with world.db.write() as session:
        session.add(RetiredKey(id="planted", sealed=derived_keys._sealed("planted", planted, OLD)))
    derived_keys.retire(world.db, Pepper(current=NEW, previous=OLD))
    with world.db.write() as session:
        session.add(RetiredKey(id="later", sealed=derived_keys._sealed("later", planted, OLD)))

    assert not derived_keys.retire(world.db, Pepper(current=NEW, previous=OLD))

    keys = derived_keys.chain_keys(rows_of(world), [NEW, OLD])
    assert [key.last_link for key in keys] == [None, last]


def test_server_with_a_replaced_pepper_seals_and_anchors_nothing(world: World, objects: Objects) -> None:
    """Servers that still run with the old pepper during the rotation must not write invalid seals."""
    rotated(world)
    projects.create(world.db, "unsealed")

    for act in (
        lambda: chain.seal(world.db, pepper=OLD),
        lambda: audit_anchors.anchor(world.db, objects, pepper=OLD),
    ):
        with pytest.raises(PepperReplaced, match="can't seal audit events"):
            act()
    assert chain.seal(world.db, pepper=NEW) > 0
    assert misfit(world) is None


def test_rotation_can_be_reverted_and_repeated(world: World) -> None:
    rotated(world)
    for name, current, previous in (("back", OLD, NEW), ("again", NEW, OLD)):
        assert derived_keys.retire(world.db, Pepper(current=current, previous=previous))
        sealed_event(world.db, name, current)
        assert misfit(world, current) is None


def test_start_without_rotation_retires_no_key(world: World) -> None:
    assert not derived_keys.retire(world.db, Pepper(current=NEW))
    assert not derived_keys.retire(world.db, Pepper(current=NEW, previous=NEW))
    assert rows_of(world) == []


def test_retired_public_keys_are_served_and_foreign_rows_are_ignored(world: World) -> None:
    signed = lineage_signatures.sign_lineage(lineage_id="1" * 64, artifact="2" * 64, pepper=OLD)
    during = derived_keys.key_set(world.db, [NEW, OLD])["keys"]
    derived_keys.retire(world.db, Pepper(current=NEW, previous=OLD))
    foreign = derived_keys.Retired(
        chain_key=derived_keys.ChainKey(key=b"k" * 32, last_link=1),
        public_key=lineage_signatures.public_key(b"f" * 32),
        retired_at=0.0,
    )
    with world.db.write() as session:
        session.add(RetiredKey(id="foreign", sealed=derived_keys._sealed("foreign", foreign, b"f" * 32)))

    keys = derived_keys.key_set(world.db, [NEW])["keys"]

    assert [key["kid"] for key in keys] == [key["kid"] for key in during]
    assert keys[1]["kid"] == signed["signatures"][0]["keyid"]
    assert ["retired_at" in key for key in keys] == [False, True]
