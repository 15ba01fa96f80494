"""Stores a job's curves in blocks of points. Blocks are read and written within the caller's transaction.

The last block of a curve is open: new points are appended to it. A full block changes only if steps are trained again.
It also stores two thinned versions of its points, so that a long curve can be drawn without reading all of them. The
writer holds the lock of the job's row.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from sqlalchemy import ColumnElement, LargeBinary, Select, delete, func, or_, select
from sqlalchemy.orm import InstrumentedAttribute, Session

from catalog.db.database import upsert
from catalog.history.metric_points import Point, pack, thin, unpack
from catalog.tables.history import MetricBlock

BLOCK_POINTS = 256
OUTLINE_POINTS, SKETCH_POINTS = 32, 8
BLOCKS_A_LOOK = 64
"""Number of blocks to read and unpack at once while iterating over a whole curve."""


def put(session: Session, job_id: str, kind: str, points: Sequence[Point]) -> None:
    """Store points of one curve, sorted by step. The point of an existing step is overwritten."""
    if not points:
        return
    old = _blocks_to_change(session, job_id, kind, points)
    by_step = {point.step: point for block in old for point in unpack(kind, block.points)}
    by_step |= {point.step: point for point in points}
    merged = [by_step[step] for step in sorted(by_step)]
    rows = [_row(job_id, kind, merged[i : i + BLOCK_POINTS]) for i in range(0, len(merged), BLOCK_POINTS)]
    gone = {block.first_step for block in old} - {row["first_step"] for row in rows}
    if gone:
        session.execute(delete(MetricBlock).where(*_conditions(job_id, kind), MetricBlock.first_step.in_(gone)))
    upsert(session, MetricBlock, rows)


def walk(session: Session, job_id: str, kind: str) -> Iterator[Point]:
    """Yield every point, ordered by step."""
    last_step = -1
    while points := some(session, job_id, kind, after_step=last_step):
        yield from points
        last_step = points[-1].step


def some(session: Session, job_id: str, kind: str, *, after_step: int) -> list[Point]:
    """Return the points of the next blocks after a step; [] at the end. This bounds memory use for long jobs."""
    later = _packed(job_id, kind).where(MetricBlock.last_step > after_step).limit(BLOCKS_A_LOOK)
    found = (point for block in session.execute(later).all() for point in unpack(kind, block.points))
    return [point for point in found if point.step > after_step]


def thinned(session: Session, job_id: str, kind: str, max_points: int) -> list[Point]:
    """Return at most `max_points` points, including the first, the last and the peaks.

    For a long curve, only the thinned versions of the blocks are read.
    """
    counted = select(func.count(), func.sum(MetricBlock.num_points)).where(*_conditions(job_id, kind))
    num_blocks, num_points = session.execute(counted).one()
    if num_blocks == 0:
        return []
    column = _coarsest(num_blocks, num_points, max_points)
    shown = select(column).where(*_conditions(job_id, kind)).order_by(MetricBlock.first_step)
    points = [point for packed in session.scalars(shown) for point in unpack(kind, packed)]
    return thin(points, max_points, value=lambda point: point.loss)


def at(session: Session, job_id: str, kind: str, steps: Collection[int]) -> dict[int, Point]:
    """Return points by step. Steps without a measurement are omitted. Reads only the blocks that contain the steps."""
    found: dict[int, Point] = {}
    for batch in _batches(sorted(set(steps))):
        covered = or_(*((MetricBlock.first_step <= step) & (MetricBlock.last_step >= step) for step in batch))
        for block in session.execute(_packed(job_id, kind).where(covered)):
            found |= {point.step: point for point in unpack(kind, block.points) if point.step in batch}
    return found


def first(session: Session, job_id: str, kind: str) -> Point | None:
    packed = session.execute(_packed(job_id, kind).limit(1)).first()
    return None if packed is None else unpack(kind, packed.points)[0]


def least_loss(session: Session, job_id: str, kind: str) -> float | None:
    return session.scalar(select(func.min(MetricBlock.least_loss)).where(*_conditions(job_id, kind)))


def written(session: Session, after: Mapping[str, int]) -> list[tuple[str, Point]]:
    """Return (job id, point) for the points that were written with events after each job's number."""
    found: list[tuple[str, Point]] = []
    for batch in _batches(list(after.items())):
        newer = or_(*((MetricBlock.job_id == job_id) & (MetricBlock.last_seq > seq) for job_id, seq in batch))
        for block in session.execute(select(MetricBlock.job_id, MetricBlock.kind, MetricBlock.points).where(newer)):
            points = unpack(block.kind, block.points)
            found += [(block.job_id, point) for point in points if point.seq > after[block.job_id]]
    return found


def _blocks_to_change(session: Session, job_id: str, kind: str, points: Sequence[Point]) -> list[Any]:
    """Return the open block if the points follow it; else all blocks that overlap the range of their steps."""
    first_step, last_step = points[0].step, points[-1].step
    columns = (MetricBlock.first_step, MetricBlock.last_step, MetricBlock.num_points, MetricBlock.points)
    of_curve = select(*columns).where(*_conditions(job_id, kind))
    newest = session.execute(of_curve.order_by(MetricBlock.first_step.desc()).limit(1)).first()
    if newest is None:
        return []
    if first_step > newest.last_step:
        return [newest] if newest.num_points < BLOCK_POINTS else []
    between = of_curve.where(MetricBlock.last_step >= first_step, MetricBlock.first_step <= last_step)
    return list(session.execute(between.order_by(MetricBlock.first_step)))


def _row(job_id: str, kind: str, points: Sequence[Point]) -> dict[str, Any]:
    is_full = len(points) == BLOCK_POINTS
    return {
        "job_id": job_id,
        "kind": kind,
        "first_step": points[0].step,
        "last_step": points[-1].step,
        "num_points": len(points),
        "last_seq": max(point.seq for point in points),
        "least_loss": min(point.loss for point in points),
        "sketch": _thinned_points(points, SKETCH_POINTS) if is_full else None,
        "outline": _thinned_points(points, OUTLINE_POINTS) if is_full else None,
        "points": pack(points),
    }


def _thinned_points(points: Sequence[Point], num_points: int) -> bytes:
    return pack(thin(points, num_points, value=lambda point: point.loss))


def _coarsest(num_blocks: int, num_points: int, max_points: int) -> ColumnElement[bytes]:
    """Return the column with the most thinned version of the blocks that still has enough points."""
    versions: tuple[tuple[int, InstrumentedAttribute[Any]], ...] = (
        (SKETCH_POINTS, MetricBlock.sketch),
        (OUTLINE_POINTS, MetricBlock.outline),
    )
    for num_kept, version in versions:
        if num_blocks * num_kept >= min(max_points, num_points):
            return func.coalesce(version, MetricBlock.points, type_=LargeBinary())
    return MetricBlock.points.expression


def _conditions(job_id: str, kind: str) -> tuple[ColumnElement[bool], ColumnElement[bool]]:
    return (MetricBlock.job_id == job_id, MetricBlock.kind == kind)


def _packed(job_id: str, kind: str) -> Select[int, bytes]:
    """Select the last step and the points of each block, ordered by step."""
    packed = select(MetricBlock.last_step, MetricBlock.points)
    return packed.where(*_conditions(job_id, kind)).order_by(MetricBlock.first_step)


def _batches(items: Sequence[Any]) -> Iterator[Sequence[Any]]:
    """Split the items into parts of at most 50, the maximum for one query."""
    return (items[i : i + 50] for i in range(0, len(items), 50))
