"""Schemas of the queue and the workers."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from api.schemas import BaseName, JobId
from catalog.fleet.views import WorkerView
from catalog.spec.model_fields import Strict
from catalog.tables.table import Json


class QueueEntry(BaseModel):
    """An unfinished job and its queue position."""

    model_config = ConfigDict(extra="allow")
    job_id: JobId
    state: str = Field(description="Status of the job.")
    base_model: BaseName
    priority: str = Field(description="Priority class of the job.")
    position: int | None = Field(
        default=None, description="Position in the whole queue, from 1; null if the job has none now."
    )
    reason: str | None = Field(default=None, description="Explanation of the position.")


class QueueObject(BaseModel):
    """A snapshot of the queue: jobs with a position first, in scheduling order."""

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
    as_of: float = Field(description="Time of the snapshot, in Unix seconds, by the database's clock.")
    counts: dict[str, int] = Field(description="Unfinished jobs by state.")
    jobs: list[QueueEntry] = Field(description="Unfinished jobs that your key may see.")


class CordonRequest(Strict):
    """The reason for a cordon."""

    model_config = ConfigDict(json_schema_extra={"example": {"reason": "Its fan is replaced."}})
    reason: str | None = Field(
        default=None, min_length=1, max_length=200, description="Free text; visible to all users. Null: no reason."
    )


class CordonObject(BaseModel):
    """The cordon of a worker, which claims no new jobs."""

    by: Literal["operator", "service"] = Field(description="`service`: several jobs in a row failed on the worker.")
    reason: str | None = Field(description="Text of the operator or the service; null if none was given.")
    at: float = Field(description="Time of the cordon, in Unix seconds, by the database's clock.")
    evidence: list[dict[str, Any]] | None = Field(
        description="The failed attempts for which the service cordoned the worker. Null except with an operator key."
    )


class WorkerObject(BaseModel):
    """A worker process. `host`, `pid` and `report` are null except with an operator key."""

    model_config = ConfigDict(
        json_schema_extra={"example": {"id": "worker-1", "state": "busy", "resident_base": "9f86d081884c7d65"}}
    )
    id: str = Field(description="ID of the worker process.")
    object: Literal["worker"] = "worker"
    state: Literal["idle", "busy", "draining", "lost", "ended"] = Field(
        description="`busy`: it trains at least one job. An idle worker may keep a base model loaded."
    )
    cordon: CordonObject | None = Field(
        description="Set if the worker is cordoned: it finishes the jobs it holds and claims no new ones."
    )
    host: str | None = Field(description="Name of the machine.")
    pid: int | None = Field(description="Process ID on that machine.")
    devices: list[Any] = Field(description="Devices of the worker, with kind, name and memory.")
    version: str = Field(description="Version of the worker's software.")
    protocol: int = Field(description="Version of its protocol; the service supports a range of versions.")
    memory_bytes: int = Field(description="Memory of the devices, in bytes.")
    started_at: int = Field(description="Start of the worker, in Unix seconds.")
    last_seen_at: int = Field(description="Last heartbeat, in Unix seconds.")
    ended_at: int | None = Field(description="End of the worker, in Unix seconds; null until it stops.")
    resident_base: str | None = Field(
        description="Digest of the loaded base model; null if the worker is lost or ended."
    )
    resident_base_names: list[str] = Field(description="Names of the loaded base model.")
    trainer_id: str | None = Field(description="ID of the trainer that has the base model loaded.")
    report: dict[str, Any] | None = Field(
        description="Measurements of the worker: tokens per second, memory in use, software versions."
    )


def worker_object(view: WorkerView, *, shows_all: bool) -> WorkerObject:
    """Return a worker's response. `shows_all`: include the fields that only operators may see."""
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
