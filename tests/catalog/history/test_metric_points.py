"""Metric points are restored bit for bit, curves in blocks lose nothing, and succeeded jobs store them as a file."""

from __future__ import annotations

import math
import random
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import select

from catalog.errors import NotFound, StaleClaim
from catalog.history import metric_store, queries, result_files
from catalog.history.metric_points import Point, pack, thin, unpack
from catalog.lifecycle import recording
from catalog.lifecycle.recording import record_metrics
from catalog.maintenance import garbage_collection
from catalog.queue import claims
from catalog.states import EndReason
from catalog.storage import files
from catalog.tables.history import MetricBlock
from catalog.tables.storage import File
from tests.catalog.db.test_query_plans import listening
from tests.catalog.world import World, curves

WHOLE = st.integers(-(2**62), 2**62 - 1)
REAL = st.floats(allow_nan=False, allow_infinity=False)
POINTS = st.builds(
    Point,
    kind=st.just("train"),
    step=WHOLE,
    seq=WHOLE,
    created_at=REAL,
    loss=REAL,
    token_accuracy=st.none() | REAL,
    learning_rate=st.none() | REAL,
    grad_norm=st.none() | REAL,
    num_tokens=st.none() | WHOLE,
    rewards=st.none() | st.dictionaries(st.sampled_from(["chosen", "margin"]), REAL | st.integers(-9, 9)),
)


@given(st.lists(POINTS, min_size=1, max_size=9))
def test_packed_points_are_restored_bit_for_bit(points: list[Point]) -> None:
    again = unpack("train", pack(points))

    assert repr(again) == repr(points)  # repr distinguishes 0.0 from -0.0 and 1 from 1.0


def of_steps(*steps: int, loss: float = 1.0, kind: str = "train") -> list[dict[str, object]]:
    return [{"kind": kind, "step": step, "loss": loss, "learning_rate": 1 / (step + 1)} for step in steps]


def curve(world: World, job_id: str, max_points: int | None = None) -> list[tuple[int, float]]:
    points = queries.metrics(world.db, **world.of(job_id), kind="train", max_points=max_points)
    return [(point.step, point.loss) for point in points]


def test_curve_is_complete_after_any_sequence_of_writes_and_replays(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metric_store, "BLOCK_POINTS", 4)
    monkeypatch.setattr(metric_store, "BLOCKS_A_LOOK", 2)
    claim = world.running()
    randomly, expected = random.Random(7), dict[int, float]()

    step = 0
    for number in range(60):
        first = max(1, step + 1 - randomly.choice([0, 0, 0, 1, 9]))
        step = first + randomly.randrange(6)
        loss = float(number)
        record_metrics(world.db, claim.claim_id, of_steps(*range(first, step + 1), loss=loss))
        expected |= dict.fromkeys(range(first, step + 1), loss)

    assert curve(world, claim.job.id) == sorted(expected.items())
    some = [1, 2, step, step + 5]
    found = queries.points_at(world.db, **world.of(claim.job.id), steps=some)
    assert {point.step: point.loss for point in found.values()} == {at: expected[at] for at in some if at in expected}
    assert queries.first_step(world.db, **world.of(claim.job.id)) == (1, expected[1])
    with world.db.read() as session:
        rows = session.query(MetricBlock).order_by(MetricBlock.first_step).all()
        assert metric_store.least_loss(session, claim.job.id, "train") == min(expected.values())
    assert sum(row.num_points for row in rows) == len(expected)
    assert all(row.num_points <= 4 and (row.sketch is not None) == (row.num_points == 4) for row in rows)
    assert all(before.last_step < after.first_step for before, after in pairwise(rows))


def test_replayed_steps_replace_earlier_points(world: World) -> None:
    claim = world.running()
    record_metrics(world.db, claim.claim_id, of_steps(*range(1, 300), loss=3.0))
    world.worker()
    claims.end(world.db, claim.claim_id, reason=EndReason.DRAINED, detail="")
    (again,) = world.claim()
    record_metrics(world.db, again.claim_id, of_steps(*range(200, 303), loss=2.0))

    assert curve(world, claim.job.id) == [(step, 3.0 if step < 200 else 2.0) for step in range(1, 303)]


def test_long_curve_is_drawn_from_block_sketches_and_keeps_peaks(world: World) -> None:
    claim = world.running()
    peaks = {1: 4.0, 5_000: 99.0, 7_777: -5.0, 20_000: 2.5}
    losses = {step: peaks.get(step, 2 + math.sin(step / 50)) for step in range(1, 20_001)}
    for first in range(1, 20_001, 1000):
        points = [{"kind": "train", "step": step, "loss": losses[step]} for step in range(first, first + 1000)]
        record_metrics(world.db, claim.claim_id, points)

    for max_points in (50, 300, 2000, 30_000):
        with listening(world.db) as statements:
            drawn = curve(world, claim.job.id, max_points=max_points)
        assert len(drawn) <= max_points
        assert set(peaks.items()) <= set(drawn)
        assert all(losses[step] == loss for step, loss in drawn)
        assert drawn == sorted(drawn)
        assert any("coalesce(metric_blocks." in statement for statement, _ in statements) == (max_points < 30_000)
    assert len(drawn) == 20_000


def test_missing_curve_has_no_points(world: World) -> None:
    job = world.submit()

    assert curve(world, job.id) == curve(world, job.id, max_points=10) == []
    assert queries.first_step(world.db, **world.of(job.id)) is None


@given(st.lists(st.floats(-10, 10), max_size=300), st.integers(1, 60))
def test_thinned_curve_is_short_and_keeps_ends_peaks_and_order(values: list[float], max_points: int) -> None:
    points = list(enumerate(values))

    kept = thin(points, max_points, value=lambda point: point[1])

    assert len(kept) <= max(4, max_points)
    assert kept == sorted(set(kept))
    if points:
        assert (kept[0], kept[-1]) == (points[0], points[-1])
        assert min(value for _, value in kept) == min(values)
        assert max(value for _, value in kept) == max(values)


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
