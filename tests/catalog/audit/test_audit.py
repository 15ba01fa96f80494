"""The audit log: each change writes an event in its own transaction, and the chain exposes every edited row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import delete, insert, select, update

from catalog import revocation
from catalog.audit import chain
from catalog.audit import log as audit
from catalog.audit.log import Actor, Filters, Origin
from catalog.db.database import Database
from catalog.errors import Conflict
from catalog.fleet import cordons
from catalog.jobs import commands
from catalog.registry import adapters, base_models, permissions
from catalog.storage import files
from catalog.tables.tenancy import AuditEvent, AuditHead
from catalog.tenancy import api_keys, authentication, organizations, projects
from tests.catalog.db.interleaving import after_statement
from tests.catalog.world import PEPPER, World

pytestmark = pytest.mark.both_databases

MINE = Actor(type="api_key", id="key-me", name="mine")


def events(db: Database) -> list[AuditEvent]:
    with db.read() as session:
        return list(session.scalars(select(AuditEvent).order_by(AuditEvent.seq)))


def recorded(world: World) -> list[tuple[str, str | None]]:
    return [(event.type, event.object_id) for event in events(world.db)]


def sealed(world: World, number: int = 6) -> list[AuditEvent]:
    """Return the events of a log with at least `number` events, all sealed into the chain."""
    for _ in range(number):
        projects.set_weight(world.db, caller=an_operator(world), project="ours", weight=2)
    chain.seal(world.db, pepper=PEPPER.current)
    return events(world.db)


def test_user_actions_on_jobs_are_audited_once_and_worker_writes_are_not(world: World) -> None:
    running, waiting = world.running(), world.submit()
    before = len(events(world.db))

    commands.pause(world.db, **world.of(waiting.id))
    commands.pause(world.db, **world.of(waiting.id))
    commands.resume(world.db, **world.of(waiting.id))
    for _ in range(2):
        commands.cancel(world.db, **world.of(running.job.id))
    world.beat(running.claim_id)
    world.complete(running.claim_id)

    assert recorded(world)[before:] == [
        ("job.paused", waiting.id),
        ("job.resumed", waiting.id),
        ("job.cancelled", running.job.id),
    ]


def test_rejected_requests_leave_no_event(world: World) -> None:
    claim = world.running()
    before = recorded(world)

    with pytest.raises(Conflict):
        files.delete(world.db, project_id=world.caller.project_id, file_id=world.file_id)
    with pytest.raises(Conflict):
        base_models.delete(world.db, "smol")
    with pytest.raises(Conflict):
        commands.resume(world.db, **world.of(claim.job.id))

    assert recorded(world) == before


def test_administrative_actions_are_audited(world: World) -> None:
    adapter = world.complete(world.running().claim_id)
    operator, mine = an_operator(world), world.caller.project_id
    audit_before = len(events(world.db))

    (permission,) = permissions.grant(world.db, caller=operator, model=adapter.name, projects_named=["theirs"])
    permissions.revoke(world.db, model=adapter.name, permission_id=permission.id)
    adapters.delete(world.db, project_id=mine, name=adapter.id)
    files.delete(world.db, project_id=mine, file_id=world.file_id)
    base_models.delete(world.db, "smol")
    organization = organizations.create(world.db, "new")
    organizations.rename(world.db, caller=operator, organization="new", name="newer")
    project = projects.create(world.db, "new")
    projects.rename(world.db, caller=operator, project="new", name="newer")
    projects.archive(world.db, caller=operator, project="newer")
    projects.restore(world.db, caller=operator, project="newer")
    key, _ = api_keys.create(world.db, caller=operator, request=api_keys.KeyRequest(name="k"), pepper=PEPPER)
    api_keys.limit(world.db, caller=operator, api_key_id=key.id, limits={"jobs_per_day": 5})
    rotated, _ = api_keys.rotate(world.db, caller=operator, api_key_id=key.id, overlap_seconds=9, pepper=PEPPER)
    revocation.revoke(world.db, caller=operator, api_key_id=key.id)
    token = authentication.create_sign_in_link(world.db, api_key_id=rotated.id, pepper=PEPPER)
    browser = authentication.exchange_sign_in(world.db, token=token, pepper=PEPPER)
    authentication.end_browser(world.db, secret=browser, pepper=PEPPER)
    world.worker("w9")
    for act in (cordons.cordon, cordons.cordon, cordons.uncordon, cordons.uncordon, cordons.drain, cordons.drain):
        act(world.db, "w9")

    assert recorded(world)[audit_before:] == [
        ("permission.created", permission.id),
        ("permission.deleted", permission.id),
        ("adapter.deleted", adapter.id),
        ("file.deleted", world.file_id),
        ("model.deleted", "smol"),
        ("organization.created", organization.id),
        ("organization.updated", organization.id),
        ("project.created", project.id),
        ("project.updated", project.id),
        ("project.archived", project.id),
        ("project.restored", project.id),
        ("api_key.created", key.id),
        ("api_key.updated", key.id),
        ("api_key.created", rotated.id),
        ("api_key.rotated", key.id),
        ("api_key.revoked", key.id),
        ("sign_in_link.created", rotated.id),
        ("login.succeeded", rotated.id),
        ("logout.succeeded", rotated.id),
        ("worker.cordoned", "w9"),
        ("worker.uncordoned", "w9"),
        ("worker.drained", "w9"),
    ]


def test_events_contain_no_secrets(world: World) -> None:
    key, secret = authentication.create(world.db, project_id=world.caller.project_id, name="k", pepper=PEPPER)
    token = authentication.create_sign_in_link(world.db, api_key_id=key.id, pepper=PEPPER)
    browser = authentication.exchange_sign_in(world.db, token=token, pepper=PEPPER)
    chain.seal(world.db, pepper=PEPPER.current)

    text = str(list(chain.lines(world.db)))

    assert [part for part in (secret, secret.split("_", 2)[2], key.digest, token, browser) if part in text] == []


def test_keys_and_projects_record_the_key_that_created_them(world: World) -> None:
    with audit.attributed_to(Origin(actor=MINE)):
        key, _ = authentication.create(world.db, project_id=world.caller.project_id, name="k", pepper=PEPPER)
        project = projects.create(world.db, "new")
    by_hand = projects.create(world.db, "newer")

    assert (key.created_by, project.created_by, by_hand.created_by) == ("key-me", "key-me", None)


def test_events_are_filtered_by_actor_type_project_and_time(world: World) -> None:
    start = world.clock.now
    with audit.attributed_to(Origin(actor=MINE)):
        job = world.submit()
    world.clock.advance(1)
    middle = world.clock.now
    world.submit()
    everybody = an_operator(world)

    def found(**filters: Any) -> list[str | None]:
        page = audit.list_page(world.db, caller=everybody, filters=Filters(**filters), limit=100)
        return [event.object_id for event in page.items]

    assert found(actor_ids=["key-me"]) == [job.id]
    assert found(types=["job.created"], since=start, until=middle) == [job.id]
    assert found(types=["job.created"], after=start, before=middle) == [job.id]
    assert len(found(types=["job.created"])) == 2
    assert found(project_ids=[world.stranger.project_id], types=["job.created"]) == []


def test_sealed_log_verifies_in_the_database_and_as_an_export(world: World) -> None:
    rows = sealed(world)
    projects.create(world.db, "new")

    found = check(world)
    exported = list(chain.lines(world.db))

    assert (found.misfit, found.num_events, found.num_unsealed) == (None, len(rows), 1)
    assert [event.link for event in rows] == list(range(1, len(rows) + 1))
    assert (found.last_link, found.last_digest) == (rows[-1].link, rows[-1].digest)
    whole, part = (chain.check_export(events, peppers=PEPPER.all()) for events in (exported, exported[3:]))
    assert (whole.misfit, whole.last_digest) == (None, found.last_digest)
    assert (part.misfit, part.last_digest) == (None, found.last_digest)


def test_log_is_verified_in_pages(world: World) -> None:
    rows = sealed(world)
    last, number = 0, 0

    while (found := check(world, after=last, limit=4)).has_more:
        assert found.num_events == 4
        last, number = found.last_link, number + 1

    assert (found.misfit, found.last_link, number) == (None, len(rows), (len(rows) - 1) // 4)


def test_log_that_grows_while_it_is_verified_is_whole(world: World) -> None:
    before = len(sealed(world))
    after_statement(world.db, "FROM audit_head", lambda: sealed(world))
    after_statement(world.db, "audit_events.link >", lambda: sealed(world))

    found = chain.check(world.db, peppers=PEPPER.all())

    assert (found.num_events, found.misfit) == (before, None)
    assert len(events(world.db)) > before + 6


def test_sealing_is_idempotent_and_resumes_at_the_last_link(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    before = [(event.id, event.digest) for event in sealed(world)]
    assert chain.seal(world.db, pepper=PEPPER.current) == 0
    monkeypatch.setattr(chain, "SEALED_AT_ONCE", 2)

    after = [(event.id, event.digest) for event in sealed(world)]

    assert after[: len(before)] == before
    assert check(world).misfit is None


Tamper = Callable[[World, list[AuditEvent]], None]


def _set(column: str, value: Any) -> Tamper:
    def act(world: World, rows: list[AuditEvent]) -> None:
        with world.db.write() as session:
            session.execute(update(AuditEvent).where(AuditEvent.link == 4).values({column: value}))

    return act


def _rewrite(world: World, rows: list[AuditEvent]) -> None:
    """Change an event and give it a digest that fits the new content."""
    with world.db.write() as session:
        event = session.scalars(select(AuditEvent).where(AuditEvent.link == 4)).one()
        event.actor_name = "another actor"
        event.digest = chain.seal_of(chain.content(event), b"not the server's")


def _exchange(world: World, rows: list[AuditEvent]) -> None:
    with world.db.write() as session:
        first, second = session.scalars(select(AuditEvent).where(AuditEvent.link.in_((4, 5))).order_by(AuditEvent.link))
        first.link = None
        session.flush()
        second.link = 4
        session.flush()
        first.link = 5


def _delete(*links: int) -> Tamper:
    def act(world: World, rows: list[AuditEvent]) -> None:
        with world.db.write() as session:
            session.execute(delete(AuditEvent).where(AuditEvent.link.in_(links)))

    return act


def _delete_last(world: World, rows: list[AuditEvent]) -> None:
    _delete(len(rows))(world, rows)


def _rewrite_last(world: World, rows: list[AuditEvent]) -> None:
    with world.db.write() as session:
        event = session.scalars(select(AuditEvent).where(AuditEvent.link == len(rows))).one()
        event.details = {}
        event.digest = chain.seal_of(chain.content(event), b"not the server's")


COLUMNS = [column.name for column in AuditEvent.__table__.columns if column.name not in ("seq", "link")]
OTHER: dict[str, Any] = {"effective_at": 5.0, "details": {"x": 1}}
TAMPERINGS: dict[str, tuple[Tamper, int]] = {
    **{f"{name} is changed": (_set(name, OTHER.get(name, "f" * 64)), 4) for name in COLUMNS},
    "an event is taken out of the chain": (_set("link", None), 4),
    "an event is moved": (_set("link", 400), 4),
    "an event is changed with its digest": (_rewrite, 4),
    "two events are exchanged": (_exchange, 4),
    "an event is deleted": (_delete(4), 4),
    "the first event is deleted": (_delete(1), 1),
    "the last event is deleted": (_delete_last, -1),
    "the last event is changed with its digest": (_rewrite_last, -1),
}


def test_edited_deleted_or_moved_events_are_reported(world: World) -> None:
    rows = sealed(world)
    whole = _columns(world.db)
    found: dict[str, tuple[int, int]] = {}

    for what, (tamper, place) in TAMPERINGS.items():
        tamper(world, rows)
        misfit = check(world).misfit
        found[what] = (misfit.link if misfit else 0, place if place > 0 else len(rows))
        with world.db.write() as session:
            session.execute(delete(AuditEvent))
            session.execute(insert(AuditEvent), whole)

    assert {what: links for what, links in found.items() if links[0] != links[1]} == {}
    assert check(world).misfit is None


def test_rolled_back_chain_head_is_detected(world: World) -> None:
    rows = sealed(world)
    with world.db.write() as session:
        head = session.get_one(AuditHead, 1)
        head.link, head.digest = 3, rows[2].digest or ""

    assert check(world).misfit is not None


def test_chain_resealed_without_the_pepper_is_rejected(world: World) -> None:
    """An attacker with only the database password changes an event and recomputes every later digest."""
    sealed(world)
    forger = b"any other secret of 32 bytes...."
    with world.db.write() as session:
        session.execute(update(AuditEvent).where(AuditEvent.link == 4).values(actor_name="another actor"))
        session.execute(update(AuditEvent).values(link=None, previous=None, digest=None))
        session.execute(delete(AuditHead))
    chain.seal(world.db, pepper=forger)

    misfit = check(world).misfit

    assert misfit is not None
    assert (misfit.link, misfit.fault) == (1, "changed")


def test_events_sealed_under_the_previous_pepper_verify_after_rotation(world: World) -> None:
    sealed(world)
    projects.create(world.db, "new")
    rotated = b"n" * 32
    chain.seal(world.db, pepper=rotated)

    known = chain.check(world.db, peppers=[rotated, PEPPER.current])
    forgotten = chain.check(world.db, peppers=[rotated])

    assert (known.misfit, known.num_unsealed) == (None, 0)
    assert forgotten.misfit is not None


def test_sealing_stops_at_the_batch_that_reaches_the_limit(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chain, "SEALED_AT_ONCE", 2)

    assert chain.seal(world.db, pepper=PEPPER.current, at_most=3) == 4
    assert check(world).num_unsealed == len(events(world.db)) - 4


def test_edited_export_is_detected(world: World) -> None:
    sealed(world)
    whole = list(chain.lines(world.db))
    edited = [{**event, "details": {}} if event["link"] == 4 else event for event in whole]
    odd = [*whole[:3], {**whole[3], "actor": "another"}]
    logs = (edited, odd, whole[:3] + whole[4:], [*whole[:3], whole[4]])

    faults = [chain.check_export(log, peppers=PEPPER.all()).misfit for log in logs]

    assert [(misfit.link, misfit.fault) for misfit in faults if misfit] == [
        (4, "changed"),
        (4, "changed"),
        (4, "missing"),
        (4, "missing"),
    ]


def check(world: World, **part: int) -> chain.ChainCheck:
    return chain.check(world.db, peppers=PEPPER.all(), **part)


def _columns(db: Database) -> list[dict[str, Any]]:
    with db.read() as session:
        return [dict(row) for row in session.execute(select(*AuditEvent.__table__.columns)).mappings()]


def an_operator(world: World) -> authentication.Caller:
    _, secret = authentication.create(
        world.db, project_id=world.caller.project_id, name="operator", pepper=PEPPER, is_operator=True
    )
    return authentication.authenticate(world.db, secret=secret, pepper=PEPPER)
