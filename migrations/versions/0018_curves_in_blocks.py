"""Curves are kept in blocks of points. Points of before are packed into blocks, and unpacked again on the way down.

The packing is that of catalog/history/metric_points.py at this revision. Older points have no event number.
"""

from __future__ import annotations

import json
import math
import struct
import zlib
from collections.abc import Iterator, Sequence
from itertools import accumulate, groupby, islice, pairwise
from typing import Any

import sqlalchemy as sa
from alembic import context, op

revision = "0018"
down_revision = "0017"
branch_labels = None
depends_on = None

BLOCK_POINTS, OUTLINE_POINTS, SKETCH_POINTS = 256, 32, 8
OPTIONAL = ("token_accuracy", "learning_rate", "grad_norm", "num_tokens", "rewards")
NO_NUMBER = -(2**63)
HEAD = struct.Struct("<BBI")
ROWS_A_LOOK = 10_000
Row = dict[str, Any]

COLUMNS = ("job_id", "kind", "step", "created_at", "loss", *OPTIONAL[:-1])
METRICS = sa.table("metrics", *map(sa.column, COLUMNS), sa.column("rewards", sa.JSON(none_as_null=True)))
BLOCKS = sa.table(
    "metric_blocks",
    *map(sa.column, ("job_id", "kind", "first_step", "last_step", "num_points", "last_seq", "least_loss")),
    *(sa.column(name, sa.LargeBinary()) for name in ("sketch", "outline", "points")),
)


