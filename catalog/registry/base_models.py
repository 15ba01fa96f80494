"""Base models by name: added by an operator, imported once by a worker, then fixed by the digest of their files."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Literal

from sqlalchemy import ColumnElement, Select, select
from sqlalchemy.orm import Session, defer

from catalog.audit import log
from catalog.audit.log import AuditType
from catalog.db import lease
from catalog.db.database import Database, get_once, read_clock, serialize, skip_locked
from catalog.errors import Conflict, InvalidRequest, NotFound
from catalog.resources import requirements
from catalog.spec.strict import LABEL
from catalog.states import UNFINISHED_STATES
from catalog.tables.jobs import Job
from catalog.tables.storage import BaseModelRow
from catalog.tables.table import Json

KINDS = ("hub", "folder", "gguf")
SOURCE_PATTERN = r"^[^\x00-\x1f\x7f\S]*[^\x00-\x1f\x7f\s][^\x00-\x1f\x7f]*$"
"""Not blank, and without control characters. The first that is no space is where the middle matches: nothing is tried
twice."""
IS_THERE: ColumnElement[bool] = BaseModelRow.state != "deleted"


def add(db: Database, *, name: str, kind: str, source: str, revision: str | None = None) -> BaseModelRow:
    """Name a base model; a worker imports it.

    The same again changes nothing, save that a failed import is retried. A base that was never ready gives its
    name up to another source: nothing was trained on it.
    """
    _check(name, kind, source)
    with db.write() as session:
        serialize(session, f"base {name}")
        row = session.get(BaseModelRow, name, with_for_update=True)
        is_another = row is not None and (row.kind, row.source, row.revision) != (kind, source, revision)
        if row is None:
            row = BaseModelRow(name=name)
            _begin(session, row, kind=kind, source=source, revision=revision)
            session.add(row)
        elif row.state == "deleted" or (row.state == "failed" and is_another):
            row.error = None
            _begin(session, row, kind=kind, source=source, revision=revision)
        elif is_another:
            raise Conflict(
                f"There is another base model named {name!r}, from {row.source}.",
                code="model_exists",
                remedy=f"Add this one under another name, or delete the other first: lorry models delete {name}.",
                param="name",
            )
        elif row.state == "failed":
            row.state, row.error = "importing", None
        else:
            return row
        told = {"kind": kind, "source": source, "revision": revision}
        _note(session, "model.added", name, details=told)
        return row


def delete(db: Database, name: str, *, is_client_retry: bool = False) -> None:
    """Free the name, whatever state the base is in. Raises NotFound; Conflict while an unfinished job names it.

    What was trained on it stays as it is: an adapter has its own files, and its lineage those of the base by
    digest. The row stays too, since finished jobs refer to it, until another base is added under the name. An
    import that runs meanwhile is ended by its worker, and what it finds is not recorded. The base's files on
    each node (`bases_dir/DIGEST`) go with the worker's next cleaning: see `deleted`. is_client_retry: the client says
    that it sends this again, having had no reply; then a name that is free again is its answer.
    """
    with db.write() as session:
        row = session.get(BaseModelRow, name, with_for_update=True)
        if is_client_retry and row is not None and row.state == "deleted":
            return
        row = find(session, name)
        user = session.scalar(select(Job.id).where(Job.base_model == name, Job.state.in_(UNFINISHED_STATES)).limit(1))
        if user is not None:
            raise Conflict(
                f"The base model {name!r} is used by the job {user}, which has not ended.",
                code="model_in_use",
                remedy="Wait until every job on it ends, or cancel them; then delete the model.",
                param="model",
            )
        _note(session, "model.deleted", name, details={"digest": row.digest})
        row.state = "deleted"
        row.manifest = row.description = row.error = None
        lease.release(row)


def deleted(db: Database, digests: Collection[str]) -> set[str]:
    """Those of `digests` that were a base here, and are none any more.

    What this database has never heard of isn't among them: a worker that was pointed at a wrong or an empty one
    must not take every base away.
    """
    with db.read() as session:
        of_bases = select(BaseModelRow.digest).where(BaseModelRow.digest.in_(digests))
        there = set(session.scalars(of_bases.where(IS_THERE)))
        of_jobs = select(Job.base_digest).where(Job.base_digest.in_(digests)).distinct()
        known = {*session.scalars(of_bases), *session.scalars(of_jobs)}
        needed = set(session.scalars(of_jobs.where(Job.state.in_(UNFINISHED_STATES))))
        return {digest for digest in known - there - needed if digest is not None}


def list_all(db: Database) -> list[BaseModelRow]:
    """By name, without their manifests."""
    with db.read() as session:
        there = select(BaseModelRow).where(IS_THERE).options(defer(BaseModelRow.manifest, raiseload=True))
        return list(session.scalars(there.order_by(BaseModelRow.name)))


def get(db: Database, name: str) -> BaseModelRow:
    """Raises NotFound with the names there are."""
    with db.read() as session:
        return find(session, name)


def exists(db: Database, name: str) -> bool:
    with db.read() as session:
        return session.scalar(select(BaseModelRow.name).where(BaseModelRow.name == name, IS_THERE)) is not None


def find(session: Session, name: str, *, lock: Literal["share", "update"] | None = None) -> BaseModelRow:
    """`get`, within a transaction. `lock`: "share" keeps it from being deleted until the transaction ends."""
    row = get_once(session, BaseModelRow, name, lock=lock)
    if row is None or row.state == "deleted":
        raise NotFound("model", name, param="model", remedy=_known(session, name))
    return row


def _known(session: Session, wanted: str) -> str:
    """What could have been meant: bases that can be trained on, or will be able to. A name with a slash is a hub's."""
    usable = select(BaseModelRow).where(BaseModelRow.state.in_(("ready", "importing"))).order_by(BaseModelRow.name)
    known = [row.name if row.state == "ready" else f"{row.name} (importing)" for row in session.scalars(usable)]
    told = f"Base models here: {', '.join(known)}." if known else ""
    if re.fullmatch(r"[\w.-]+/[\w.-]+", wanted):
        short = wanted.rpartition("/")[2].lower()[:64]
        how = f"A hub's model gets a name here from an operator: lorry models add {short} {wanted}."
        return f"{how} {told}".rstrip()
    return told or "Add one first: lorry models add NAME SOURCE."


