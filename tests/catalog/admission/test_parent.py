"""A job that continues an adapter: whose, on which base, and what of it is then the parent's."""

from __future__ import annotations

import math
from typing import Any

import pytest

from catalog.admission.accept import exported_shape
from catalog.errors import Conflict, InvalidRequest, NotFound
from catalog.jobs import commands
from catalog.registry import adapters
from catalog.resources import memory
from catalog.spec.job import JobSpec
from catalog.spec.lora import LoraRequest, resolve_lora
from catalog.tables.jobs import Job
from catalog.tables.storage import Adapter
from tests.catalog.world import DESCRIPTION, World

SHAPE = {"rank": 4, "alpha": 12, "dropout": 0.1, "target_modules": ["v_proj", "q_proj"], "rank_pattern": {"v_proj": 2}}


BASE = "pathed"
LAYERS = [
    {"path": "model.layers.*.self_attn.q_proj", "shape": [64, 64], "layers": [0, 1]},
    {"path": "model.layers.*.self_attn.v_proj", "shape": [16, 64], "layers": [0, 1]},
]


@pytest.fixture
def parent(world: World) -> Adapter:
    world.base(BASE, linear_paths=LAYERS)
    return trained(world, model=BASE, lora=SHAPE)


def submitted(world: World, **fields: Any) -> Job:
    return world.submit(**{"model": BASE, **fields})


def trained(world: World, content: str = "adapter", **fields: Any) -> Adapter:
    world.worker()
    return world.complete(world.running(**fields).claim_id, content)


def spec_of(job: Job) -> JobSpec:
    return JobSpec.model_validate(job.spec)


@pytest.mark.parametrize("name_of", ["id", "name"])
def test_what_a_child_leaves_out_is_its_parents(world: World, parent: Adapter, name_of: str) -> None:
    job = submitted(world, parent_adapter=getattr(parent, name_of), lora={"dropout": 0.3})

    spec, theirs = spec_of(job), JobSpec.model_validate(commands.get(world.db, **mine(world, parent.job_id)).spec)
    assert spec.lora == theirs.lora.model_copy(update={"dropout": 0.3})
    assert spec.parent is not None
    assert spec.parent.model_dump() == {
        "adapter": parent.id,
        "name": parent.name,
        "artifact": parent.artifact,
        "lineage": parent.lineage_id,
    }
    assert (job.parent_adapter, job.base_model) == (parent.id, BASE)
    assert job.requested["lora"] == {"dropout": 0.3}
    assert job.adapter_parameters == commands.get(world.db, **mine(world, parent.job_id)).adapter_parameters


def mine(world: World, job_id: str) -> dict[str, str]:
    return {"project_id": world.caller.project_id, "job_id": job_id}


def test_an_adapter_may_be_the_model_as_at_openai(world: World, parent: Adapter) -> None:
    job = submitted(world, model=parent.name)

    assert (job.base_model, job.parent_adapter) == (BASE, parent.id)
    assert job.requested["model"] == parent.name
    assert submitted(world, model=parent.name, parent_adapter=parent.id, seed=5).parent_adapter == parent.id


def test_two_parents_are_one_too_many(world: World, parent: Adapter) -> None:
    other = trained(world, "other", model=BASE, seed=9)

    with pytest.raises(InvalidRequest, match="a job can continue only one") as refused:
        submitted(world, model=parent.name, parent_adapter=other.id)

    assert refused.value.code == "two_parents"


def test_what_is_said_again_may_not_be_said_otherwise(world: World, parent: Adapter) -> None:
    again = {**SHAPE, "target_modules": ["q_proj", "v_proj"], "alpha": "auto"}
    assert spec_of(submitted(world, parent_adapter=parent.id, lora=again)).lora.alpha == 12

    for name, value in {"rank": 8, "alpha": 8, "use_dora": True, "target_modules": "all-linear"}.items():
        with pytest.raises(InvalidRequest, match="but the parent adapter has") as refused:
            submitted(world, parent_adapter=parent.id, lora={name: value})
        assert (refused.value.code, refused.value.param) == ("differs_from_parent", f"lora.{name}")
    with pytest.raises(InvalidRequest, match="starts with the adapter's weights"):
        submitted(world, parent_adapter=parent.id, lora={"init_lora_weights": "pissa"})
    with pytest.raises(InvalidRequest, match="quantization is 'nf4', but the parent adapter has 'none'"):
        submitted(world, parent_adapter=parent.id, quantization="nf4")


@pytest.mark.parametrize("use_rslora", [False, True])
def test_an_adapter_that_began_with_the_base_is_continued_as_a_plain_one_of_twice_the_rank(use_rslora: bool) -> None:
    asked = LoraRequest(rank=4, alpha=8, rank_pattern={"q": 2}, alpha_pattern={"q": 3}, use_rslora=use_rslora)
    pissa = resolve_lora(asked.model_copy(update={"init_lora_weights": "pissa"}))

    plain, times = exported_shape(pissa), math.sqrt(2) if use_rslora else 2

    assert (plain.rank, plain.rank_pattern, plain.init_lora_weights) == (8, {"q": 4}, "default")
    assert (plain.alpha, plain.alpha_pattern) == (times * 8, {"q": times * 3})


def test_another_projects_adapter_is_not_there(world: World, parent: Adapter) -> None:
    theirs = world.file(caller=world.stranger)

    for fields in ({"parent_adapter": parent.id}, {"model": parent.name}):
        with pytest.raises(NotFound) as refused:
            submitted(world, caller=world.stranger, training_file=theirs, **fields)
        assert refused.value.code == "adapter_not_found"
        assert refused.value.param in fields


def test_a_child_is_of_its_parents_base(world: World, parent: Adapter) -> None:
    world.base("other")

    with pytest.raises(InvalidRequest, match="not trained on the current base model 'other'") as refused:
        submitted(world, model="other", parent_adapter=parent.id)

    assert refused.value.code == "parent_of_another_base"


def test_an_adapter_is_not_deleted_while_a_job_that_has_not_ended_continues_it(world: World, parent: Adapter) -> None:
    child = submitted(world, parent_adapter=parent.id)
    named: dict[str, Any] = {"project_id": world.caller.project_id, "name": parent.name}

    with pytest.raises(Conflict, match=child.id) as refused:
        adapters.delete(world.db, **named)
    assert refused.value.code == "adapter_in_use"

    commands.cancel(world.db, project_id=world.caller.project_id, job_id=child.id)
    adapters.delete(world.db, **named)
    with pytest.raises(NotFound):
        submitted(world, parent_adapter=parent.id)


def test_an_adapter_tells_its_children(world: World, parent: Adapter) -> None:
    named = {"project_id": world.caller.project_id, "name": parent.id}
    assert adapters.children(world.db, **named) == []

    child = trained(world, "child", model=BASE, parent_adapter=parent.id, seed=9)

    assert [found.id for found in adapters.children(world.db, **named)] == [child.id]


def test_a_parent_that_is_compared_with_is_reckoned_beside_the_job() -> None:
    def taken(precision: str, *, keeps_parent: bool = False) -> int:
        given: dict[str, Any] = {"num_parameters": 1000, "dropout": 0.0, "keeps_parent": keeps_parent}
        return sum(memory.own_parts(DESCRIPTION, precision, **given).values())

    assert taken("float32", keeps_parent=True) - taken("float32") == 4000
    assert taken("bfloat16", keeps_parent=True) - taken("bfloat16") == 6000
