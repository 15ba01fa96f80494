"""Checks that a sweep may still create trials: its creator's key must be valid and its project not archived.

The controller acts for the creator of a sweep long after the request, and must not do what the creator no longer may.
"""

from __future__ import annotations

from sqlalchemy.orm import Session

from catalog.audit import log
from catalog.db.database import get_once
from catalog.error_texts import ErrorText
from catalog.tables.sweeps import Sweep
from catalog.tables.table import Json
from catalog.tables.tenancy import ApiKey, Project
from catalog.tenancy.authentication import is_live


def why_ended(session: Session, sweep: Sweep, *, now: float) -> Json | None:
    """Return the error with which the sweep must be closed, or None if it may create trials.

    A concurrent revocation waits until the transaction has ended.
    """
    project = session.get_one(Project, sweep.project_id)
    if project.archived_at is not None:
        return ErrorText.of("project_of_sweep_archived", project=project.name).as_job_error()
    key = _valid_or_last(session, sweep.created_by, now=now)
    if key is not None and is_live(key, now):
        return None
    if key is not None and key.revoked_at is None:
        return ErrorText.of("api_key_expired", key=key.id).as_job_error()
    return ErrorText.of("api_key_revoked", key=key.id if key else sweep.created_by).as_job_error()


def close(session: Session, sweep: Sweep, error: Json, *, now: float) -> None:
    """Close the sweep with this error. The audit event names the server as the actor, and the error's code."""
    sweep.is_closed, sweep.error = True, error
    details: Json = {"reason": error["code"]}
    log.note(
        session,
        "sweep.closed",
        now=now,
        object_id=sweep.id,
        project_id=sweep.project_id,
        details=details,
        actor=log.SERVER,
    )


def _valid_or_last(session: Session, key_id: str, *, now: float) -> ApiKey | None:
    """Return the key, or the key that replaced it if a rotation has ended it, because rotation keeps sweeps running.

    A revoked key has no successor here, even if it was rotated.
    """
    key = get_once(session, ApiKey, key_id, lock="share")
    while key is not None and key.revoked_at is None and not is_live(key, now) and key.replaced_by is not None:
        key = get_once(session, ApiKey, key.replaced_by, lock="share")
    return key
