"""Checkpoints as models: named, stored, continued, deleted, and reported as expired once removed."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
from sqlalchemy import update

from catalog.errors import Conflict, NoLongerKept, NotFound
from catalog.history import queries
from catalog.jobs import commands
from catalog.lifecycle import recording
from catalog.maintenance import garbage_collection
from catalog.queue.claiming import Claim
from catalog.registry import adapters, checkpoints
from catalog.tables.history import Checkpoint
from catalog.tables.jobs import Job
from catalog.tenancy import projects
from tests.catalog.db.interleaving import after_statement
from tests.catalog.world import World, manifest, sha


def exported(name: str) -> recording.Exported:
    record = {"outputs": {"num_parameters": 7}, "config": {"resolved": {"precision": "bfloat16"}}}
    return recording.Exported(artifact=manifest(f"weights {name}"), lineage=record, lineage_id=sha(name))


def save(world: World, claim: Claim, *steps: int) -> list[str]:
    """Record checkpoints at these steps. Returns the names of the job's checkpoints, oldest first."""
    for step in steps:
        name = f"{claim.job.id} {step}"
        files = manifest(name, kind="checkpoint")
        recording.record_checkpoint(world.db, claim.claim_id, step=step, artifact=files, exported=exported(name))
    page = queries.checkpoints_page(world.db, **world.of(claim.job.id))
    return [row.name or "" for row in reversed(page.items)]


def get(world: World, name: str) -> adapters.AdapterView:
    return adapters.get(world.db, project_id=world.caller.project_id, name=name)


def test_checkpoint_is_readable_as_an_adapter_by_name_and_id(world: World) -> None:
    claim = world.running(suffix="docs")
    (name,) = save(world, claim, 5)

    view = get(world, name)

    assert name == f"ft:smol:ours:docs:{claim.job.id[-8:]}:ckpt-step-5"
    assert (view.adapter.num_parameters, view.adapter.job_id) == (7, claim.job.id)
    assert view.artifact.digest == manifest(f"weights {claim.job.id} 5").digest
    assert get(world, view.adapter.id).adapter.name == name
    assert view.adapter.verification["passed"] is None
    with pytest.raises(NotFound) as unknown:
        adapters.get(world.db, project_id=world.stranger.project_id, name=name)
    assert unknown.value.remedy.endswith("if another project shares it with yours, from GET /v1/models.")


def test_checkpoint_becomes_a_model_when_its_weights_arrive(world: World) -> None:
    claim = world.running()
    for step in (1, 2, 3):
        files = manifest(f"c{step}", kind="checkpoint")
        recording.record_checkpoint(world.db, claim.claim_id, step=step, artifact=files)

    for step in (1, 3, 4):
        recording.record_checkpoint_model(world.db, claim.claim_id, step=step, exported=exported(f"{step}"))

    page = queries.checkpoints_page(world.db, **world.of(claim.job.id))
    usable = {row.step: row.adapter for row in page.items}
    assert usable == {1: None, 2: None, 3: manifest("weights 3").digest}
    assert get(world, page.items[0].name or "").adapter.num_parameters == 7


def test_checkpoint_keeps_its_name_after_job_end_and_project_rename(world: World) -> None:
    claim = world.running()
    (name,) = save(world, claim, 5)

    world.complete(claim.claim_id)
    operator = replace(world.caller, is_operator=True)
    projects.rename(world.db, caller=operator, project="ours", name="renamed")

    assert get(world, name).adapter.name == name
    kept = adapters.list_checkpoint_models(world.db, project_id=world.caller.project_id)
    assert [model.name for model in kept.items] == [name]


def test_only_the_newest_two_checkpoints_are_kept_and_others_expire(world: World) -> None:
    claim = world.running()
    first, *newest = save(world, claim, 1, 2, 3)

    with pytest.raises(NoLongerKept, match=f"{first}' have been deleted") as gone:
        get(world, first)

    assert gone.value.code == "checkpoint_expired"
    assert "seven days" in gone.value.remedy
    assert f"`lorry jobs checkpoints {claim.job.id}`" in gone.value.remedy
    assert [get(world, name).adapter.name for name in newest] == newest
    garbage_collection.drop_references(world.db)
    live = garbage_collection.live_digests(world.db)
    assert manifest(f"weights {claim.job.id} 1").digest not in live
    assert manifest(f"weights {claim.job.id} 2").digest in live
    with pytest.raises(NotFound):  # another project does not learn that it existed
        adapters.get(world.db, project_id=world.stranger.project_id, name=first)


