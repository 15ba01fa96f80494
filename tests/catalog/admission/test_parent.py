"""Jobs that continue an adapter: access to the parent, its base model, and the inherited settings."""

from __future__ import annotations

import math
from typing import Any

import pytest

from catalog.admission.parent import exported_shape
from catalog.errors import Conflict, InvalidRequest, NotFound
from catalog.jobs import commands
from catalog.registry import adapters, base_models
from catalog.resources.memory import BaseModelMemory, JobMemory
from catalog.spec.job import JobSpec
from catalog.spec.lora import LoraRequest, resolve_lora
from catalog.tables.fleet import SILENT_SECONDS
from catalog.tables.jobs import Job
from catalog.tables.storage import Adapter
from tests.catalog.world import DESCRIPTION, World, sha

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
def test_omitted_fields_are_inherited_from_the_parent(world: World, parent: Adapter, name_of: str) -> None:
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


def test_model_may_name_an_adapter_as_in_the_openai_api(world: World, parent: Adapter) -> None:
    job = submitted(world, model=parent.name)

    assert (job.base_model, job.parent_adapter) == (BASE, parent.id)
    assert job.requested["model"] == parent.name
    assert submitted(world, model=parent.name, parent_adapter=parent.id, seed=5).parent_adapter == parent.id


def test_two_different_parents_are_rejected(world: World, parent: Adapter) -> None:
    other = trained(world, "other", model=BASE, seed=9)

    with pytest.raises(InvalidRequest, match="A job can continue only one") as refused:
        submitted(world, model=parent.name, parent_adapter=other.id)

    assert refused.value.code == "conflicting_value"


def test_repeated_parent_settings_must_match_the_parent(world: World, parent: Adapter) -> None:
    again = {**SHAPE, "target_modules": ["q_proj", "v_proj"], "alpha": "auto"}
    assert spec_of(submitted(world, parent_adapter=parent.id, lora=again)).lora.alpha == 12

    for name, value in {"rank": 8, "alpha": 8, "use_dora": True, "target_modules": "all-linear"}.items():
        with pytest.raises(InvalidRequest, match=f"but parent adapter '{parent.name}' has") as refused:
            submitted(world, parent_adapter=parent.id, lora={name: value})
        assert (refused.value.code, refused.value.param) == ("differs_from_parent", f"lora.{name}")
    with pytest.raises(InvalidRequest, match=f"starts from the weights of parent adapter '{parent.name}'"):
        submitted(world, parent_adapter=parent.id, lora={"init_lora_weights": "pissa"})
    with pytest.raises(InvalidRequest, match=f"quantization is 'nf4', but parent adapter '{parent.name}' has 'none'"):
        submitted(world, parent_adapter=parent.id, quantization="nf4")


@pytest.mark.parametrize("use_rslora", [False, True])
def test_continuing_a_pissa_adapter_uses_a_plain_adapter_of_twice_the_rank(use_rslora: bool) -> None:
    requested = LoraRequest(rank=4, alpha=8, rank_pattern={"q": 2}, alpha_pattern={"q": 3}, use_rslora=use_rslora)
    pissa = resolve_lora(requested.model_copy(update={"init_lora_weights": "pissa"}))

    plain, times = exported_shape(pissa), math.sqrt(2) if use_rslora else 2

    assert (plain.rank, plain.rank_pattern, plain.init_lora_weights) == (8, {"q": 4}, "default")
    assert (plain.alpha, plain.alpha_pattern) == (times * 8, {"q": times * 3})


def test_child_must_use_the_base_model_of_its_parent(world: World, parent: Adapter) -> None:
    world.base("other")

    with pytest.raises(InvalidRequest, match="trained on base model 'pathed', not on 'other'") as refused:
        submitted(world, model="other", parent_adapter=parent.id)

    assert (refused.value.code, refused.value.param) == ("differs_from_parent", "parent_adapter")
    assert refused.value.remedy == (
        "Set 'model' to 'pathed', or 'parent_adapter' to an adapter that was trained on 'other'."
    )


def test_error_for_another_import_of_the_base_model_names_the_digests_and_the_field(
    world: World, parent: Adapter
) -> None:
    base_models.delete(world.db, BASE)
    base_models.add(world.db, name=BASE, kind="folder", source="/models/new", revision=None)
    world.finish_import(BASE, digest=sha("another"), description=DESCRIPTION)

    for field, fields in (("model", {"model": parent.name}), ("parent_adapter", {"parent_adapter": parent.id})):
        with pytest.raises(InvalidRequest) as refused:
            submitted(world, **fields)
        assert (refused.value.code, refused.value.param) == ("differs_from_parent", field)
        assert f"was {parent.base_digest}. The current digest is {sha('another')}." in refused.value.message


def test_remedy_for_an_unavailable_inherited_quantization_names_the_parent(world: World) -> None:
    world.worker(quantizations=("nf4",))
    made = world.complete(world.running(quantization="nf4").claim_id, "quantized")
    world.clock.advance(SILENT_SECONDS + 1)
    world.worker("plain")

    with pytest.raises(InvalidRequest) as refused:
        world.submit(parent_adapter=made.name)

    assert refused.value.code == "quantization_unavailable"
    assert refused.value.remedy.endswith(
        f"Or train without parent adapter '{made.name}', from which the job inherits it."
    )


def test_adapter_with_an_unfinished_child_job_cannot_be_deleted(world: World, parent: Adapter) -> None:
    child = submitted(world, parent_adapter=parent.id)
    named: dict[str, Any] = {"project_id": world.caller.project_id, "name": parent.name}

    with pytest.raises(Conflict, match=child.id) as refused:
        adapters.delete(world.db, **named)
    assert refused.value.code == "in_use"

    other = submitted(world, parent_adapter=parent.id)
    with pytest.raises(Conflict, match=f"job {child.id} and job {other.id}, which have not finished") as refused:
        adapters.delete(world.db, **named)
    assert refused.value.remedy == "Wait until all of them finish, or cancel them, then delete the adapter."

    for job in (child, other):
        commands.cancel(world.db, project_id=world.caller.project_id, job_id=job.id)
    adapters.delete(world.db, **named)
    with pytest.raises(NotFound):
        submitted(world, parent_adapter=parent.id)


def test_kept_parent_weights_add_to_the_memory_of_a_job() -> None:
    def taken(precision: str, *, keeps_parent: bool = False) -> int:
        facts = JobMemory(num_parameters=1000, keeps_parent=keeps_parent)
        return sum(facts.parts(BaseModelMemory(DESCRIPTION, precision)).values())

    assert taken("float32", keeps_parent=True) - taken("float32") == 4000
    assert taken("bfloat16", keeps_parent=True) - taken("bfloat16") == 6000
