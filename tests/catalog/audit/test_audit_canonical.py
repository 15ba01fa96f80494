"""The canonical form of an event, which its digest in the chain covers."""

from __future__ import annotations

import hashlib
import hmac
import math

import pytest

from catalog.audit import chain, log
from catalog.tables.table import Json
from catalog.tenancy import projects
from catalog.usage import quotas
from tests.catalog.audit.test_audit import an_operator, events, sealed
from tests.catalog.world import PEPPER, World


def test_digest_covers_the_canonical_form_without_null_fields(world: World) -> None:
    first = next(chain.lines(world.db), None)
    assert first is None
    sealed(world)

    event = next(chain.lines(world.db))

    assert event["previous"] == "0" * 64
    text = (
        f'{{"actor":{{"type":"server"}},"details":{{"name":"default"}},"effective_at":{event["effective_at"]!r},'
        f'"id":"{event["id"]}","link":1,"object":"audit_event","object_id":"{event["object_id"]}",'
        f'"previous":"{"0" * 64}","type":"organization.created"}}'
    )
    key = hmac.new(PEPPER.current, b"lorry: audit chain", hashlib.sha256).digest()
    assert event["digest"] == hmac.new(key, text.encode(), hashlib.sha256).hexdigest()


def test_integers_beyond_canonical_json_are_sealed_as_text(world: World) -> None:
    caller = an_operator(world)
    quotas.limit(world.db, caller=caller, project="ours", limits={"stored_bytes": 2**53, "queued_jobs": 5})
    projects.set_weight(world.db, caller=caller, project="ours", weight=2)

    chain.seal(world.db, pepper=PEPPER.current)

    *_, limited, _ = exported = list(chain.lines(world.db))
    assert limited["details"] == {"limits": {"stored_bytes": "9007199254740992", "queued_jobs": 5}}
    assert len(exported) == len(events(world.db))
    assert chain.check(world.db, peppers=PEPPER.all()).misfit is None
    assert chain.check_export(exported, peppers=PEPPER.all()).misfit is None


@pytest.mark.parametrize(
    ("noted", "expected"),
    [
        ({"name": "a\ud83d", "in": [["\udc00b"]]}, {"name": "a\\ud83d", "in": [["\\udc00b"]]}),
        ({"\ud800": "😀"}, {"\\ud800": "😀"}),
    ],
)
def test_unencodable_text_in_an_event_does_not_block_the_chain(world: World, noted: Json, expected: Json) -> None:
    seal_behind(world, noted, expected)


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)  # PostgreSQL does not store NaN or infinity
def test_non_finite_numbers_in_an_event_do_not_block_the_chain(world: World) -> None:
    noted = {"weight": math.nan, "in": [math.inf, -math.inf, 1e300]}

    seal_behind(world, noted, {"weight": "nan", "in": ["inf", "-inf", 1e300]})


def seal_behind(world: World, noted: Json, expected: Json) -> None:
    """Seal an event with the details `noted` and one after it, and check that the first is exported as `expected`."""
    with world.db.write() as session:
        log.note(session, "project.updated", now=world.clock.now, object_id="x", project_id=None, details=noted)
    projects.create(world.db, "new")

    chain.seal(world.db, pepper=PEPPER.current)

    *_, bad, _ = exported = list(chain.lines(world.db))
    assert bad["details"] == expected
    assert len(exported) == len(events(world.db))
    assert chain.check(world.db, peppers=PEPPER.all()).misfit is None
    assert chain.check_export(exported, peppers=PEPPER.all()).misfit is None
