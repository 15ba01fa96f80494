"""A rotation never extends validity or limits, and gives the holder of a leaked key no way back."""

from __future__ import annotations

from typing import Any

import pytest

from catalog import revocation
from catalog.errors import Conflict, Forbidden
from catalog.tenancy import api_keys, authentication, projects
from tests.catalog.tenancy.test_api_keys import HOUR, caller, make, rotate
from tests.catalog.world import PEPPER, World


def test_expiring_key_cannot_obtain_a_longer_lasting_one(world: World) -> None:
    end = world.clock.now + HOUR
    short = caller(world, expires_at=end)

    new, _ = rotate(world, short, caller(world).api_key_id)

    assert new.expires_at == end


def test_limited_key_cannot_escape_its_limits_by_rotating_another(world: World) -> None:
    operator = caller(world, is_operator=True)
    key = authentication.create(world.db, project_id=world.caller.project_id, name="limited", pepper=PEPPER)
    limits = {"requests_per_minute": 3, "jobs_per_day": 1}
    api_keys.limit(world.db, caller=operator, api_key_id=key[0].id, limits=limits)
    limited = authentication.authenticate(world.db, secret=key[1], pepper=PEPPER)

    new, _ = rotate(world, limited, caller(world).api_key_id)

    assert (new.requests_per_minute, new.jobs_per_day) == (3, 1)


def test_superseded_key_cannot_change_other_keys(world: World) -> None:
    leaked, other = caller(world), caller(world)
    rotate(world, leaked, leaked.api_key_id)

    with pytest.raises(Forbidden) as rotated:
        rotate(world, leaked, other.api_key_id)
    with pytest.raises(Forbidden) as revoked:
        revocation.revoke(world.db, caller=leaked, api_key_id=other.api_key_id)

    assert rotated.value.code == revoked.value.code == "key_not_live"
    assert revocation.revoke(world.db, caller=leaked, api_key_id=leaked.api_key_id).key.revoked_at is not None


def test_browser_session_leaves_nothing_that_outlives_it(world: World) -> None:
    link = authentication.create_sign_in_link(world.db, api_key_id=world.caller.api_key_id, pepper=PEPPER)
    cookie = authentication.exchange_sign_in(world.db, token=link, pepper=PEPPER)
    visitor = authentication.authenticate_browser(world.db, secret=cookie, pepper=PEPPER)

    with pytest.raises(Forbidden) as refusal:
        rotate(world, visitor, world.caller.api_key_id)
    made, _ = make(world, visitor)

    assert refusal.value.code == "api_key_required"
    assert f"`lorry keys rotate {world.caller.api_key_id}`" in refusal.value.remedy
    assert made.expires_at == visitor.expires_at is not None


@pytest.mark.parametrize("lesser", [{"scopes": ["keys:write"]}, {"expires_at": 1_800_003_600.0}])
def test_restricted_operator_key_does_not_count_as_second_operator(world: World, lesser: dict[str, Any]) -> None:
    operator = caller(world, is_operator=True)
    caller(world, is_operator=True, **lesser)

    with pytest.raises(Conflict) as revoked:
        revocation.revoke(world.db, caller=operator, api_key_id=operator.api_key_id)
    with pytest.raises(Conflict) as rotated:
        rotate(world, operator, operator.api_key_id, expires_at=world.clock.now + HOUR)
    with pytest.raises(Conflict):
        projects.archive(world.db, caller=operator, project=operator.project_id)

    assert revoked.value.code == rotated.value.code == "last_operator_key"
    assert (rotated.value.param, "Omit 'expires_at'" in rotated.value.remedy) == ("expires_at", True)


def test_last_operator_key_that_expires_has_a_matching_remedy(world: World) -> None:
    """Its replacement would expire as well."""
    operator = caller(world, is_operator=True, expires_at=world.clock.now + HOUR)

    with pytest.raises(Conflict, match="that can create keys would be left") as revoked:
        revocation.revoke(world.db, caller=operator, api_key_id=operator.api_key_id)
    with pytest.raises(Conflict, match="that can create keys exists") as rotated:
        rotate(world, operator, operator.api_key_id)

    assert [error.value.param for error in (revoked, rotated)] == ["api_key_id", "api_key_id"]
    for error in (revoked, rotated):
        assert error.value.remedy.endswith("on the server: `python -m api new-key`.")


def test_lesser_operator_key_cannot_change_limits(world: World) -> None:
    lesser, greater = caller(world, is_operator=True, scopes=["keys:write"]), caller(world, is_operator=True)

    for key_id in (greater.api_key_id, lesser.api_key_id):
        with pytest.raises(Forbidden) as refusal:
            api_keys.limit(world.db, caller=lesser, api_key_id=key_id, limits={"requests_per_minute": 0})
        assert refusal.value.code == "exceeds_own_rights"
        assert refusal.value.param == "api_key_id"
