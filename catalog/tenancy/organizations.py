"""Organizations: groups of projects. Operators create, rename and see all of them; other callers see only their own.

A project can't change its organization, and shares models only within it.
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
from catalog.spec.model_fields import LABEL, label_fault
from catalog.tables.table import Json, new_id
from catalog.tables.tenancy import Organization, Project

FIRST = "default"
ID_PREFIX = "org"


def create(db: Database, name: str, *, is_client_retry: bool = False) -> Organization:
    """Create an organization. Raises Conflict if the name is taken.

    is_client_retry: the client repeats a request that had no reply; the organization with the name is then returned.
    """
    check_name(name, "an organization", id_prefix=ID_PREFIX)
    with db.write() as session:
        serialize(session, "organizations")
        found = _named(session, name)
        if found is not None and not is_client_retry:
            raise _name_taken(found)
        return found or _add(session, name)


def get(db: Database, *, caller: Caller, organization: str) -> Organization:
    """Return the organization with this id or name. Raises NotFound, for callers without operator rights
    also if it is not their own."""
    with db.read() as session:
        return find(session, caller=caller, organization=organization)


def list_page(db: Database, *, caller: Caller, after: str | None = None, limit: int = 20) -> Page[Organization]:
    """Return a page of organizations, newest first: all for operators, otherwise the caller's own."""
    scope = select(Organization)
    if not caller.is_operator:
        scope = scope.where(Organization.id == caller.organization_id)
    with db.read() as session:
        created, ident = Organization.created_at, Organization.id
        return paginate(session, scope, created=created, ident=ident, after=after, limit=limit)


def rename(db: Database, *, caller: Caller, organization: str, name: str) -> Organization:
    """Rename the organization. Raises NotFound, and Conflict if the name is taken."""
    check_name(name, "an organization", id_prefix=ID_PREFIX)
    with db.write() as session:
        serialize(session, "organizations")
        row = find(session, caller=caller, organization=organization)
        other = _named(session, name)
        if other is not None and other.id != row.id:
            raise _name_taken(other)
        now, details = read_clock(session), {"name": name, "was": row.name}
        _note(session, "organization.updated", row, now=now, details=details)
        row.name = name
        return row


def find(
    session: Session, *, organization: str, caller: Caller | None = None, param: str | None = None
) -> Organization:
    """Return the organization as `get` does, inside a transaction.

    caller: None: an operator.
    """
    named = select(Organization).where(or_(Organization.id == organization, Organization.name == organization))
    if caller is not None and not caller.is_operator:
        named = named.where(Organization.id == caller.organization_id)
    row = session.scalar(named)
    if row is None:
        raise NotFound("organization_not_found", organization=organization, param=param)
    return row


def oldest(session: Session) -> Organization:
    """Return the oldest organization. Creates one if there is none."""
    serialize(session, "organizations")
    found = session.scalar(select(Organization).order_by(Organization.created_at, Organization.id).limit(1))
    return found or _add(session, FIRST)


def ids_by_project(db: Database, project_ids: Collection[str]) -> dict[str, str]:
    """Return the ids of the projects' organizations by project id."""
    owners = select(Project.id, Project.organization_id).where(Project.id.in_(project_ids))
    with db.read() as session:
        return {row[0]: row[1] for row in session.execute(owners)}


def check_name(name: str, thing: str, *, id_prefix: str) -> None:
    """Check the name of an organization or a project. Both are found by id or name, so a name must not look like an id.

    thing: the noun with its article, for the message. Raises InvalidRequest.
    """
    if not LABEL.match(name):
        fault = label_fault(name)
        raise InvalidRequest("invalid_name", name=name[:80], thing=thing, fault=fault, param="name")
    if name.startswith(f"{id_prefix}-"):
        raise InvalidRequest("name_looks_like_id", name=name, thing=thing, id_prefix=id_prefix, param="name")


def _named(session: Session, name: str) -> Organization | None:
    return session.scalar(select(Organization).where(Organization.name == name))


def _add(session: Session, name: str) -> Organization:
    row = Organization(id=new_id(ID_PREFIX), name=name, created_at=read_clock(session), created_by=log.actor_id())
    session.add(row)
    session.flush()  # before the rows of its projects, which refer to it
    _note(session, "organization.created", row, now=row.created_at, details={"name": name})
    return row


def _note(session: Session, type: AuditType, row: Organization, *, now: float, details: Json) -> None:  # noqa: A002
    log.note(session, type, now=now, object_id=row.id, project_id=None, details=details)


def _name_taken(existing: Organization) -> Conflict:
    return Conflict("organization_exists", name=existing.name, id=existing.id, param="name")
