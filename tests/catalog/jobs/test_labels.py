"""Job lists filtered by metadata and tags."""

from __future__ import annotations

from typing import Any

import pytest

from catalog.errors import InvalidRequest
from catalog.jobs import commands
from tests.catalog.world import World


def found(world: World, **wanted: Any) -> list[str]:
    page = commands.list_page(world.db, project_id=world.caller.project_id, **wanted)
    return [job.id for job in page.items]


def test_jobs_match_all_requested_metadata_and_tags(world: World) -> None:
    both = world.submit(metadata={"team": "search", "run": "1"}, tags=["nightly", "q3"]).id
    one = world.submit(metadata={"team": "search"}, tags=["nightly"]).id
    bare = world.submit().id
    world.submit(caller=world.stranger, training_file=world.file(caller=world.stranger), tags=["nightly"])

    assert found(world, metadata={"team": "search"}) == [one, both]
    assert found(world, metadata={"team": "search", "run": "1"}) == [both]
    assert found(world, metadata={"team": "search"}, tags=["q3"]) == [both]
    assert found(world, tags=["nightly"]) == [one, both]
    assert found(world, tags=["team"]) == found(world, metadata={"nightly": ""}) == []
    assert found(world, metadata={}) == [bare]
    assert found(world, metadata={}, tags=["nightly"]) == []
    assert found(world) == [bare, one, both]


def test_pages_of_filtered_jobs_follow_each_other(world: World) -> None:
    tagged = [world.submit(tags=["a"]).id for _ in range(3)]
    other = world.submit().id
    project = world.caller.project_id

    first = commands.list_page(world.db, project_id=project, tags=["a"], limit=2)
    rest = commands.list_page(world.db, project_id=project, tags=["a"], limit=2, after=first.items[-1].id)

    assert [job.id for job in [*first.items, *rest.items]] == tagged[::-1]
    assert (first.has_more, rest.has_more) == (True, False)
    with pytest.raises(InvalidRequest, match="no item"):
        commands.list_page(world.db, project_id=project, tags=["a"], after=other)


def test_repeated_tag_counts_once(world: World) -> None:
    job = world.submit(tags=["a", "a"])

    assert found(world, tags=["a", "a"]) == [job.id]
