"""Data reports as preparation makes them for the files of a plan."""

from __future__ import annotations

from typing import Any

from catalog.plans import claims, plans
from catalog.settings import Settings
from catalog.tables.plans import Plan
from tests.catalog.world import World, manifest, request

SETTINGS = Settings()
REPORT: dict[str, Any] = {
    "format": 1,
    "kind": "chat",
    "max_length": 512,
    "rows": 100,
    "usable_rows": 100,
    "tokens": 5000,
    "supervised_tokens": 2000,
    "truncated_rows": 0,
    "dropped_rows": 0,
    "split_rows": 0,
    "empty_rows": 0,
    "duplicate_rows": 0,
    "longest_row": 80,
    "longest_example": 80,
    "median_row": 50,
}
SHOWN = {"start": 0, "tokens": [{"text": "secret", "id": 7, "is_trained": True}]}
ROW = {"part": None, "num_tokens": 1, "whole_tokens": 1, "trained_tokens": 1, "segments": [SHOWN]}
DETAILS: dict[str, Any] = {
    "samples": [{"line": 1, "flaws": [], "rows": [ROW]}],
    "lines": {"too_long": [], "empty": [], "duplicate": []},
}


def plan(world: World, **fields: Any) -> Plan:
    body = request(**{"training_file": world.file_id, **fields})
    return plans.create(world.db, caller=world.caller, request=body, settings=SETTINGS)


def ready(world: World, **fields: Any) -> Plan:
    """Return a plan whose files were prepared before the plan was created."""
    first = plan(world, **fields)
    know(world, first)
    return plan(world, **fields)


def know(world: World, row: Plan, *, overlap: tuple[int, int] = (0, 100), **found: Any) -> None:
    """Store reports for the files of a plan, as if they had been prepared."""
    for key in (row.train_prepared, row.valid_prepared):
        if key is not None:
            put(world, key, REPORT | found)
    if row.valid_prepared is not None:
        keys = {"train_key": row.train_prepared, "valid_key": row.valid_prepared}
        claims.record_overlap(world.db, **keys, num_rows=overlap[0], of_rows=overlap[1])


def put(world: World, key: str, report: dict[str, Any], *, details: dict[str, Any] | None = DETAILS) -> None:
    tokens = None if "refusal" in report else manifest(f"tokens {key}", kind="tokens")
    world.put_tokens(key, file_digest="d", artifact=tokens, report=report, details=details)
