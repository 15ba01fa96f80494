"""Plans, and what preparation records of their files."""

from __future__ import annotations

from typing import Any

from catalog.plans import claims, plans
from catalog.settings import Settings
from catalog.tables.jobs import Plan
from tests.catalog.prepared_data import REPORT
from tests.catalog.world import World, manifest, request

SETTINGS = Settings()


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


def put(world: World, key: str, report: dict[str, Any]) -> None:
    tokens = None if "refusal" in report else manifest(f"tokens {key}", kind="tokens")
    world.put_tokens(key, file_digest="d", artifact=tokens, report=report)
