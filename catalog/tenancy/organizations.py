"""Organizations: whose projects are whose. Operators make and rename them, and reach beyond them; others see their own.

A project stays in its organization for good. What it shares, it shares within it.
"""

from __future__ import annotations

from collections.abc import Collection

from sqlalchemy import or_, select
from sqlalchemy.orm import Session

from catalog.audit import log
from catalog.audit.log import AuditType
from catalog.caller import Caller
from catalog.db.database import Database, read_clock, serialize
from catalog.db.pagination import Page, paginate
from catalog.errors import Conflict, InvalidRequest, NotFound
from catalog.spec.strict import LABEL
from catalog.tables.table import Json, new_id
from catalog.tables.tenancy import Organization, Project

FIRST = "default"
ID_PREFIX = "org"


def create(db: Database, name: str, *, is_client_retry: bool = False) -> Organization:
    """Raises Conflict where the name is taken; not where the client sends this again, having had no reply."""
    check_name(name, "an organization's", id_prefix=ID_PREFIX)
    with db.write() as session:
        serialize(session, "organizations")
        found = _named(session, name)
        if found is not None and not is_client_retry:
            raise _taken(name)
        return found or _add(session, name)


def get(db: Database, *, caller: Caller, organization: str) -> Organization:
    """By id or by name. Raises NotFound, too, for what is not the caller's, save for operators."""
    with db.read() as session:
        return find(session, caller=caller, organization=organization)


def list_page(db: Database, *, caller: Caller, after: str | None = None, limit: int = 20) -> Page[Organization]:
    """Newest first; the caller's own, and for operators all."""
    scope = select(Organization)
    if not caller.is_operator:
        scope = scope.where(Organization.id == caller.organization_id)
    with db.read() as session:
        created, ident = Organization.created_at, Organization.id
        return paginate(session, scope, created=created, ident=ident, after=after, limit=limit)


def rename(db: Database, *, caller: Caller, organization: str, name: str) -> Organization:
    """Raises NotFound, and Conflict where the name is taken."""
    check_name(name, "an organization's", id_prefix=ID_PREFIX)
    with db.write() as session:
        serialize(session, "organizations")
        row = find(session, caller=caller, organization=organization)
        other = _named(session, name)
        if other is not None and other.id != row.id:
            raise _taken(name)
        now, details = read_clock(session), {"name": name, "was": row.name}
        _note(session, "organization.updated", row, now=now, details=details)
        row.name = name
        return row


def find(
    session: Session, *, organization: str, caller: Caller | None = None, param: str | None = None
) -> Organization:
    """As `get`, in a transaction of one's own. caller None: an operator's. One's id goes before another's name."""
    by_id = Organization.id == organization
    named = select(Organization).where(or_(by_id, Organization.name == organization)).order_by(by_id.desc()).limit(1)
    if caller is not None and not caller.is_operator:
        named = named.where(Organization.id == caller.organization_id)
    row = session.scalar(named)
    if row is None:
        remedy = "`lorry organizations list` shows those that you can see."
        raise NotFound("organization", organization, param=param, remedy=remedy)
    return row


def oldest(session: Session) -> Organization:
    """Made where there is none."""
    serialize(session, "organizations")
    found = session.scalar(select(Organization).order_by(Organization.created_at, Organization.id).limit(1))
    return found or _add(session, FIRST)


def ids_by_project(db: Database, project_ids: Collection[str]) -> dict[str, str]:
    """Whose these projects are."""
    owners = select(Project.id, Project.organization_id).where(Project.id.in_(project_ids))
    with db.read() as session:
        return {row[0]: row[1] for row in session.execute(owners)}


def check_name(name: str, whose: str, *, id_prefix: str) -> None:
    """Of an organization or a project, which is found by id or name: a name looks like no id. Raises InvalidRequest."""
    if not LABEL.match(name) or name.startswith(f"{id_prefix}-"):
        raise InvalidRequest(
            f"{name!r} cannot be {whose} name.",
            code="invalid_name",
            remedy="Use letters, digits, dot, underscore and hyphen; at most 64, the first a letter or digit, "
            f"and not beginning with {id_prefix}-, as ids do.",
            param="name",
        )


def _named(session: Session, name: str) -> Organization | None:
    return session.scalar(select(Organization).where(Organization.name == name))


def _add(session: Session, name: str) -> Organization:
    row = Organization(id=new_id(ID_PREFIX), name=name, created_at=read_clock(session), created_by=log.actor_id())
    session.add(row)
    session.flush()  # its projects name it
    _note(session, "organization.created", row, now=row.created_at, details={"name": name})
    return row


def _note(session: Session, type: AuditType, row: Organization, *, now: float, details: Json) -> None:  # noqa: A002
    log.note(session, type, now=now, object_id=row.id, project_id=None, details=details)


def _taken(name: str) -> Conflict:
    return Conflict(
        f"There is an organization with the name {name!r}.",
        code="organization_exists",
        remedy="Choose another name. `lorry organizations list` shows all of them.",
        param="name",
    )
