"""The queue and the workers."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from catalog.fleet.views import WorkerView
from catalog.spec.strict import Strict
from catalog.tables.table import Json


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


class CordonRequest(Strict):
    """Why a worker is to take no more."""

    model_config = ConfigDict(json_schema_extra={"example": {"reason": "Its fan is replaced."}})
    reason: str | None = Field(default=None, min_length=1, max_length=200, description="For whoever asks; all see it.")


class CordonObject(BaseModel):
    """Why a worker takes nothing new."""

    by: Literal["operator", "service"] = Field(description="service: jobs failed on it one after the other.")
    reason: str | None
    at: float = Field(description="Seconds since 1970 by the database's clock.")
    evidence: list[dict[str, Any]] | None = Field(
        description="The ends of attempts for which the service cordoned it. null but for operators."
    )


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
    cordon: CordonObject | None = Field(description="It takes nothing new, and finishes what it holds. null: it does.")
    host: str | None
    pid: int | None
    devices: list[Any]
    version: str
    protocol: int | None = Field(description="How it works with the service: one in the window that this one takes.")
    memory_bytes: int
    started_at: int
    last_seen_at: int
    ended_at: int | None
    resident_base: str | None = Field(description="Digest of the base that it holds; null where it is lost or ended.")
    resident_base_names: list[str] = Field(description="Names of that base.")
    trainer_id: str | None
    report: dict[str, Any] | None


def worker_object(view: WorkerView, *, shows_all: bool) -> WorkerObject:
    """shows_all: to an operator, also where it runs and what failed there."""
    row, is_there = view.worker, view.state not in ("lost", "ended")
    return WorkerObject.model_validate(
        {
            "id": row.id,
            "state": view.state,
            "cordon": _cordon(row.cordon, shows_all=shows_all),
            "host": row.host if shows_all else None,
            "pid": row.pid if shows_all else None,
            "devices": row.devices,
            "version": row.version,
            "protocol": row.protocol,
            "memory_bytes": row.memory_bytes,
            "started_at": int(row.started_at),
            "last_seen_at": int(row.heartbeat_at),
            "ended_at": None if row.ended_at is None else int(row.ended_at),
            "resident_base": row.resident_base if is_there else None,
            "resident_base_names": view.base_names if is_there else [],
            "trainer_id": row.trainer_id if is_there else None,
            "report": row.report if shows_all and is_there else None,
        }
    )


def _cordon(cordon: Json | None, *, shows_all: bool) -> Json | None:
    return None if cordon is None else {**cordon, "evidence": cordon["evidence"] if shows_all else None}
