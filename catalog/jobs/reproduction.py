"""Builds the job that reproduces an adapter from its lineage record.

The record names every input by digest. Each must still exist: the base model and the parent adapter in the service, the
files in the project of the caller. Files and base models are found by their content, whatever their names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from pydantic import ValidationError
from sqlalchemy import select
from sqlalchemy.orm import Session

from catalog.admission.accept import PURPOSE, Accepted, accept
from catalog.db.database import Database, read_clock
from catalog.errors import Conflict, InvalidRequest, LorryError, listed
from catalog.plans import jobs_from_plans
from catalog.registry import adapters, checkpoints, lineage, lineage_comparison
from catalog.registry.adapters import AdapterView
from catalog.spec.job import FleetDefaults, JobRequest, JobSpec
from catalog.states import PriorityClass
from catalog.storage import files
from catalog.storage.manifest import Manifest
from catalog.tables.storage import Adapter, BaseModelRow, File
from catalog.tables.table import Json
from catalog.tenancy.authentication import Caller
from catalog.usage import quotas

SUFFIX = "reproduced"
"""Suffix of every reproduction, so that the adapter's own suffix still names one adapter."""
REPLACED = frozenset({"deadline", "must_serve_on", "parent_adapter", "training_file", "validation_file"})
"""Fields of the recorded request that do not apply again, or that get other ids."""


