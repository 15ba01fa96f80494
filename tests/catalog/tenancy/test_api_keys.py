"""API keys and projects: no key gives more than its creator has, or outlives its limits by a rotation."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import func, select

from catalog import revocation
from catalog.errors import Conflict, Forbidden, InvalidRequest, NotFound, Unauthorized
from catalog.tables.tenancy import ApiKey
from catalog.tenancy import api_keys, authentication, projects
from catalog.tenancy.api_keys import KeyRequest
from catalog.tenancy.authentication import Caller
from catalog.tenancy.scopes import OPERATORS, SCOPES, granted
from tests.catalog.world import PEPPER, World, opens

HOUR = 3600.0


def caller(world: World, project: str = "ours", **given: Any) -> Caller:
    """Return the caller of a new key."""
    project_id = projects.ensure(world.db, project).id
    _, secret = authentication.create(world.db, project_id=project_id, name=project, pepper=PEPPER, **given)
    return authentication.authenticate(world.db, secret=secret, pepper=PEPPER)


def make(world: World, by: Caller, **fields: Any) -> tuple[ApiKey, str]:
    return api_keys.create(world.db, caller=by, request=KeyRequest(**{"name": "new", **fields}), pepper=PEPPER)


def rotate(world: World, by: Caller, key_id: str, overlap: float = HOUR, **fields: Any) -> tuple[ApiKey, str]:
    return api_keys.rotate(world.db, caller=by, api_key_id=key_id, overlap_seconds=overlap, pepper=PEPPER, **fields)


def test_new_key_has_only_the_requested_rights(world: World) -> None:
    wanted = ["jobs:write", "files:read"]

    row, secret = make(world, world.caller, scopes=wanted, expires_at=world.clock.now + HOUR)

    holder = authentication.authenticate(world.db, secret=secret, pepper=PEPPER)
    assert holder.scopes == set(wanted)
    assert secret.endswith(row.ending or "?")
    assert not holder.is_operator
    world.clock.advance(HOUR)
    assert not opens(world, secret)


def test_key_without_explicit_scopes_inherits_those_of_its_creator(world: World) -> None:
    operator, limited = caller(world, is_operator=True), caller(world, scopes=["keys:write", "jobs:read"])

    made = [make(world, by)[0] for by in (world.caller, operator, limited)]

    assert [row.scopes for row in made] == [None, None, ["jobs:read", "keys:write"]]
    assert granted(None, is_operator=False) == frozenset(SCOPES) - OPERATORS


@pytest.mark.parametrize(
    ("has", "asks", "param"),
    [
        ({"scopes": ["keys:write", "jobs:read"]}, {"scopes": ["jobs:write"]}, "scopes"),
        ({"scopes": ["keys:write"]}, {"scopes": ["keys:write", "files:read"]}, "scopes"),
        ({}, {"is_operator": True}, "is_operator"),
        ({"is_operator": True, "scopes": ["keys:write"]}, {"is_operator": True, "scopes": ["models:write"]}, "scopes"),
        ({"expires_at": 1_800_000_900.0}, {"expires_at": 1_800_000_901}, "expires_at"),
    ],
)
def test_key_cannot_grant_more_than_it_has(world: World, has: dict[str, Any], asks: dict[str, Any], param: str) -> None:
    with pytest.raises(Forbidden) as refusal:
        make(world, caller(world, **has), **asks)

    assert (refusal.value.code, refusal.value.param) == ("exceeds_own_rights", param)


def test_expiring_key_creates_keys_that_expire_with_it(world: World) -> None:
    ending = caller(world, expires_at=world.clock.now + HOUR)

    row, _ = make(world, ending)

    assert row.expires_at == ending.expires_at
    past = int(world.clock.now - 1)
    with pytest.raises(
        InvalidRequest, match=f"{past}, which is not in the future: the server's current time is {past + 1}"
    ):
        make(world, world.caller, expires_at=past)


def test_cross_project_scopes_require_an_operator_key(world: World) -> None:
    operator = caller(world, is_operator=True)

    with pytest.raises(InvalidRequest) as refusal:
        make(world, operator, scopes=["models:write"])
    row, _ = make(world, operator, scopes=["models:write"], is_operator=True, project="theirs")

    assert refusal.value.code == "operator_required"
    assert "set 'is_operator' to true" in refusal.value.remedy
    with pytest.raises(InvalidRequest) as refusal:
        make(world, world.caller, scopes=["models:write", "projects:write", "jobs:read", "workers:write"])
    assert refusal.value.message.endswith("the scopes models:write, projects:write and workers:write.")
    assert "ask an operator to create" in refusal.value.remedy
    assert row.project_id == world.stranger.project_id


def test_both_keys_are_valid_during_the_rotation_overlap(world: World) -> None:
    old, secret = make(world, world.caller, scopes=["jobs:read", "keys:write"])
    holder = authentication.authenticate(world.db, secret=secret, pepper=PEPPER)

    new, new_secret = rotate(world, holder, old.id)

    assert (new.name, new.scopes, new.expires_at) == (old.name, ["jobs:read", "keys:write"], None)
    assert api_keys.get(world.db, caller=world.caller, api_key_id=old.id).replaced_by == new.id
    world.clock.advance(HOUR - 1)
    assert opens(world, secret)
    assert opens(world, new_secret)
    with pytest.raises(Conflict) as again:
        rotate(world, world.caller, old.id)
    world.clock.advance(1)
    assert not opens(world, secret)
    assert opens(world, new_secret)
    with pytest.raises(Conflict) as late:
        rotate(world, world.caller, old.id)
    assert [again.value.code, late.value.code] == ["key_not_live", "key_not_live"]
    assert all(old.id in error.value.message for error in (again, late))
    assert f"`lorry keys rotate {new.id}`" in again.value.remedy


def test_replacement_of_an_expired_operator_key_is_an_operator_key(world: World) -> None:
    operator = caller(world, is_operator=True)
    old, _ = make(world, operator, is_operator=True, project="theirs", expires_at=world.clock.now + 1)
    world.clock.advance(1)

    with pytest.raises(Conflict) as refusal:
        rotate(world, operator, old.id)

    assert f"`lorry keys create NAME --operator --project {old.project_id}`" in refusal.value.remedy


def test_rotation_does_not_extend_the_expiry(world: World) -> None:
    end = world.clock.now + HOUR
    old, secret = make(world, world.caller, expires_at=end)
    holder = authentication.authenticate(world.db, secret=secret, pepper=PEPPER)

    with pytest.raises(Forbidden):
        rotate(world, holder, old.id, expires_at=end + HOUR)
    new, _ = rotate(world, holder, old.id, overlap=10 * HOUR)

    assert new.expires_at == end
    assert api_keys.get(world.db, caller=world.caller, api_key_id=old.id).expires_at == end


@pytest.mark.parametrize("holds", [{"is_operator": True}, {"scopes": ["files:write"]}, {}])
def test_lesser_key_cannot_rotate_or_revoke_a_greater_one(world: World, holds: dict[str, Any]) -> None:
    target = caller(world, **holds)
    lesser = caller(world, scopes=["keys:write"])

    for attempt in (
        lambda: rotate(world, lesser, target.api_key_id),
        lambda: revocation.revoke(world.db, caller=lesser, api_key_id=target.api_key_id),
    ):
        with pytest.raises(Forbidden) as refusal:
            attempt()
        assert refusal.value.code == "exceeds_own_rights"
        assert target.api_key_id in refusal.value.message


def test_key_with_named_scopes_cannot_rotate_one_with_all_scopes(world: World) -> None:
    named = caller(world, scopes=sorted(granted(None, is_operator=False)))

    with pytest.raises(Forbidden, match="was created without 'scopes'"):
        rotate(world, named, world.caller.api_key_id)
    own, _ = rotate(world, named, named.api_key_id)

    assert own.scopes is not None


def test_last_operator_key_cannot_be_revoked(world: World) -> None:
    operator = caller(world, is_operator=True)
    caller(world, is_operator=True, scopes=["jobs:read"])
    caller(world, is_operator=True, expires_at=world.clock.now + 1)
    world.clock.advance(2)

    def revoke(key_id: str) -> ApiKey:
        return revocation.revoke(world.db, caller=operator, api_key_id=key_id).key

    with pytest.raises(Conflict) as refusal:
        revoke(operator.api_key_id)
    assert refusal.value.code == "last_operator_key"
    assert "no other operator key with every scope and no expiration would be left" in refusal.value.message
    assert "rotate it without" in refusal.value.remedy
    new, secret = rotate(world, operator, operator.api_key_id)
    successor = authentication.authenticate(world.db, secret=secret, pepper=PEPPER)
    with pytest.raises(Conflict):
        revocation.revoke(world.db, caller=successor, api_key_id=new.id)
    ended = revoke(operator.api_key_id)

    assert ended.revoked_at is not None
    again = revocation.revoke(world.db, caller=successor, api_key_id=operator.api_key_id)
    assert again.key.revoked_at == ended.revoked_at


def test_server_sign_in_link_prefers_an_unrestricted_operator_key(world: World) -> None:
    lesser = caller(world, is_operator=True, scopes=["jobs:read"])
    first = authentication.an_operator(world.db)
    whole = caller(world, is_operator=True)

    then = authentication.an_operator(world.db)
    new, _ = rotate(world, whole, whole.api_key_id)

    assert [first, then, authentication.an_operator(world.db)] == [lesser.api_key_id, whole.api_key_id, new.id]


def test_keys_of_an_archived_project_are_rejected_until_it_is_restored(world: World) -> None:
    operator = caller(world, "offices", is_operator=True)
    _, secret = make(world, world.caller)
    link = authentication.create_sign_in_link(world.db, api_key_id=world.caller.api_key_id, pepper=PEPPER)
    browser = authentication.exchange_sign_in(world.db, token=link, pepper=PEPPER)

    projects.archive(world.db, caller=operator, project="ours")

    with pytest.raises(Unauthorized) as refusal:
        authentication.authenticate(world.db, secret=secret, pepper=PEPPER)
    with pytest.raises(Unauthorized):
        authentication.authenticate_browser(world.db, secret=browser, pepper=PEPPER)
    assert (refusal.value.code, "lorry projects restore ours" in refusal.value.remedy) == ("project_archived", True)
    shown = [projects.list_page(world.db, caller=operator, archived=archived).items for archived in (False, True)]
    assert [[row.name for row in rows] for rows in shown] == [["offices", "theirs"], ["offices", "theirs", "ours"]]
    with pytest.raises(NotFound) as unknown:
        projects.restore(world.db, caller=operator, project="our")
    assert unknown.value.remedy == "Choose a project from `lorry projects list --archived`."
    projects.restore(world.db, caller=operator, project="ours")
    assert opens(world, secret)


def test_project_of_the_last_operator_key_cannot_be_archived(world: World) -> None:
    operator = caller(world, is_operator=True)

    with pytest.raises(Conflict) as refusal:
        projects.archive(world.db, caller=operator, project="ours")
    make(world, operator, is_operator=True, project="theirs")

    assert (refusal.value.code, refusal.value.param) == ("last_operator_key", "project")
    assert projects.archive(world.db, caller=operator, project="ours").archived_at is not None
    assert authentication.an_operator(world.db) != operator.api_key_id


def test_project_names_are_unique_and_valid(world: World) -> None:
    operator = caller(world, is_operator=True)
    made = projects.create(world.db, "search")

    with pytest.raises(Conflict) as taken:
        projects.create(world.db, "search")
    with pytest.raises(Conflict):
        projects.rename(world.db, caller=operator, project="search", name="ours")
    renamed = projects.rename(world.db, caller=operator, project=made.id, name="find")

    assert taken.value.code == "already_exists"
    assert projects.create(world.db, "find", is_client_retry=True).id == renamed.id == made.id
    assert projects.rename(world.db, caller=operator, project="find", name="find").name == "find"
    for name, fault in (("", "empty"), ("a/b", "contains '/'"), ("x" * 65, "65 characters"), ("-a", "starts with '-'")):
        with pytest.raises(InvalidRequest, match=f"not a valid name for a project: it .*{fault}"):
            projects.create(world.db, name)
    projects.archive(world.db, caller=caller(world, "offices", is_operator=True), project="find")
    with pytest.raises(Conflict, match=f"Archived project 'find' already exists, with the ID {made.id}"):
        projects.create(world.db, "find")


def test_renamed_first_project_is_not_created_again_at_start(world: World) -> None:
    operator = caller(world, is_operator=True)
    oldest = projects.first(world.db)

    projects.rename(world.db, caller=operator, project=oldest.id, name="research")

    assert projects.first(world.db).name == "research"
    assert len(projects.list_page(world.db, caller=operator).items) == 2


def test_valid_keys_per_project_are_limited(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    with world.db.read() as session:
        valid = select(func.count()).where(ApiKey.project_id == world.caller.project_id)
        monkeypatch.setattr(api_keys, "MAX_VALID_KEYS", (session.scalar(valid) or 0) + 2)

    def create(**given: Any) -> ApiKey:
        return api_keys.create(world.db, caller=world.caller, request=KeyRequest(name="n", **given), pepper=PEPPER)[0]

    def rotate(key: ApiKey, seconds: float) -> ApiKey:
        given: dict[str, Any] = {"overlap_seconds": seconds, "pepper": PEPPER}
        return api_keys.rotate(world.db, caller=world.caller, api_key_id=key.id, **given)[0]

    remedies: list[str] = []
    expiring, kept = create(expires_at=world.clock.now + 100), create()
    for beyond in (create, lambda: rotate(kept, 10)):
        with pytest.raises(Conflict) as refusal:
            beyond()
        assert refusal.value.code == "limit_reached"
        remedies.append(refusal.value.remedy)
    assert ["--overlap 0s" in remedy for remedy in remedies] == [False, True]
    assert all("`lorry keys list --project ours`" in remedy for remedy in remedies)
    kept = rotate(kept, 0)
    world.clock.advance(200)
    create()
    with pytest.raises(Conflict):
        create()
    revocation.revoke(world.db, caller=world.caller, api_key_id=kept.id)
    create()

    assert not authentication.is_live(expiring, world.clock.now)


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
