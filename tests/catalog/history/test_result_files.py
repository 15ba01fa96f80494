"""A succeeded job stores its curves as a file with OpenAI's columns; other jobs store none."""

from __future__ import annotations

from pathlib import Path

import pytest
from sqlalchemy import select

from catalog.errors import NotFound, StaleClaim
from catalog.history import metric_store, result_files
from catalog.lifecycle import recording
from catalog.maintenance import garbage_collection
from catalog.storage import files
from catalog.tables.storage import File
from tests.catalog.world import World, curves

HEAD = "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy"


def written(world: World, job_id: str) -> list[str]:
    lines = result_files.lines(world.db, job_id)
    return [",".join("" if cell is None else str(cell) for cell in line) for line in lines]


def result_rows(world: World) -> list[File]:
    with world.db.read() as session:
        return list(session.scalars(select(File).where(File.purpose == result_files.PURPOSE)))


@pytest.mark.parametrize(("points_a_block", "blocks_a_look"), [(1, 1), (2, 1), (256, 64)])
def test_curves_are_merged_by_step_for_any_block_size(
    world: World, points_a_block: int, blocks_a_look: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim, other = world.running(), world.running(seed=2)
    monkeypatch.setattr(metric_store, "BLOCK_POINTS", points_a_block)
    monkeypatch.setattr(metric_store, "BLOCKS_A_LOOK", blocks_a_look)
    valid = [{"kind": "valid", "step": step, "loss": 4.0 - step, "token_accuracy": 0.25} for step in (0, 3)]
    train = [{"kind": "train", "step": step, "loss": 3.0 / step, "token_accuracy": None} for step in (3, 1, 2)]
    recording.record_metrics(world.db, claim.claim_id, [*valid, *train])
    recording.record_metrics(world.db, other.claim_id, [{"kind": "train", "step": 7, "loss": 9.0}])

    assert written(world, claim.job.id) == ["0,,,4.0,0.25", "1,3.0,,,", "2,1.5,,,", "3,1.0,,1.0,0.25"]


def test_result_file_belongs_to_the_project_and_can_be_deleted(world: World) -> None:
    claim = world.running()
    assert world.job(claim.job.id).result_file is None

    world.complete(claim.claim_id)

    ours, theirs = world.caller.project_id, world.stranger.project_id
    (file,) = files.list_page(world.db, project_id=ours, purpose=result_files.PURPOSE).items
    content = curves(f"curves of {claim.claim_id}")
    assert world.job(claim.job.id).result_file == file.id
    assert (file.filename, file.num_rows, file.kind) == ("step_metrics.csv", None, None)
    assert (file.digest, file.num_bytes) == (content.digest, content.num_bytes)
    assert files.list_page(world.db, project_id=theirs, purpose=result_files.PURPOSE).items == []
    assert content.digest in garbage_collection.live_digests(world.db)
    files.delete(world.db, project_id=ours, file_id=file.id)
    with pytest.raises(NotFound):
        files.get(world.db, project_id=ours, file_id=file.id)
    assert content.digest not in garbage_collection.live_digests(world.db)


def test_worker_with_a_stale_claim_leaves_no_result_file(world: World) -> None:
    claim = world.running()
    world.complete(claim.claim_id)

    with pytest.raises(StaleClaim):
        world.complete(claim.claim_id, "again")

    assert len(result_rows(world)) == 1


def test_result_file_starts_with_openai_columns(world: World, tmp_path: Path) -> None:
    claim = world.running()
    recording.record_metrics(world.db, claim.claim_id, [{"kind": "train", "step": 1, "loss": 0.1 + 0.2}])
    path = tmp_path / result_files.NAME

    result_files.write(world.db, claim.job.id, path)

    assert path.read_bytes() == f"{HEAD}\n1,0.30000000000000004,,,\n".encode()
