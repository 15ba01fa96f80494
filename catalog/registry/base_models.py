"""Base models by name. An operator adds one, a worker imports it once, and the digest of its files identifies it."""

from __future__ import annotations

import re
from collections.abc import Collection
from hashlib import sha256
from typing import Literal

from sqlalchemy import ColumnElement, select
from sqlalchemy.orm import Session, defer

from catalog.audit import log
from catalog.audit.log import AuditType
from catalog.datasets.chat_templates import TEMPLATES
from catalog.db.database import Database, get_once, read_clock, serialize
from catalog.error_texts import ErrorText
from catalog.errors import Conflict, InvalidRequest, NotFound
from catalog.spec.model_fields import LABEL, label_fault
from catalog.states import UNFINISHED_STATES
from catalog.tables.jobs import Job
from catalog.tables.storage import UNFINISHED_EXPORTS, AdapterExport, BaseModelRow
from catalog.tables.table import Json
from catalog.tables.tasks import Task
from catalog.tables.tenancy import Project
from catalog.tasks import task_queue
from catalog.tasks.outcomes import TaskSubject
from catalog.tasks.task_queue import TaskClaim, TaskKind

KINDS = ("hub", "folder", "gguf")
SOURCE_PATTERN = r"^[^\x00-\x1f\x7f\S]*[^\x00-\x1f\x7f\s][^\x00-\x1f\x7f]*$"
"""Not blank and without control characters. The middle matches the first non-space character, which avoids
backtracking."""
IS_THERE: ColumnElement[bool] = BaseModelRow.state != "deleted"


def add(
    db: Database,
    *,
    name: str,
    kind: str,
    source: str,
    revision: str | None = None,
    chat_template: str | None = None,
) -> BaseModelRow:
    """Add a base model under a name, so that a worker imports it.

    chat_template: a name of `chat_templates.TEMPLATES`, or the text of a template, which replaces those of the source.

    Adding the same model again has no effect, except that a failed import is retried. A model whose import failed is
    replaced if another source is added under its name.
    """
    _check(name, kind, source)
    wanted = {
        "kind": kind,
        "source": source,
        "revision": revision,
        "chat_template": None if chat_template is None else _template(chat_template),
    }
    with db.write() as session:
        serialize(session, f"base {name}")
        row = session.get(BaseModelRow, name, with_for_update=True)
        is_another = row is not None and any(getattr(row, field) != value for field, value in wanted.items())
        if row is None:
            row = BaseModelRow(name=name)
            _begin(session, row, wanted)
            session.add(row)
        elif row.state == "deleted" or (row.state == "failed" and is_another):
            row.error = None
            _begin(session, row, wanted)
        elif is_another:
            if row.revision:
                if row.chat_template is None:
                    raise Conflict(
                        "model_revision_exists",
                        name=name,
                        kind=row.kind,
                        source=row.source,
                        revision=row.revision,
                        param="name",
                    )
                raise Conflict(
                    "model_revision_with_template_exists",
                    name=name,
                    kind=row.kind,
                    source=row.source,
                    revision=row.revision,
                    param="name",
                )
            if row.chat_template is None:
                raise Conflict("model_exists", name=name, kind=row.kind, source=row.source, param="name")
            raise Conflict("model_with_template_exists", name=name, kind=row.kind, source=row.source, param="name")
        elif row.state == "failed":
            row.state, row.error = "importing", None
        else:
            return row
        task_queue.add(session, TaskKind.IMPORT, name, project_id=None, run_after=read_clock(session))
        template = row.chat_template
        details = {**wanted, "chat_template": template and sha256(template.encode()).hexdigest()}
        _note(session, "model.added", name, details=details)
        return row


def delete(db: Database, name: str, *, is_client_retry: bool = False) -> None:
    """Delete the base model in any state and free its name. Raises NotFound, and Conflict if an unfinished job or an
    unfinished export uses it.

    Adapters that were trained on it stay unchanged: they have their own files, and their lineage records refer to the
    base model by digest. The row also stays, because finished jobs refer to it, until another base model is added under
    the name. A worker stops a running import, and its result is not recorded. Each worker deletes the model's files
    (`bases_dir/DIGEST`) at its next cleanup: see `deleted`.

    is_client_retry: the client repeats a request without a reply, so a deleted model is no error.
    """
    with db.write() as session:
        row = session.get(BaseModelRow, name, with_for_update=True)
        if is_client_retry and row is not None and row.state == "deleted":
            return
        row = find(session, name)
        users = select(Job.id, Project.name).join(Project, Project.id == Job.project_id)
        users = users.where(Job.base_model == name, Job.state.in_(UNFINISHED_STATES))
        user = session.execute(users.limit(1)).first()
        if user is not None:
            raise Conflict("model_in_use_by_job", name=name, user=user[0], project=user[1], param="model")
        _refuse_exports(session, name)
        _note(session, "model.deleted", name, details={"digest": row.digest})
        row.state = "deleted"
        row.manifest = row.description = row.error = None
        task_queue.remove(session, TaskKind.IMPORT, name)


def _refuse_exports(session: Session, name: str) -> None:
    """Raises Conflict if an unfinished export needs the base model. The format adapter does not."""
    users = select(AdapterExport.id, Project.name).join(Project, Project.id == AdapterExport.project_id)
    users = users.where(AdapterExport.base_model == name, AdapterExport.format != "adapter")
    user = session.execute(users.where(AdapterExport.status.in_(UNFINISHED_EXPORTS)).limit(1)).first()
    if user is not None:
        raise Conflict("model_in_use_by_export", name=name, user=user[0], project=user[1], param="model")


