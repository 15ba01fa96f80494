"""What is deleted leaves the store, and what somebody still needs stays."""

from __future__ import annotations

from catalog import adapters, claims, files, jobs, sweep
from catalog.tables import File
from tests.catalog.world import World, manifest, sha


def checkpointed(world: World) -> claims.Claim:
    claim = world.running()
    for step in (1, 2):
        name = f"{claim.job.id} {step}"
        claims.record_checkpoint(world.db, claim.claim_id, step=step, artifact=manifest(name))
    return claim


def live(world: World) -> set[str]:
    sweep.let_go(world.db)
    return sweep.live_digests(world.db)


def test_a_deleted_adapters_files_go_unless_another_adapter_has_the_same(world: World) -> None:
    same, twin, alone = (
        world.complete(world.running().claim_id, content).name for content in ("same", "same", "alone")
    )

    for name in (same, alone):
        adapters.delete(world.db, project_id=world.caller.project_id, name=name)

    kept = live(world)
    assert manifest("same").digest in kept
    assert manifest("alone").digest not in kept
    assert adapters.get(world.db, project_id=world.caller.project_id, name=twin).artifact.digest in kept


def test_the_last_checkpoints_of_a_job_go_a_week_after_its_end(world: World) -> None:
    ended, running = checkpointed(world), checkpointed(world)
    of_ended, of_running = (
        {manifest(f"{claim.job.id} {step}").digest for step in (1, 2)} for claim in (ended, running)
    )
    world.complete(ended.claim_id)

    world.clock.turn(sweep.CHECKPOINT_SECONDS - 60)
    before = live(world)
    world.clock.turn(120)
    after = live(world)

    assert of_ended | of_running <= before
    assert of_running <= after
    assert not of_ended & after
    page = jobs.checkpoints_page(world.db, **world.of(ended.job.id))
    assert [(row.step, row.artifact) for row in page.items] == [(2, None), (1, None)]


def test_tokens_go_with_the_last_file_of_their_content_that_somebody_needs(world: World) -> None:
    world.complete(world.running().claim_id)
    needed = world.running(training_file=world.file()).job
    tokens, needed_tokens = (
        manifest(f"tokens {sha(name)}", "tokens").digest for name in (world.file_id, needed.training_file)
    )
    twin = world.file(caller=world.stranger)
    with world.db.write() as session:
        session.get_one(File, twin).digest = sha(world.file_id)
        session.get_one(File, needed.training_file).deleted_at = world.clock.now

    files.delete(world.db, project_id=world.caller.project_id, file_id=world.file_id)
    with_twin = live(world)
    files.delete(world.db, project_id=world.stranger.project_id, file_id=twin)
    without = live(world)

    assert {tokens, needed_tokens} <= with_twin
    assert tokens not in without
    assert needed_tokens in without
