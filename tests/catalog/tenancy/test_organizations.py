"""Organizations: creation and renaming by operators, and their projects."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from catalog.db.database import Database
from catalog.errors import Conflict, InvalidRequest, NotFound
from catalog.registry import permissions
from catalog.tenancy import authentication, organizations, projects
from catalog.tenancy.authentication import Caller
from tests.catalog.read_costs import statements_of
from tests.catalog.world import PEPPER, World


@pytest.fixture
def operator(world: World) -> Caller:
    return replace(world.caller, is_operator=True)


def names(db: Database, caller: Caller) -> list[str]:
    return [row.name for row in organizations.list_page(db, caller=caller).items]


def test_organization_names_are_unique_and_valid(world: World, operator: Caller) -> None:
    made = organizations.create(world.db, "research")

    with pytest.raises(Conflict) as taken:
        organizations.create(world.db, "research")
    with pytest.raises(Conflict):
        organizations.rename(world.db, caller=operator, organization="research", name="default")
    renamed = organizations.rename(world.db, caller=operator, organization=made.id, name="science")

    assert (taken.value.code, made.id in taken.value.message) == ("already_exists", True)
    assert organizations.create(world.db, "science", is_client_retry=True).id == renamed.id == made.id
    assert organizations.rename(world.db, caller=operator, organization="science", name="science").name == "science"
    assert names(world.db, operator) == ["science", "default"]
    for name in ("", "a/b", "x" * 65):
        with pytest.raises(InvalidRequest, match="not a valid name for an organization"):
            organizations.create(world.db, name)


def test_project_is_created_in_the_named_organization(world: World) -> None:
    made = organizations.create(world.db, "research")

    search = projects.create(world.db, "search", organization="research")
    again = projects.create(world.db, "search", organization=made.id, is_client_retry=True)
    usual = projects.create(world.db, "usual")

    assert (search.organization_id, again.id) == (made.id, search.id)
    assert usual.organization_id == world.caller.organization_id
    with pytest.raises(NotFound) as refusal:
        projects.create(world.db, "lost", organization="nowhere")
    assert (refusal.value.code, refusal.value.param) == ("organization_not_found", "organization")
    # Project names are unique in the whole service. A request that names another organization is not a retry.
    for organization in ("research", "default"):
        with pytest.raises(Conflict):
            projects.create(world.db, "search", organization=organization, is_client_retry=organization == "default")


def test_names_must_not_look_like_ids(world: World, operator: Caller) -> None:
    verbs: list[tuple[str, Callable[[str], object]]] = [
        ("org-", lambda name: organizations.create(world.db, name)),
        ("org-", lambda name: organizations.rename(world.db, caller=operator, organization="default", name=name)),
        ("proj-", lambda name: projects.create(world.db, name)),
        ("proj-", lambda name: projects.rename(world.db, caller=operator, project="ours", name=name)),
        ("proj-", lambda name: projects.ensure(world.db, name)),
    ]

    for prefix, verb in verbs:
        with pytest.raises(InvalidRequest) as refusal:
            verb(f"{prefix}2d4c")
        assert refusal.value.remedy == f"Choose a name that does not start with '{prefix}'."
    organizations.create(world.db, "proj-2d4c")
    projects.create(world.db, "orgs")


def test_authentication_takes_one_query(world: World) -> None:
    key, secret = authentication.create(world.db, project_id=world.caller.project_id, name="key", pepper=PEPPER)
    link = authentication.create_sign_in_link(world.db, api_key_id=key.id, pepper=PEPPER)
    browser = authentication.exchange_sign_in(world.db, token=link, pepper=PEPPER)
    authentication.authenticate(world.db, secret=secret, pepper=PEPPER)  # records the first use
    found: list[Caller] = []

    def num_queries(authenticate: Callable[..., Caller], given: str) -> int:
        statements = statements_of(world.db, lambda: found.append(authenticate(world.db, secret=given, pepper=PEPPER)))
        return len([text for text, _ in statements if "FROM" in text])

    assert (
        num_queries(authentication.authenticate, secret),
        num_queries(authentication.authenticate_browser, browser),
    ) == (1, 1)
    assert {(caller.project_name, caller.organization_name) for caller in found} == {("ours", "default")}


def test_model_cannot_be_shared_beyond_its_organization(world: World, operator: Caller) -> None:
    world.worker()
    adapter = world.complete(world.running().claim_id)
    away = world.caller_of("elsewhere", "away")

    def refused(*named: str) -> NotFound:
        with pytest.raises(NotFound) as refusal:
            permissions.grant(world.db, caller=operator, model=adapter.name, projects_named=named)
        return refusal.value

    foreign, absent = refused("theirs", "away"), refused("theirs", "missing")
    by_id = refused(away.project_id)

    assert (foreign.code, foreign.param, by_id.code) == ("project_not_found", "project_ids", "project_not_found")
    assert foreign.sentence().replace("away", "NAME") == absent.sentence().replace("missing", "NAME")
    assert permissions.list_page(world.db, model=adapter.name).items == []
    by_another = replace(away, is_operator=True)  # the organization of the operator does not matter
    (given,) = permissions.grant(world.db, caller=by_another, model=adapter.name, projects_named=["theirs"])
    assert given.project_id == world.stranger.project_id
