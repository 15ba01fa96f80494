"""The inference state of a model: loaded, loadable or unavailable."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import select, update

from catalog.fleet import cordons, gangs
from catalog.inference.requests import inference_states
from catalog.lifecycle import recording
from catalog.registry import adapters, base_models
from catalog.resources.pack_key import pack_key
from catalog.tables.serving import Deployment, ServingEndpoint
from catalog.tables.storage import Adapter, BaseModelRow
from tests.catalog.world import World, manifest, sha


@pytest.fixture
def names(world: World) -> list[str]:
    """A base model, an adapter trained in float32, and a checkpoint of a running job in bfloat16. Worker w1 runs."""
    world.worker()
    done = world.running(precision="float32")
    world.complete(done.claim_id)
    running = world.running(precision="bfloat16")
    files = manifest("c1", kind="checkpoint")
    weights = recording.Exported(artifact=manifest("weights"), lineage={}, lineage_id=sha("lineage"))
    recording.record_checkpoint(world.db, running.claim_id, step=1, artifact=files, exported=weights)
    (checkpoint,) = adapters.list_checkpoint_models(world.db, project_id=world.caller.project_id).items
    adapter = world.job(done.job.id).adapter_name
    assert adapter is not None
    return ["smol", adapter, checkpoint.name]


def states(world: World, names: list[str]) -> list[str]:
    found = inference_states(world.db, names)
    return [found[name] for name in names]


def test_models_are_loadable_while_a_worker_runs(world: World, names: list[str]) -> None:
    assert states(world, names) == ["loadable"] * 3
    assert states(world, ["unknown"]) == ["unavailable"]

    world.clock.advance(3600)

    assert states(world, names) == ["unavailable"] * 3


def test_workers_of_a_gang_load_no_base_model_for_requests(world: World, names: list[str]) -> None:
    place = gangs.GangMember(db=world.db, worker_id="w1", gang="pair", silent_seconds=60.0)
    gangs.enter(place, size=2, min_size=2, kind="cpu", num_processes=1, versions="1", free_bytes=1 << 30)

    assert states(world, names) == ["unavailable"] * 3

    world.load(pack_key(sha("smol"), "float32"))

    assert states(world, names) == ["loaded", "loaded", "unavailable"]


@pytest.mark.parametrize(
    ("precision", "quantization", "expected"),
    [
        ("float32", "none", ["loaded", "loaded", "loadable"]),
        ("bfloat16", "none", ["loaded", "loadable", "loaded"]),
        ("bfloat16", "nf4", ["loadable", "loadable", "loadable"]),
    ],
)
def test_model_is_loaded_if_a_trainer_has_its_base_model_in_its_precision(
    world: World, names: list[str], precision: str, quantization: str, expected: list[str]
) -> None:
    world.load(pack_key(sha("smol"), precision, quantization))

    assert states(world, names) == expected


def test_cordoned_worker_does_not_count(world: World, names: list[str]) -> None:
    world.load(pack_key(sha("smol"), "float32"))

    cordons.cordon(world.db, "w1")

    assert states(world, names) == ["unavailable"] * 3


def test_model_on_a_deleted_or_replaced_base_model_is_unavailable(world: World, names: list[str]) -> None:
    with world.db.write() as session:
        session.get_one(BaseModelRow, "smol").digest = sha("other")

    assert states(world, names) == ["loadable", "unavailable", "unavailable"]


def serve(world: World, adapter: str) -> None:
    """Register a ready endpoint for the base model, with the adapter deployed."""
    with world.db.write() as session:
        endpoint = ServingEndpoint(
            id="endpoint-1",
            name="vllm",
            kind="vllm",
            project_id=world.caller.project_id,
            base_model="smol",
            base_digest=sha("smol"),
            url="http://vllm:8000",
            adapter_folder="/adapters",
            max_rank=16,
            state="ready",
            created_at=world.clock.now,
        )
        session.add(endpoint)
        session.flush()
        row = session.scalars(select(Adapter).where(Adapter.name == adapter)).one()
        deployment = Deployment(
            id="deployment-1",
            endpoint_id=endpoint.id,
            adapter_id=row.id,
            state="ready",
            project_id=world.caller.project_id,
            num_failures=0,
            next_try_at=0,
            created_at=world.clock.now,
            updated_at=world.clock.now,
        )
        session.add(deployment)


def test_serving_endpoint_answers_with_its_models_without_a_worker(world: World, names: list[str]) -> None:
    serve(world, names[1])
    world.clock.advance(3600)

    assert states(world, names) == ["loaded", "loaded", "unavailable"]


@pytest.mark.parametrize(
    ("row", "change", "expected"),
    [
        (Deployment, {"state": "pending"}, ["loaded", "unavailable"]),
        (ServingEndpoint, {"state": "unreachable"}, ["unavailable"] * 2),
        (ServingEndpoint, {"deleted_at": 1.0}, ["unavailable"] * 2),
        (ServingEndpoint, {"base_digest": sha("other")}, ["unavailable"] * 2),
        (BaseModelRow, {"digest": sha("other")}, ["unavailable"] * 2),
    ],
)
def test_endpoint_that_would_get_no_request_does_not_count(
    world: World, names: list[str], row: type[Any], change: dict[str, Any], expected: list[str]
) -> None:
    serve(world, names[1])
    world.clock.advance(3600)

    with world.db.write() as session:
        session.execute(update(row).values(change))

    assert states(world, names[:2]) == expected


def test_base_model_that_is_being_imported_is_unavailable(world: World) -> None:
    world.worker()
    base_models.add(world.db, name="new", kind="folder", source="/models/new")

    assert states(world, ["new"]) == ["unavailable"]