def deleted(db: Database, digests: Collection[str]) -> set[str]:
    """Return those of `digests` that belong to deleted base models and that no unfinished job needs.

    Digests that this database does not know are not included: a worker that is connected to a wrong or empty database
    must not delete all base models. While a worker imports a base model, none is returned, because its digest is not
    known yet.
    """
    with db.snapshot() as session:
        importing = select(Task.subject).where(Task.kind == TaskKind.IMPORT, Task.claim_id.is_not(None))
        if session.scalar(importing.limit(1)) is not None:
            return set()
        of_bases = select(BaseModelRow.digest).where(BaseModelRow.digest.in_(digests))
        existing = set(session.scalars(of_bases.where(IS_THERE)))
        of_jobs = select(Job.base_digest).where(Job.base_digest.in_(digests)).distinct()
        known = {*session.scalars(of_bases), *session.scalars(of_jobs)}
        needed = set(session.scalars(of_jobs.where(Job.state.in_(UNFINISHED_STATES))))
        return {digest for digest in known - existing - needed if digest is not None}


def list_all(db: Database) -> list[BaseModelRow]:
    """Return all base models sorted by name, without their manifests."""
    with db.read() as session:
        existing = select(BaseModelRow).where(IS_THERE).options(defer(BaseModelRow.manifest, raiseload=True))
        return list(session.scalars(existing.order_by(BaseModelRow.name)))


def get(db: Database, name: str) -> BaseModelRow:
    """Return the base model. Raises NotFound, which lists the available names."""
    with db.read() as session:
        return find(session, name)


def exists(db: Database, name: str) -> bool:
    with db.read() as session:
        return session.scalar(select(BaseModelRow.name).where(BaseModelRow.name == name, IS_THERE)) is not None


def find(session: Session, name: str, *, lock: Literal["share", "update"] | None = None) -> BaseModelRow:
    """Like `get`, within a transaction. lock: "share" prevents its deletion until the transaction ends."""
    row = get_once(session, BaseModelRow, name, lock=lock)
    if row is None or row.state == "deleted":
        raise _unknown(session, name)
    return row


def _unknown(session: Session, wanted: str) -> NotFound:
    """Return the error for an unknown name, with the usable base models, and how an operator adds one under the name.

    A name with a slash is taken for a hub id.
    """
    usable = select(BaseModelRow).where(BaseModelRow.state.in_(("ready", "importing"))).order_by(BaseModelRow.name)
    known = [row.name if row.state == "ready" else f"{row.name} (importing)" for row in session.scalars(usable)]
    values = {"name": wanted, "known": ", ".join(known), "short": wanted.rpartition("/")[2].lower()[:64]}
    if re.fullmatch(r"[\w.-]+/[\w.-]+", wanted):
        return NotFound("hub_model_not_found" if known else "first_hub_model_not_found", param="model", **values)
    if not LABEL.match(wanted):
        return NotFound(
            "invalid_model_not_found" if known else "first_invalid_model_not_found", param="model", **values
        )
    return NotFound("model_not_found" if known else "first_model_not_found", param="model", **values)


def inspect_import(db: Database, task: TaskClaim) -> BaseModelRow:
    """Return the base model of a claimed task. Raises StaleClaim."""
    with db.write() as session:
        return task_queue.hold(session, task, BaseModelRow)


def finish_import(db: Database, task: TaskClaim, *, digest: str, manifest: Json, description: Json) -> None:
    """Mark the base model as ready. Raises StaleClaim, also if the model was deleted."""
    with db.write() as session:
        row = task_queue.hold(session, task, BaseModelRow)
        row.state, row.digest, row.manifest, row.description = "ready", digest, manifest, description
        row.error = None
        task_queue.finish(session, task)


def _fail_import(_session: Session, row: BaseModelRow, error: ErrorText, _is_refused: bool) -> None:
    row.state, row.error = "failed", error.report()


def _postpone_import(_session: Session, row: BaseModelRow, error: ErrorText | None, _run_after: float | None) -> None:
    row.error = error and error.report()


IMPORT = TaskSubject(table=BaseModelRow, lost="import_lost", fail=_fail_import, postpone=_postpone_import)


def _note(session: Session, type: AuditType, name: str, *, details: Json) -> None:  # noqa: A002
    """Write an audit event. It has no project, because base models belong to none."""
    log.note(session, type, now=read_clock(session), object_id=name, project_id=None, details=details)


def _begin(session: Session, row: BaseModelRow, wanted: dict[str, str | None]) -> None:
    for field, value in wanted.items():
        setattr(row, field, value)
    row.digest = None
    row.state, row.created_at = "importing", read_clock(session)


def _template(given: str) -> str:
    """Return the text of a template, which is given itself or by its name."""
    if given in TEMPLATES or "{" in given:
        return TEMPLATES.get(given, given)
    raise InvalidRequest(
        "invalid_chat_template", given=given[:80], templates=", ".join(TEMPLATES), param="chat_template"
    )


def _check(name: str, kind: str, source: str) -> None:
    if not LABEL.match(name):
        fault = label_fault(name)
        raise InvalidRequest("invalid_base_model_name", name=name[:80], fault=fault, param="name")
    if kind not in KINDS:
        raise InvalidRequest("invalid_kind", kind=kind, param="kind")
    if not re.fullmatch(SOURCE_PATTERN, source):
        control = re.search(r"[\x00-\x1f\x7f]", source)
        if control is None:
            raise InvalidRequest("source_blank", param="source")
        raise InvalidRequest(
            "source_with_control_character", control=control[0], start=control.start() + 1, param="source"
        )
