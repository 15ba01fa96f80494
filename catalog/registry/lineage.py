"""Lineage records: the origin of an adapter as one canonical record, sufficient to verify, compare and reproduce it.

`build` is pure: it takes rows and plain values. A record's id is the SHA-256 of its RFC 8785 form. A record never
contains training data, secrets, host paths or data that is private to its project. All projects with which an adapter
is shared read the whole record, because a part of it would have no id.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from typing import Any, Literal, cast

import rfc8785

from catalog.storage.manifest import Manifest
from catalog.tables.history import Attempt
from catalog.tables.jobs import Job
from catalog.tables.storage import BaseModelRow, File
from catalog.tables.table import Json

FORMAT = "lorry.lineage/1"
MAX_SAFE_INTEGER = 2**53 - 1
TOKENIZER, TEMPLATE = "tokenizer.json", "chat_template.jinja"
HOST_PATH = re.compile(r"(?:^|[\s'\"(=:,])(?:file:/+|~?/[\w.-]+/|[A-Za-z]:\\|\\\\\w)")
PRIVATE = frozenset({"metadata", "tags", "integrations", "samples"})
"""Fields of a request or spec that don't affect the adapter. `samples` is a field of a request's evaluation."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataSource:
    """A training or validation file and its tokenization."""

    role: Literal["training", "validation"]
    file: File
    tokens: str
    """Digest of the token cache's manifest."""
    report: Json
    """Report of worker.children.tokenizer.main: rows, tokens, digests of tokenizer and template, format."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AttemptRecord:
    """An attempt with its trainer and packmates."""

    attempt: Attempt
    trainer: Json
    """Report of the trainer: device, dtype, versions, numeric determinism."""
    packmates: Sequence[str] = ()


def build(
    *,
    job: Job,
    base: BaseModelRow,
    adapter: Manifest,
    num_parameters: int,
    data: Sequence[DataSource],
    attempts: Sequence[AttemptRecord],
    results: Json,
    code: Mapping[str, str],
    parents: Sequence[str] = (),
    finished_at: float | None = None,
) -> Json:
    """Build the lineage record of an adapter. Raises ValueError if a value has no canonical form.

    attempts: all attempts of the job, in order. The last one made the adapter and ends at finished_at (None: it is
    still running, and the adapter is a checkpoint's). results: final step, tokens, evaluation, verification, digest of
    the loss log. code: versions by name. parents: record ids of the adapters that this one continues.
    """
    record: Json = {
        "format": FORMAT,
        "job": job.id,
        "outputs": _outputs(adapter, num_parameters),
        "base": {**_base(base), "quantization": job.spec.get("quantization", "none")},
        "data": [_data(source) for source in data],
        "config": {"requested": _public(job.requested), "resolved": _public(job.spec)},
        "attempts": [_attempt(entry, finished_at, is_last=entry is attempts[-1]) for entry in attempts],
        "code": dict(code),
        "results": results,
        "people": _owner_and_times(job, finished_at),
        "graph": {"parents": list(parents)},
    }
    record = cast(Json, _without_paths(record))
    canonical(record)
    return record


def describing(record: Json, adapter: Manifest) -> Json:
    """Return the record of the same training with other files of the adapter."""
    return {**record, "outputs": _outputs(adapter, record["outputs"]["num_parameters"])}


def contributing(attempts: Sequence[tuple[int | None, Json]]) -> list[int]:
    """Return the indices of the attempts that computed steps of the adapter, in order. The last attempt is one of them.

    attempts: for each, the step from which it resumed and the report of its trainer. Backwards from the last attempt,
    those contribute that began below the step from which the next contributing one resumed. An attempt that resumed
    from no step either began at 0 or ended before its job was admitted. It counts if its trainer has reported a
    guarantee.
    """
    found = [len(attempts) - 1]
    needed = attempts[-1][0] or 0
    for index in reversed(range(len(attempts) - 1)):
        began, report = attempts[index]
        if (began or 0) < needed and (began is not None or report.get("invariance") is not None):
            found.append(index)
        needed = needed if began is None else min(needed, began)
    return found[::-1]


def canonical(record: Json) -> bytes:
    """Return the record's RFC 8785 form. Raises ValueError with the path of a value that has none."""
    _check(record, "record")
    return rfc8785.dumps(record)


def lineage_id(record: Json) -> str:
    """Return the record's id: the SHA-256 of its canonical form."""
    return sha256(canonical(record)).hexdigest()


def verify(record: Json, lineage_id: str, manifest: Manifest) -> list[str]:
    """Check that the record has this id and describes this adapter. Returns problems as sentences."""
    try:
        found = sha256(canonical(record)).hexdigest()
    except ValueError as error:
        return [f"The record has no canonical form: {error}."]
    problems: list[str] = []
    if found != lineage_id:
        problems.append(f"The record has changed: its ID is {found}, not {lineage_id}.")
    if record.get("format") != FORMAT:
        return [*problems, f"The record has the format {record.get('format')!r}, but only {FORMAT!r} is supported."]
    try:
        return problems + _compare_files(record["outputs"], manifest) + _check_base(record["base"])
    except (KeyError, TypeError, AttributeError) as error:
        return [*problems, f"The record is incomplete ({error})."]


def _outputs(adapter: Manifest, num_parameters: int) -> Json:
    return {
        "artifact": adapter.digest,
        "kind": adapter.kind,
        "files": adapter.as_rows(),
        "num_bytes": adapter.num_bytes,
        "num_parameters": num_parameters,
    }


def _base(base: BaseModelRow) -> Json:
    files = cast(list[Json], (base.manifest or {}).get("files", []))
    digests: dict[str, str] = {file["path"]: file["digest"] for file in files}
    description = dict(base.description or {})
    return {
        "name": base.name,
        "kind": base.kind,
        "source": base.source if base.kind == "hub" else None,  # any other source is a path
        "revision": (base.manifest or {}).get("revision") or base.revision,
        "digest": base.digest,
        "files": files,
        "license": description.pop("license", None),
        "description": description,
        "tokenizer": digests.get(TOKENIZER),
        "chat_template": digests.get(TEMPLATE),
    }


def _data(source: DataSource) -> Json:
    return {
        "role": source.role,
        "file": source.file.id,
        "digest": source.file.digest,
        "num_bytes": source.file.num_bytes,
        "num_rows": source.file.num_rows,
        "tokens": source.tokens,
        "preparation": source.report,
    }


def _attempt(entry: AttemptRecord, finished_at: float | None, *, is_last: bool) -> Json:
    """The record of an attempt. It omits `detail`, which may quote a log, and only counts packmates."""
    attempt = entry.attempt
    completes = is_last and attempt.ended_at is None and finished_at is not None
    return {
        "number": attempt.number,
        "worker": attempt.worker_id,
        "trainer": attempt.trainer_id,
        "started_at": _time(attempt.started_at),
        "ended_at": _time(finished_at if completes else attempt.ended_at),
        "end": "completed" if completes else attempt.reason,
        "resumed_from_step": attempt.resumed_from_step,
        "num_packmates": len(entry.packmates),
        "machine": entry.trainer,
    }


def _public(request: Json) -> Json:
    public, evaluation = _without(request, PRIVATE), request.get("evaluation")
    return {**public, "evaluation": _without(evaluation, PRIVATE)} if evaluation else public


def _owner_and_times(job: Job, finished_at: float | None) -> Json:
    return {
        "project": job.project_id,
        "requested_at": _time(job.created_at),
        "started_at": _time(job.started_at),
        "finished_at": _time(finished_at),
    }


def _time(seconds: float | None) -> str | None:
    if seconds is None:
        return None
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _without(values: Json, keys: frozenset[str]) -> Json:
    return {key: value for key, value in values.items() if key not in keys}


def _without_paths(value: Any) -> Any:
    """Drop strings that contain a host path. They are meaningless on other hosts, but reveal details of this one."""
    if isinstance(value, Mapping):
        items = cast(Mapping[str, Any], value).items()
        return {key: _without_paths(item) for key, item in items if not (_is_path(item) or _is_path(key))}
    if isinstance(value, list | tuple):
        return [_without_paths(item) for item in cast(Sequence[Any], value) if not _is_path(item)]
    return value


def _is_path(value: Any) -> bool:
    return isinstance(value, str) and HOST_PATH.search(value) is not None


def _check(value: Any, place: str) -> None:
    if isinstance(value, dict):
        for key, item in cast(dict[Any, Any], value).items():
            if not isinstance(key, str):
                raise ValueError(f"{place} has the key {key!r}, which is not a string")
            _check(item, f"{place}.{key}")
    elif isinstance(value, list):
        for index, item in enumerate(cast(list[Any], value)):
            _check(item, f"{place}[{index}]")
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{place} is {value}")
    elif isinstance(value, int):
        if abs(value) > MAX_SAFE_INTEGER:
            raise ValueError(f"{place} is {value}, beyond 2**53")
    elif not isinstance(value, str | None):
        raise ValueError(f"{place} is of the type {type(value).__name__}")


def _compare_files(outputs: Json, manifest: Manifest) -> list[str]:
    problems: list[str] = []
    recorded = {file["path"]: file["digest"] for file in outputs["files"]}
    stored = {file.path: file.digest for file in manifest.files}
    problems += [f"The file {path} of the record is missing." for path in recorded if path not in stored]
    problems += [f"The file {path} is not in the record." for path in stored if path not in recorded]
    problems += [
        f"The file {path} differs from the record: its digest is {stored[path]}, not {digest}."
        for path, digest in recorded.items()
        if stored.get(path, digest) != digest
    ]
    if outputs["artifact"] != manifest.digest:
        problems.append(f"The record belongs to the artifact {outputs['artifact']}, not to {manifest.digest}.")
    return problems


def _check_base(base: Json) -> list[str]:
    found = sha256(rfc8785.dumps(base["files"])).hexdigest()
    return [] if found == base["digest"] else ["The base model's digest does not match its files in the record."]
