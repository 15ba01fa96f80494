"""Projects: the owners of files, jobs and adapters. Operators create, archive and see all projects; others their own.

Names of projects are unique in the whole service, because names of adapters start with them.
"""

from __future__ import annotations

import math

from sqlalchemy import or_, select
from sqlalchemy.orm import Session

from catalog.audit import log
from catalog.audit.log import AuditType
from catalog.db.database import Database, read_clock, serialize
from catalog.db.pagination import Page, paginate
from catalog.errors import Conflict, InvalidRequest, NotFound
from catalog.tables.table import Json, new_id
from catalog.tables.tenancy import Organization, Project
from catalog.tenancy import organizations
from catalog.tenancy.authentication import Caller, lasting_operators
from catalog.tenancy.organizations import check_name

ID_PREFIX = "proj"


def ensure(db: Database, name: str = "default") -> Project:
    """Return the project with this name. If there is none, creates it in the oldest organization."""
    with db.write() as session:
        serialize(session, "projects")
        found = _named(session, name)
        if found is None:
            _check_name(name)
            found = _add(session, name, organizations.oldest(session))
        return found


def first(db: Database) -> Project:
    """Return the oldest project that is not archived, else the archived project `default`, or create that project."""
    with db.write() as session:
        serialize(session, "projects")
        kept = select(Project).where(Project.archived_at.is_(None)).order_by(Project.created_at, Project.id)
        found = session.scalar(kept.limit(1))
        return found or _named(session, "default") or _add(session, "default", organizations.oldest(session))


def create(db: Database, name: str, *, organization: str | None = None, is_client_retry: bool = False) -> Project:
    """Create a project. organization: id or name; None: the oldest.

    is_client_retry: the client repeats a request that had no reply; a project with this name in the organization is
    then returned. Raises NotFound for the organization, and Conflict if the name is taken.
    """
    _check_name(name)
    with db.write() as session:
        serialize(session, "projects")
        found = _named(session, name)
        if organization is None:
            owner = organizations.oldest(session)
        else:
            owner = organizations.find(session, organization=organization, param="organization")
        if found is not None and not (is_client_retry and found.organization_id == owner.id):
            raise _name_taken(found)
        return found or _add(session, name, owner)


def get(db: Database, *, caller: Caller, project: str) -> Project:
    """Return the project with this id or name. Raises NotFound, for callers without operator rights also if it
    is not their own."""
    with db.read() as session:
        return find(session, caller=caller, project=project)


def list_page(
    db: Database, *, caller: Caller, after: str | None = None, limit: int = 20, archived: bool = False
) -> Page[Project]:
    """Return a page of projects, newest first: all for operators, otherwise the caller's own. archived: include
    archived ones."""
    scope = select(Project)
    if not caller.is_operator:
        scope = scope.where(Project.id == caller.project_id)
    visible = () if archived else (Project.archived_at.is_(None),)
    with db.read() as session:
        return paginate(
            session, scope, created=Project.created_at, ident=Project.id, after=after, limit=limit, visible=visible
        )


def rename(db: Database, *, caller: Caller, project: str, name: str) -> Project:
    """Rename the project. Existing adapters keep their names. Raises NotFound, and Conflict if the name is taken."""
    _check_name(name)
    with db.write() as session:
        serialize(session, "projects")
        row = find(session, caller=caller, project=project)
        other = _named(session, name)
        if other is not None and other.id != row.id:
            raise _name_taken(other)
        _note(session, "project.updated", row, now=read_clock(session), details={"name": name, "was": row.name})
        row.name = name
        return row


def archive(db: Database, *, caller: Caller, project: str) -> Project:
    """Archive the project: its keys stop working. Its data stays, and its jobs continue to run.

    Raises NotFound, and Conflict if no operator key would be left that can restore the project.
    """
    with db.write() as session:
        serialize(session, "operators' keys")
        row = find(session, caller=caller, project=project)
        now = read_clock(session)
        if row.archived_at is None:
            if all(key.project_id == row.id for key in lasting_operators(session, now=now)):
                raise Conflict("project_of_last_operator_key", name=row.name, param="project")
            row.archived_at = now
            _note(session, "project.archived", row, now=now)
        return row


def restore(db: Database, *, caller: Caller, project: str) -> Project:
    """Restore an archived project: its keys work again. Raises NotFound."""
    with db.write() as session:
        row = find(session, caller=caller, project=project, listed_by="lorry projects list --archived")
        if row.archived_at is not None:
            row.archived_at = None
            _note(session, "project.restored", row, now=read_clock(session))
        return row


def find(
    session: Session,
    *,
    caller: Caller,
    project: str,
    param: str | None = None,
    same_organization_as: Project | None = None,
    listed_by: str = "lorry projects list",
) -> Project:
    """Return the project as `get` does, inside a transaction.

    If another project is passed, the project must be in the organization of that one, even for an operator. listed_by:
    the command that shows the possible projects, for errors.
    """
    named = select(Project).where(or_(Project.id == project, Project.name == project))
    shared_in: Organization | None = None
    if same_organization_as is not None:
        shared_in = session.get_one(Organization, same_organization_as.organization_id)
        named = named.where(Project.organization_id == shared_in.id)
    row = session.scalar(named if caller.is_operator else named.where(Project.id == caller.project_id))
    if row is None:
        if shared_in is None:
            raise NotFound("project_not_found", project=project, listed_by=listed_by, param=param)
        raise NotFound("project_of_organization_not_found", shared_in=shared_in.name, project=project, param=param)
    return row


def _check_name(name: str) -> None:
    check_name(name, "a project", id_prefix=ID_PREFIX)


def _named(session: Session, name: str) -> Project | None:
    return session.scalar(select(Project).where(Project.name == name))


def _add(session: Session, name: str, owner: Organization) -> Project:
    row = Project(id=new_id(ID_PREFIX), organization_id=owner.id, name=name)
    row.created_at, row.created_by = read_clock(session), log.actor_id()
    session.add(row)
    details = {"name": name, "organization_id": owner.id}
    _note(session, "project.created", row, now=row.created_at, details=details)
    return row


def _note(session: Session, type: AuditType, row: Project, *, now: float, details: Json | None = None) -> None:  # noqa: A002
    log.note(session, type, now=now, object_id=row.id, project_id=row.id, details=details)


def _name_taken(existing: Project) -> Conflict:
    return Conflict(
        "project_exists" if existing.archived_at is None else "archived_project_exists",
        name=existing.name,
        id=existing.id,
        param="name",
    )


def set_weight(db: Database, *, caller: Caller, project: str, weight: float) -> Project:
    """Set the project's fair-share weight. Raises NotFound, and InvalidRequest for an invalid weight."""
    if not (math.isfinite(weight) and weight > 0):
        raise InvalidRequest("invalid_project_weight", weight=weight, param="weight")
    with db.write() as session:
        row = find(session, caller=caller, project=project)
        _note(session, "project.updated", row, now=read_clock(session), details={"weight": weight, "was": row.weight})
        row.weight = weight
        return row