class MissingInputs(Conflict):
    """Inputs of the recorded training do not exist anymore. The message lists all of them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reproduction:
    """An adapter to reproduce, with its inputs."""

    adapter: str
    """Id of the adapter."""
    name: str
    lineage_id: str
    expected: Json
    """The digests that the reproduction must have; see `lineage_comparison.expectation`."""
    base_digest: str
    request: JobRequest
    """The recorded request, with the ids of the inputs and the resolved seed and precision."""
    spec: JobSpec
    """The recorded configuration."""

    def as_column(self) -> Json:
        """Return the value of Job.reproduces."""
        return {"adapter": self.adapter, "name": self.name, "lineage_id": self.lineage_id, "expected": self.expected}


def prepare(db: Database, caller: Caller, name: str) -> Reproduction:
    """Find the inputs of an adapter's training by their digests. name: of the adapter, or its id.

    Call it outside the transaction that creates the job, because parsing the request compiles patterns. Raises
    NotFound, InvalidRequest for a checkpoint, MissingInputs, and Conflict if the record is damaged or does not suit
    this version.
    """
    view = adapters.get(db, project_id=caller.project_id, name=name)
    adapter, record = view.adapter, view.adapter.lineage
    _check_record(view)
    try:
        spec = JobSpec.model_validate(record["config"]["resolved"])
        with db.read() as session:
            inputs = _inputs(session, caller, adapter, spec)
        request = _request(record["config"]["requested"], spec, inputs)
    except (KeyError, TypeError, ValidationError) as error:
        raise _not_reproducible(adapter, "its record has a configuration that this version does not support") from error
    return Reproduction(
        adapter=adapter.id,
        name=adapter.name,
        lineage_id=adapter.lineage_id,
        expected=lineage_comparison.expectation(record),
        base_digest=adapter.base_digest,
        request=request,
        spec=spec,
    )


def accept_reproduction(session: Session, caller: Caller, reproduction: Reproduction, *, now: float) -> Accepted:
    """Accept the job, at a lower priority if the caller may not use that of the request.

    Raises what `accept` raises, and Conflict if its configuration would differ from the record.
    """
    spec = reproduction.spec
    priority = max(PriorityClass[reproduction.request.priority], quotas.highest_priority(session, caller))
    request = reproduction.request.model_copy(update={"priority": priority.name})
    accepted = accept(session, caller, request, now=now, seed=spec.seed, fleet_defaults=FleetDefaults.of(spec))
    if accepted.base.digest != reproduction.base_digest:
        raise Conflict("model_changed", base=accepted.base.name)
    if accepted.spec != spec:
        raise _not_reproducible(reproduction, jobs_from_plans.difference(accepted.spec, spec))
    return replace(accepted, cautions=())  # they were events of the first job


def _check_record(view: AdapterView) -> None:
    adapter = view.adapter
    if checkpoints.step_of(adapter) is not None:
        raise InvalidRequest("checkpoint_not_reproducible", adapter=adapter.name, param="adapter")
    manifest = Manifest.from_rows(view.artifact.kind, view.artifact.files)
    if problems := lineage.verify(adapter.lineage, adapter.lineage_id, manifest):
        raise Conflict("lineage_damaged", adapter=adapter.name, problems=problems[0], param="adapter")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Inputs:
    base: str
    parent: str | None
    files: Mapping[str, str]
    """File ids by role."""


def _inputs(session: Session, caller: Caller, adapter: Adapter, spec: JobSpec) -> _Inputs:
    """Find all inputs. Raises MissingInputs."""
    record, parent, missing = adapter.lineage, spec.parent, list[str]()
    base = _base(session, record["base"])
    if base is None:
        missing.append(_named_base(record["base"]))
    if parent is not None and not _is_kept(session, caller, parent.adapter):
        missing.append(f"the parent adapter {parent.name!r}, which was deleted or is no longer shared")
    found = {source["role"]: _file(session, caller, source) for source in record["data"]}
    missing += [_named_file(source) for source in record["data"] if found[source["role"]] is None]
    if missing or base is None:
        raise MissingInputs(
            "reproduction_inputs_missing", adapter=adapter.name, missing=listed(missing), param="adapter"
        )
    return _Inputs(
        base=base,
        parent=parent.adapter if parent else None,
        files={role: ident for role, ident in found.items() if ident},
    )


def _base(session: Session, recorded: Mapping[str, Any]) -> str | None:
    """Return the name of a base model with the recorded digest, preferably the recorded name."""
    same = select(BaseModelRow.name).where(BaseModelRow.digest == recorded["digest"], BaseModelRow.state == "ready")
    return session.scalar(same.order_by(BaseModelRow.name != recorded["name"], BaseModelRow.name).limit(1))


def _named_base(recorded: Mapping[str, Any]) -> str:
    source, revision = recorded.get("source"), recorded.get("revision")
    origin = f" ({source}{f' at revision {revision}' if revision else ''})" if source else ""
    return f"the base model {recorded['name']!r}{origin} with the digest {recorded['digest']}"


def _is_kept(session: Session, caller: Caller, parent: str) -> bool:
    try:
        adapters.find(session, caller.project_id, parent)
    except LorryError:
        return False
    return True


def _file(session: Session, caller: Caller, source: Mapping[str, Any]) -> str | None:
    """Return a file of the caller's project with the recorded content, preferably the recorded file."""
    usable = select(File.id).where(
        File.project_id == caller.project_id, File.digest == source["digest"], File.purpose == PURPOSE
    )
    now = read_clock(session)
    usable = usable.where(files.is_visible(now), (File.expires_at.is_(None)) | (File.expires_at > now))
    return session.scalar(usable.order_by(File.id != source["file"], File.created_at.desc(), File.id).limit(1))


def _named_file(source: Mapping[str, Any]) -> str:
    return f"the {source['role']} file with the SHA-256 digest {source['digest']} ({source['num_bytes']} bytes)"


def _request(recorded: Mapping[str, Any], spec: JobSpec, inputs: _Inputs) -> JobRequest:
    """Return the recorded request with the inputs that exist now. Raises ValidationError."""
    kept = {name: value for name, value in recorded.items() if name not in REPLACED}
    return JobRequest.model_validate(
        {
            **kept,
            "model": inputs.base,
            "training_file": inputs.files["training"],
            "validation_file": inputs.files.get("validation"),
            "parent_adapter": inputs.parent,
            "precision": spec.precision,
            "seed": spec.seed,
            "suffix": SUFFIX,
            "priority": "batch" if recorded.get("priority") == "batch" else "normal",
        }
    )


def _not_reproducible(adapter: Adapter | Reproduction, reason: str) -> Conflict:
    return Conflict("not_reproducible", adapter=adapter.name, reason=reason, param="adapter")
