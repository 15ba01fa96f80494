"""The queue and the workers."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from catalog.tables import Worker


class QueueEntry(BaseModel):
    """An unfinished job and its place."""

    model_config = ConfigDict(extra="allow")
    job_id: str
    state: str
    base_model: str
    priority: str
    position: int | None = Field(
        default=None, description="Turn in the whole queue, from 1; null where it has none now."
    )
    reason: str | None = Field(default=None, description="Why this is its turn.")


class QueueObject(BaseModel):
    """A snapshot of the queue: those with a turn first, in order."""

    model_config = ConfigDict(
        extra="allow",
        json_schema_extra={
            "example": {
                "object": "queue",
                "as_of": 1790000000.5,
                "counts": {"queued": 1},
                "waiting_in_all": 1,
                "workers": 1,
                "jobs": [
                    {
                        "job_id": "ftjob-1c0ffee0a1b2c3d4e5f60718",
                        "state": "queued",
                        "base_model": "smollm2-135m",
                        "priority": "normal",
                        "position": 1,
                    }
                ],
            }
        },
    )
    object: Literal["queue"] = "queue"
    as_of: float = Field(description="Seconds since 1970 by the database's clock.")
    counts: dict[str, int] = Field(description="Unfinished jobs by state.")
    jobs: list[QueueEntry]


class WorkerObject(BaseModel):
    """A process that trains. Where it runs is shown to operators."""

    model_config = ConfigDict(
        json_schema_extra={"example": {"id": "worker-1", "state": "busy", "resident_base": "9f86d081884c7d65"}}
    )
    id: str
    object: Literal["worker"] = "worker"
    state: Literal["idle", "busy", "draining", "lost", "ended"] = Field(
        description="busy: it trains a job. A base may stay loaded in an idle one."
    )
    host: str | None
    pid: int | None
    devices: list[Any]
    version: str
    memory_bytes: int
    started_at: int
    last_seen_at: int
    ended_at: int | None
    resident_base: str | None = Field(description="Digest of the base that it holds.")
    resident_base_names: list[str] = Field(description="Names of that base.")
    trainer_id: str | None
    report: dict[str, Any] | None


def worker_object(row: Worker, *, state: str, base_names: list[str], shows_host: bool) -> WorkerObject:
    return WorkerObject.model_validate(
        {
            "id": row.id,
            "state": state,
            "host": row.host if shows_host else None,
            "pid": row.pid if shows_host else None,
            "devices": row.devices,
            "version": row.version,
            "memory_bytes": row.memory_bytes,
            "started_at": int(row.started_at),
            "last_seen_at": int(row.heartbeat_at),
            "ended_at": None if row.ended_at is None else int(row.ended_at),
            "resident_base": row.resident_base,
            "resident_base_names": base_names,
            "trainer_id": row.trainer_id,
            "report": row.report if shows_host else None,
        }
    )