def upgrade() -> None:
    op.create_table(
        "metric_blocks",
        sa.Column("job_id", sa.String(length=255), nullable=False),
        sa.Column("kind", sa.String(length=8), nullable=False),
        sa.Column("first_step", sa.BigInteger(), nullable=False),
        sa.Column("last_step", sa.BigInteger(), nullable=False),
        sa.Column("num_points", sa.Integer(), nullable=False),
        sa.Column("last_seq", sa.BigInteger(), nullable=False),
        sa.Column("least_loss", sa.Float(precision=53), nullable=False),
        sa.Column("sketch", sa.LargeBinary(), nullable=True),
        sa.Column("outline", sa.LargeBinary(), nullable=True),
        sa.Column("points", sa.LargeBinary(), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_metric_blocks_job_id_jobs")),
        sa.PrimaryKeyConstraint("job_id", "kind", "first_step", name=op.f("pk_metric_blocks")),
    )
    op.create_index("ix_metric_blocks_job_id_last_seq", "metric_blocks", ["job_id", "last_seq"])
    if not context.is_offline_mode():
        blocks = (_block(points) for points in _in_blocks(_old_points()))
        while some := list(islice(blocks, 1000)):
            op.get_bind().execute(sa.insert(BLOCKS), some)
    op.drop_table("metrics")


def downgrade() -> None:
    op.create_table(
        "metrics",
        sa.Column("job_id", sa.String(length=255), nullable=False),
        sa.Column("kind", sa.String(length=8), nullable=False),
        sa.Column("step", sa.BigInteger(), nullable=False),
        sa.Column("created_at", sa.Float(precision=53), nullable=False),
        sa.Column("loss", sa.Float(precision=53), nullable=False),
        sa.Column("token_accuracy", sa.Float(precision=53), nullable=True),
        sa.Column("learning_rate", sa.Float(precision=53), nullable=True),
        sa.Column("grad_norm", sa.Float(precision=53), nullable=True),
        sa.Column("num_tokens", sa.BigInteger(), nullable=True),
        sa.Column("rewards", sa.JSON(), nullable=True),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_metrics_job_id_jobs")),
        sa.PrimaryKeyConstraint("job_id", "kind", "step", name=op.f("pk_metrics")),
    )
    if not context.is_offline_mode():
        points = (point for block in _looks(BLOCKS, "first_step", 100) for point in _unpacked(block))
        while some := list(islice(points, ROWS_A_LOOK)):
            op.get_bind().execute(sa.insert(METRICS), some)
    op.drop_index("ix_metric_blocks_job_id_last_seq", table_name="metric_blocks")
    op.drop_table("metric_blocks")


def _old_points() -> Iterator[Row]:
    return _looks(METRICS, "step", ROWS_A_LOOK)


def _looks(table: sa.TableClause, step: str, num_rows: int) -> Iterator[Row]:
    """Every row in the order of its key, so many at a time."""
    key = [table.c.job_id, table.c.kind, table.c[step]]
    ordered, last = sa.select(table).order_by(*key).limit(num_rows), None
    while True:
        look = ordered if last is None else ordered.where(sa.tuple_(*key) > sa.tuple_(*map(sa.literal, last)))
        rows = op.get_bind().execute(look).mappings().all()
        yield from map(dict, rows)
        if len(rows) < num_rows:
            return
        last = (rows[-1]["job_id"], rows[-1]["kind"], rows[-1][step])


def _in_blocks(points: Iterator[Row]) -> Iterator[list[Row]]:
    for _, curve in groupby(points, key=lambda point: (point["job_id"], point["kind"])):
        while block := list(islice(curve, BLOCK_POINTS)):
            yield block


def _block(points: Sequence[Row]) -> Row:
    is_full = len(points) == BLOCK_POINTS
    return {
        "job_id": points[0]["job_id"],
        "kind": points[0]["kind"],
        "first_step": points[0]["step"],
        "last_step": points[-1]["step"],
        "num_points": len(points),
        "last_seq": 0,
        "least_loss": min(point["loss"] for point in points),
        "sketch": _packed(_thin(points, SKETCH_POINTS)) if is_full else None,
        "outline": _packed(_thin(points, OUTLINE_POINTS)) if is_full else None,
        "points": _packed(points),
    }


def _thin(points: Sequence[Row], max_points: int) -> list[Row]:
    inner, num_buckets = range(1, len(points) - 1), (max_points - 2) // 2
    kept = {0, len(points) - 1}
    for i in range(num_buckets):
        bucket = inner[i * len(inner) // num_buckets : (i + 1) * len(inner) // num_buckets]
        kept |= {min(bucket, key=lambda j: points[j]["loss"]), max(bucket, key=lambda j: points[j]["loss"])}
    return [points[i] for i in sorted(kept)]


def _packed(points: Sequence[Row]) -> bytes:
    measured = [any(point[name] is not None for point in points) for name in OPTIONAL]
    steps = [point["step"] for point in points]
    gaps = [steps[0], *(after - before for before, after in pairwise(steps))]
    flags = sum(1 << bit for bit, is_there in enumerate(measured) if is_there)
    parts = [HEAD.pack(1, flags, len(points)), _column("q", gaps), _column("q", [0] * len(points))]
    parts += [_column("d", [point[name] for point in points]) for name in ("created_at", "loss")]
    for name, is_there in zip(OPTIONAL, measured, strict=True):
        values = [point[name] for point in points]
        if is_there and name == "rewards":
            parts.append(json.dumps(values, allow_nan=False, separators=(",", ":")).encode())
        elif is_there and name == "num_tokens":
            parts.append(_column("q", [NO_NUMBER if value is None else value for value in values]))
        elif is_there:
            parts.append(_column("d", [math.nan if value is None else value for value in values]))
    return zlib.compress(b"".join(parts), 1)


def _column(letter: str, values: Sequence[Any]) -> bytes:
    return struct.pack(f"<{len(values)}{letter}", *values)


def _unpacked(block: Row) -> Iterator[Row]:
    content = zlib.decompress(block["points"])
    _, flags, count = HEAD.unpack_from(content)
    place = HEAD.size
    columns: dict[str, Sequence[Any]] = {}
    optional = [name for bit, name in enumerate(OPTIONAL) if flags & (1 << bit)]
    for name in ("step", "seq", "created_at", "loss", *optional):
        if name == "rewards":
            columns[name] = json.loads(content[place:])
            continue
        letter = "q" if name in ("step", "seq", "num_tokens") else "d"
        columns[name] = struct.unpack_from(f"<{count}{letter}", content, place)
        place += 8 * count
    columns["step"] = list(accumulate(columns["step"]))
    del columns["seq"]
    for i in range(count):
        point = {name: column[i] for name, column in columns.items()}
        kept = {name: _value(point.get(name)) for name in OPTIONAL}
        yield {"job_id": block["job_id"], "kind": block["kind"], **point, **kept}


def _value(value: Any) -> Any:
    return None if value == NO_NUMBER or (isinstance(value, float) and math.isnan(value)) else value
