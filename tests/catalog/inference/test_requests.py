"""The model that answers a request, and the tokens of its answer."""

from __future__ import annotations

import pytest

from catalog.errors import Conflict, NotFound
from catalog.inference import requests
from catalog.inference.requests import Model
from catalog.registry import base_models
from catalog.resources.pack_key import pack_key
from catalog.usage import report
from tests.catalog.world import World, sha

KEY = pack_key(sha("smol"), "bfloat16")


@pytest.fixture
def world(world: World) -> World:
    world.worker()
    return world


def resolve(world: World, name: str = "smol") -> Model:
    return requests.resolve(world.db, project_id=world.caller.project_id, name=name)


def test_base_model_answers_in_the_precision_of_the_workers(world: World) -> None:
    found = resolve(world)

    assert (found.base_model, found.base_digest, found.adapter, found.pack_key) == ("smol", sha("smol"), None, KEY)


@pytest.mark.parametrize(("quantization", "is_used"), [("none", True), ("nf4", False)])
def test_base_model_that_is_loaded_without_quantization_answers_as_it_is_loaded(
    world: World, quantization: str, is_used: bool
) -> None:
    key = pack_key(sha("smol"), "float32", quantization)

    world.load(key)

    assert resolve(world).pack_key == (key if is_used else KEY)


def test_adapter_answers_as_it_was_trained(world: World) -> None:
    job = world.running(precision="float32")
    world.complete(job.claim_id)
    name = world.job(job.job.id).adapter_name
    assert name is not None

    found = resolve(world, name)

    assert found.adapter is not None
    assert found.pack_key == pack_key(sha("smol"), "float32")
    with pytest.raises(NotFound):
        requests.resolve(world.db, project_id=world.stranger.project_id, name=name)
    base_models.delete(world.db, "smol")
    with pytest.raises(Conflict, match="deleted or replaced") as refused:
        resolve(world, name)
    assert refused.value.code == "model_changed"
    assert "`lorry models add smol SOURCE`" in refused.value.remedy


@pytest.mark.parametrize("has_failed", [False, True])
def test_base_model_that_is_not_ready_is_a_conflict(world: World, has_failed: bool) -> None:
    base_models.add(world.db, name="new", kind="folder", source="/models/new")
    if has_failed:
        world.fail_import("new", {"code": "x", "message": "y", "remedy": "z"})

    with pytest.raises(Conflict, match="import failed" if has_failed else "has not finished"):
        resolve(world, "new")
    with pytest.raises(NotFound):
        resolve(world, "unknown")


@pytest.mark.parametrize("prompt_tokens", [7, 0])
def test_tokens_count_if_an_engine_has_begun_to_answer(world: World, prompt_tokens: int) -> None:
    requests.count(
        world.db,
        project_id=world.caller.project_id,
        model=resolve(world),
        response_id="chatcmpl-1",
        prompt_tokens=prompt_tokens,
        completion_tokens=3,
    )

    query = report.UsageQuery(start_time=world.clock.now - 86400, group_by=("project_id", "model"))
    found = [used for day in report.report(world.db, caller=world.caller, query=query).days for used in day.used]
    names = ("num_completions", "prompt_tokens", "completion_tokens")
    counted = [(used.model, *(used.amounts[name] for name in names)) for used in found]
    assert counted == ([("smol", 1, 7, 3)] if prompt_tokens else [])
