"""Packed metric points are restored bit for bit, and curves stored in blocks lose nothing."""

from __future__ import annotations

import math
import random
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from catalog.history import metric_store, queries
from catalog.history.metric_points import Point, pack, unpack
from catalog.lifecycle.recording import record_metrics
from catalog.queue import claims
from catalog.states import EndReason
from catalog.tables.history import MetricBlock
from tests.catalog.db.test_query_plans import listening
from tests.catalog.world import World

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