@pytest.mark.both_databases
def test_checkpoint_that_expires_while_it_is_read_is_returned(world: World) -> None:
    claim = world.running()
    first, *_ = save(world, claim, 1, 2)
    after_statement(world.db, "FROM checkpoints", lambda: save(world, claim, 3))

    assert get(world, first).artifact.digest == manifest(f"weights {claim.job.id} 1").digest

    with pytest.raises(NoLongerKept):
        get(world, first)


def test_checkpoints_expire_a_week_after_their_job_ends(world: World) -> None:
    claim = world.running()
    (name,) = save(world, claim, 5)
    world.complete(claim.claim_id)

    world.clock.advance(garbage_collection.CHECKPOINT_SECONDS - 60)
    garbage_collection.drop_references(world.db)
    assert get(world, name).adapter.name == name
    world.clock.advance(120)
    garbage_collection.drop_references(world.db)

    with pytest.raises(NoLongerKept):
        get(world, name)
    with pytest.raises(NoLongerKept):
        world.submit(model=name)
    assert adapters.list_checkpoint_models(world.db, project_id=world.caller.project_id).items == []


def test_job_that_starts_from_a_checkpoint_keeps_it_until_it_ends(world: World) -> None:
    claim = world.running()
    first, _ = save(world, claim, 1, 2)
    digest = manifest(f"weights {claim.job.id} 1").digest

    child = world.submit(model=first)
    save(world, claim, 3)
    garbage_collection.drop_references(world.db)

    assert (child.base_model, child.spec["parent"]["name"], child.spec["parent"]["artifact"]) == ("smol", first, digest)
    assert child.spec["parent"]["lineage"] == sha(f"{claim.job.id} 1")
    assert digest in garbage_collection.live_digests(world.db)
    with pytest.raises(Conflict, match=f"in use by job {child.id}, which"):
        adapters.delete(world.db, project_id=world.caller.project_id, name=first)
    commands.cancel(world.db, **world.of(child.id))
    garbage_collection.drop_references(world.db)
    assert digest not in garbage_collection.live_digests(world.db)


@pytest.mark.parametrize(
    ("owners", "users", "remedy"),
    [
        ("o", "job a, which has not", "Wait until job a finishes, or cancel it, then delete the adapter."),
        ("x", "a job in another project, which has not", "Wait until that job finishes, then delete the adapter."),
        ("xx", "jobs in other projects, which have not", "Wait until those jobs finish, then delete the adapter."),
        (
            "ox",
            "job a and a job in another project, which have not",
            "Wait until all of them finish, then delete the adapter. You can cancel only jobs of your own project.",
        ),
        (
            "oooo",
            "job a, job b, job c and others, which have not",
            "Wait until all of them finish, or cancel them, then delete the adapter.",
        ),
    ],
)
def test_refused_deletion_of_a_model_names_only_jobs_of_its_project(owners: str, users: str, remedy: str) -> None:
    children = [Job(id=ident, project_id=owner) for ident, owner in zip("abcd", owners, strict=False)]

    error = checkpoints.in_use("adapter", "m", children, "o", param="adapter")

    assert (error.message, error.remedy) == (f"The adapter 'm' is in use by {users} finished.", remedy)


def test_deleted_checkpoint_model_is_gone_but_its_job_still_resumes(world: World) -> None:
    claim = world.running()
    (name,) = save(world, claim, 5)
    delete = partial(adapters.delete, world.db, project_id=world.caller.project_id, name=name)

    delete()

    with pytest.raises(NoLongerKept):
        get(world, name)
    with pytest.raises(NoLongerKept):
        delete()
    assert delete(is_client_retry=True).name == name
    (row,) = queries.checkpoints_page(world.db, **world.of(claim.job.id)).items
    assert row.artifact is not None


def test_checkpoint_names_are_unique_across_jobs_with_similar_ids(world: World) -> None:
    other, claim = world.running(), world.running()
    save(world, other, 5)
    taken = f"ft:smol:ours::{claim.job.id[-8:]}:ckpt-step-5"
    with world.db.write() as session:
        session.execute(update(Checkpoint).where(Checkpoint.job_id == other.job.id).values(name=taken))

    (name,) = save(world, claim, 5)

    assert name != taken
    assert get(world, name).adapter.job_id == claim.job.id
    assert get(world, taken).adapter.job_id == other.job.id
