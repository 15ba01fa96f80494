"""Base models by name: added by an operator, imported once by a worker, then fixed by the digest of their files."""

from __future__ import annotations

import hashlib

import rfc8785
from sqlalchemy import Select, or_, select
from sqlalchemy.orm import Session

from catalog.db import Database, read_clock, serialise, skip_locked
from catalog.errors import Conflict, InvalidRequest, NotFound
from catalog.spec import LABEL
from catalog.tables import BaseModelRow, Json

KINDS = ("hub", "folder", "gguf")


def add(db: Database, *, name: str, kind: str, source: str, revision: str | None = None) -> BaseModelRow:
    """Name a base model; a worker imports it. The same again changes nothing, save that a failed import is retried."""
    _check(name, kind, source)
    with db.write() as session:
        serialise(session, f"base {name}")
        row = session.get(BaseModelRow, name)
        if row is None:
            row = BaseModelRow(name=name, kind=kind, source=source, revision=revision, state="importing")
            row.created_at = read_clock(session)
            session.add(row)
        elif (row.kind, row.source, row.revision) != (kind, source, revision):
            raise Conflict(
                f"There is another base model named {name!r}, from {row.source}.",
                code="model_exists",
                remedy="Add this one under another name: adapters are tied to the base that they were trained on.",
                param="name",
            )
        elif row.state == "failed":
            row.state, row.error, row.importing_until = "importing", None, None
        return row


def list_all(db: Database) -> list[BaseModelRow]:
    """By name."""
    with db.read() as session:
        return list(session.scalars(select(BaseModelRow).order_by(BaseModelRow.name)))


def get(db: Database, name: str) -> BaseModelRow:
    """Raises NotFound with the names there are."""
    with db.read() as session:
        return find(session, name)


def find(session: Session, name: str) -> BaseModelRow:
    """`get`, within a transaction."""
    row = session.get(BaseModelRow, name)
    if row is None:
        known = list(session.scalars(select(BaseModelRow.name).order_by(BaseModelRow.name)))
        remedy = f"Base models here: {', '.join(known)}." if known else "Add one first: lorry models add NAME SOURCE."
        raise NotFound("model", name, param="model", remedy=remedy)
    return row


def claim_import(db: Database, *, lease_seconds: float) -> BaseModelRow | None:
    """A base that waits for its import, leased; None where none does."""
    with db.read() as session:  # most looks find nothing, and keep nobody from writing
        if session.scalar(_first_waiting(now=read_clock(session))) is None:
            return None
    with db.write() as session:
        now = read_clock(session)
        row = session.scalar(skip_locked(_first_waiting(now=now)))
        if row is not None:
            row.importing_until = now + lease_seconds
        return row


def _first_waiting(*, now: float) -> Select[BaseModelRow]:
    is_free = or_(BaseModelRow.importing_until.is_(None), BaseModelRow.importing_until <= now)
    waiting = select(BaseModelRow).where(BaseModelRow.state == "importing", is_free)
    return waiting.order_by(BaseModelRow.created_at).limit(1)


def renew_import(db: Database, name: str, *, lease_seconds: float) -> None:
    """The import goes on."""
    with db.write() as session:
        row = session.get(BaseModelRow, name, with_for_update=True)
        if row is not None and row.state == "importing":
            row.importing_until = read_clock(session) + lease_seconds


def finish_import(db: Database, name: str, *, digest: str, manifest: Json, description: Json) -> BaseModelRow:
    """The base is ready. Raises Conflict where it was imported before, with other files."""
    with db.write() as session:
        row = session.get_one(BaseModelRow, name, with_for_update=True)
        if row.digest is not None and row.digest != digest:
            raise Conflict(
                f"The source of {name!r} no longer gives the files that it gave at first.",
                code="base_changed",
                remedy=f"Restore the source, or add it under a new name. Expected digest {row.digest}, found {digest}.",
            )
        row.state, row.digest, row.manifest, row.description = "ready", digest, manifest, description
        row.error = row.importing_until = None
        return row


def fail_import(db: Database, name: str, *, error: Json) -> None:
    """The import can't be done: `error` holds code, message and remedy. Adding the same again retries."""
    with db.write() as session:
        row = session.get_one(BaseModelRow, name, with_for_update=True)
        if row.state == "importing":
            row.state, row.error, row.importing_until = "failed", error, None


def files_digest(manifest: Json) -> str:
    """A base's digest: sha256 over the RFC 8785 form of its files, whatever they came from."""
    return hashlib.sha256(rfc8785.dumps(manifest["files"])).hexdigest()


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
    if not source.strip() or "\0" in source:
        raise InvalidRequest(
            "The source of the base model is empty.",
            code="invalid_source",
            remedy="Give a hub id such as org/name, a folder, or a GGUF file.",
            param="source",
        )
