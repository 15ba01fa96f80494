"""Garbage collection removes deleted content from the store and keeps everything still in use."""

from __future__ import annotations

import pytest

from catalog.errors import NotFound
from catalog.history import queries
from catalog.lifecycle import recording
from catalog.maintenance import garbage_collection
from catalog.queue import claiming
from catalog.registry import adapters
from catalog.storage import files
from catalog.tables.storage import File
from tests.catalog.world import World, manifest, sha


def checkpointed(world: World) -> claiming.Claim:
    claim = world.running()
    for step in (1, 2):
        name = f"{claim.job.id} {step}"
        recording.record_checkpoint(world.db, claim.claim_id, step=step, artifact=manifest(name))
    return claim


def live(world: World) -> set[str]:
    garbage_collection.drop_references(world.db)
    return garbage_collection.live_digests(world.db)


def test_adapter_files_are_removed_unless_another_adapter_shares_them(world: World) -> None:
    same, twin, alone = (
        world.complete(world.running().claim_id, content).name for content in ("same", "same", "alone")
    )

    for name in (same, alone):
        adapters.delete(world.db, project_id=world.caller.project_id, name=name)

    kept = live(world)
    assert manifest("same").digest in kept
    assert manifest("alone").digest not in kept
    assert adapters.get(world.db, project_id=world.caller.project_id, name=twin).artifact.digest in kept


def test_last_checkpoints_are_removed_a_week_after_the_job_ends(world: World) -> None:
    ended, running = checkpointed(world), checkpointed(world)
    of_ended, of_running = (
        {manifest(f"{claim.job.id} {step}").digest for step in (1, 2)} for claim in (ended, running)
    )
    world.complete(ended.claim_id)

    world.clock.advance(garbage_collection.CHECKPOINT_SECONDS - 60)
    before = live(world)
    world.clock.advance(120)
    after = live(world)

    assert of_ended | of_running <= before
    assert of_running <= after
    assert not of_ended & after
    page = queries.checkpoints_page(world.db, **world.of(ended.job.id))
    assert [(row.step, row.artifact) for row in page.items] == [(2, None), (1, None)]


def test_tokens_are_removed_with_the_last_needed_file_of_that_content(world: World) -> None:
    world.complete(world.running().claim_id)
    needed = world.running(training_file=world.file()).job
    tokens, needed_tokens = (
        manifest(f"tokens {sha(name)}", "tokens").digest for name in (world.file_id, needed.training_file)
    )
    twin, of_another = world.file(), world.file(caller=world.stranger)
    with world.db.write() as session:
        for file_id in (twin, of_another):
            session.get_one(File, file_id).digest = sha(world.file_id)
        session.get_one(File, needed.training_file).deleted_at = world.clock.now

    files.delete(world.db, project_id=world.caller.project_id, file_id=world.file_id)
    with_twin = live(world)
    files.delete(world.db, project_id=world.caller.project_id, file_id=twin)
    without = live(world)

    assert {tokens, needed_tokens} <= with_twin
    assert tokens not in without
    assert needed_tokens in without


def expiring(world: World, *, seconds: float = 3600.0) -> str:
    file_id = world.file()
    with world.db.write() as session:
        file = session.get_one(File, file_id)
        file.expires_at = file.created_at + seconds
    return file_id


def listed(world: World) -> set[str]:
    return {file.id for file in files.list_page(world.db, project_id=world.caller.project_id).items}


def test_expired_file_is_treated_as_deleted(world: World) -> None:
    file_id = expiring(world)
    world.clock.advance(3590)
    assert file_id in listed(world)
    assert files.get(world.db, project_id=world.caller.project_id, file_id=file_id)

    world.clock.advance(20)

    assert file_id not in listed(world)
    with pytest.raises(NotFound):
        files.get(world.db, project_id=world.caller.project_id, file_id=file_id)
    with pytest.raises(NotFound):
        files.delete(world.db, project_id=world.caller.project_id, file_id=file_id)
    with pytest.raises(NotFound, match="has expired") as refused:
        world.submit(training_file=file_id)
    assert refused.value.param == "training_file"
    assert sha(file_id) not in live(world)


def test_expired_file_is_kept_while_an_unfinished_job_reads_it(world: World) -> None:
    training, validation = expiring(world), expiring(world)
    claim = world.running(training_file=training, validation_file=validation)
    world.clock.advance(4000)

    kept = live(world)

    assert {sha(training), sha(validation)} <= kept
    assert {training, validation} <= listed(world)
    with pytest.raises(NotFound):
        world.submit(training_file=training)
    with pytest.raises(NotFound):
        world.submit(validation_file=training)
    world.complete(claim.claim_id)
    assert not {training, validation} & listed(world)
    assert not {sha(training), sha(validation)} & live(world)


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_expired_file_locked_by_a_submission_is_kept(world: World) -> None:
    """The file had not expired when the submission checked it, and the job is committed a moment later."""
    file_id = expiring(world)
    world.clock.advance(4000)
    with world.db.write() as session:
        session.get_one(File, file_id, with_for_update={"read": True})

        garbage_collection.drop_references(world.db)

    with world.db.read() as session:
        assert session.get_one(File, file_id).deleted_at is None
    garbage_collection.drop_references(world.db)
    with world.db.read() as session:
        assert session.get_one(File, file_id).deleted_at is not None