def claim_import(db: Database, *, lease_seconds: float) -> tuple[BaseModelRow, str] | None:
    """A base that waits for its import, and the claim id of its lease; None where none does."""
    with db.read() as session:  # most looks find nothing, and keep nobody from writing
        if session.scalar(first_to_import(now=read_clock(session))) is None:
            return None
    with db.write() as session:
        now = read_clock(session)
        row = session.scalar(skip_locked(first_to_import(now=now)))
        if row is None:
            return None
        return row, lease.acquire(row, now=now, lease_seconds=lease_seconds)


def first_to_import(*, now: float) -> Select[BaseModelRow]:
    """The base that waits for its import longest."""
    waiting = (BaseModelRow.state == "importing", lease.is_free(BaseModelRow, now=now))
    return select(BaseModelRow).where(*waiting).order_by(BaseModelRow.created_at).limit(1)


def finish_import(db: Database, claim_id: str, *, digest: str, manifest: Json, description: Json) -> bool:
    """The base is ready. False, and nothing is written, if another worker imports it now or it was deleted."""
    with db.write() as session:
        row = lease.held(session, BaseModelRow, claim_id)
        if row is not None:
            row.state, row.digest, row.manifest, row.description = "ready", digest, manifest, description
            lease.release(row)
        return row is not None


def uncounted(db: Database) -> list[BaseModelRow]:
    """Those that are ready, and were imported before blocks were counted. By name."""
    return [row for row in list_all(db) if row.state == "ready" and "blocks" not in (row.description or {})]


def note_blocks(db: Database, name: str, *, digest: str, blocks: Json) -> bool:
    """Add to the description of a base what was missing of it, and to what its jobs need. digest: of the files that
    were looked at. False where the base is another now, or has it already."""
    with db.write() as session:
        row = session.get(BaseModelRow, name, with_for_update=True)
        if row is None or row.state != "ready" or row.digest != digest or "blocks" in (row.description or {}):
            return False
        row.description = {**(row.description or {}), "blocks": blocks}
    requirements.note_base(db, name)
    return True


def fail_import(db: Database, claim_id: str, *, error: Json) -> None:
    """The import can't be done: `error` holds code, message and remedy. Adding the same again retries."""
    with db.write() as session:
        row = lease.held(session, BaseModelRow, claim_id)
        if row is not None:
            row.state, row.error = "failed", error
            lease.release(row)


def _note(session: Session, type: AuditType, name: str, *, details: Json) -> None:  # noqa: A002
    """A base model is of no project."""
    log.note(session, type, now=read_clock(session), object_id=name, project_id=None, details=details)


def _begin(session: Session, row: BaseModelRow, *, kind: str, source: str, revision: str | None) -> None:
    row.kind, row.source, row.revision, row.digest = kind, source, revision, None
    row.state, row.created_at = "importing", read_clock(session)


def _check(name: str, kind: str, source: str) -> None:
    if not LABEL.match(name):
        raise InvalidRequest(
            f"{name!r} cannot be a model's name.",
            code="invalid_name",
            remedy="Use letters, digits, dot, underscore and hyphen; at most 64, the first a letter or digit.",
            param="name",
        )
    if kind not in KINDS:
        raise InvalidRequest(
            f"{kind!r} is no kind of source.",
            code="invalid_kind",
            remedy="Use hub (a Hugging Face id), folder (of safetensors) or gguf (one file).",
            param="kind",
        )
    if not re.fullmatch(SOURCE_PATTERN, source):
        raise InvalidRequest(
            "The source of the base model is blank, or has a control character in it.",
            code="invalid_source",
            remedy="Give a hub id such as org/name, a folder, or a GGUF file.",
            param="source",
        )
