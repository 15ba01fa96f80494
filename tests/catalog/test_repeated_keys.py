"""A request for a key whose reply was lost makes no second key, and the repetition is told a text that works."""

from __future__ import annotations

from typing import Any

import pytest

from catalog import issuing
from catalog.errors import Conflict
from catalog.issuing import KeyRequest
from catalog.keys import Caller
from catalog.repeated_keys import Sent
from catalog.tables import ApiKey
from tests.catalog.world import PEPPER, World, opens

ONCE = Sent(digest="d", idempotency_key="once")
RETRY = Sent(digest="d", is_client_retry=True)


def create(world: World, sent: Sent, *, caller: Caller | None = None) -> tuple[ApiKey, str]:
    return issuing.create(
        world.db, caller=caller or world.caller, request=KeyRequest(name="k"), pepper=PEPPER, sent=sent
    )


def rotate(world: World, key_id: str, sent: Sent, *, caller: Caller | None = None) -> tuple[ApiKey, str]:
    given: dict[str, Any] = {"api_key_id": key_id, "overlap_seconds": 100, "pepper": PEPPER}
    return issuing.rotate(world.db, caller=caller or world.caller, sent=sent, **given)


def num_keys(world: World) -> int:
    return len(issuing.list_page(world.db, caller=world.caller, limit=100).items)


@pytest.mark.parametrize("again", [ONCE, RETRY])
def test_a_key_that_is_asked_for_twice_is_made_once_and_told_a_new_text(world: World, again: Sent) -> None:
    first, lost = create(world, ONCE)
    before = num_keys(world)

    second, secret = create(world, again)

    assert (second.id, num_keys(world)) == (first.id, before)
    assert secret != lost
    assert not opens(world, lost)
    assert opens(world, secret)


def test_what_is_asked_for_anew_is_another_key(world: World) -> None:
    first, _ = create(world, Sent(digest="d"))

    others = [
        create(world, Sent(digest="d"))[0].id,
        create(world, Sent(digest="d", idempotency_key="other"))[0].id,
        create(world, Sent(digest="e", is_client_retry=True))[0].id,
        create(world, ONCE, caller=world.stranger)[0].id,
    ]

    assert first.id not in others
    assert len(set(others)) == 4


def test_a_retry_long_after_is_another_request(world: World) -> None:
    first, _ = create(world, Sent(digest="d"))
    world.clock.turn(601)

    assert create(world, RETRY)[0].id != first.id


def test_a_key_that_was_used_is_not_told_again(world: World) -> None:
    _, secret = create(world, ONCE)
    assert opens(world, secret)

    with pytest.raises(Conflict) as refusal:
        create(world, ONCE)

    assert refusal.value.code == "key_told_already"
    assert opens(world, secret)


def test_an_idempotency_key_is_for_one_request(world: World) -> None:
    create(world, ONCE)

    with pytest.raises(Conflict) as refusal:
        create(world, Sent(digest="e", idempotency_key="once"))

    assert refusal.value.code == "idempotency_key_reused"


def test_a_rotation_whose_reply_was_lost_is_answered_with_the_key_that_it_made(world: World) -> None:
    key, _ = create(world, Sent(digest="d"))
    made, lost = rotate(world, key.id, Sent(digest="r"))

    again, secret = rotate(world, key.id, Sent(digest="r", is_client_retry=True))
    with pytest.raises(Conflict, match="was taken by"):
        rotate(world, key.id, Sent(digest="r"))

    assert again.id == made.id
    assert (opens(world, lost), opens(world, secret)) == (False, True)


def test_of_ones_own_key_only_who_knows_the_idempotency_key_is_told(world: World) -> None:
    """It may be rotated because it leaked: whoever else has it could guess the rest of the request."""
    own = world.caller.api_key_id
    made, _ = rotate(world, own, ONCE)

    with pytest.raises(Conflict) as refusal:
        rotate(world, own, RETRY)
    again, secret = rotate(world, own, ONCE)

    assert refusal.value.code == "key_rotated_already"
    assert again.id == made.id
    assert opens(world, secret)
