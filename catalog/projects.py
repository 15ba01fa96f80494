"""Projects: whose files, jobs and adapters are whose."""

from __future__ import annotations

from sqlalchemy import select

from catalog.db import Database, read_clock, serialise
from catalog.errors import InvalidRequest
from catalog.spec import LABEL
from catalog.tables import Project, new_id


def ensure(db: Database, name: str = "default") -> Project:
    """The project of that name, made if there is none."""
    if not LABEL.match(name):
        raise InvalidRequest(
            f"{name!r} cannot be a project's name.",
            code="invalid_name",
            remedy="Use letters, digits, dot, underscore and hyphen; at most 64, the first a letter or digit.",
            param="name",
        )
    with db.write() as session:
        serialise(session, f"project {name}")
        found = session.scalar(select(Project).where(Project.name == name))
        if found is None:
            found = Project(id=new_id("proj"), name=name, created_at=read_clock(session))
            session.add(found)
        return found
