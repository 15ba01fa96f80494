"""API keys, one-time sign-in links and browser sessions. Only HMACs are stored: a stolen database grants no access."""

from __future__ import annotations

import hmac
import re
import secrets
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache
from typing import Literal

from sqlalchemy import Select, delete, select, update
from sqlalchemy.orm import Session

from catalog.audit import log
from catalog.audit.log import Actor, AuditType
from catalog.caller import Caller
from catalog.db.database import Database, clock_of, get_once, read_clock, serialize
from catalog.errors import NotFound, OutOfSpace, RejectionReason, Unauthorized, Unavailable
from catalog.pepper import Pepper
from catalog.states import PriorityClass
from catalog.tables.table import Json, new_id
from catalog.tables.tenancy import ApiKey, Organization, Project, SignIn
from catalog.tenancy.scopes import granted

ENDING_CHARACTERS = 4
KEY_TEXT = re.compile(r"lorry_key-[0-9a-f]{24}_[\w-]{43}", re.ASCII)
SECRET_TEXT = re.compile(rf"{KEY_TEXT.pattern}|[\w-]{{43}}", re.ASCII)
"""Pattern of a key, or of the secret of a sign-in link or browser session. Each has 256 random bits."""
LAST_USED_SECONDS = 60
"""Resolution of `last_used_at`. It is coarse, so that most requests that only read do not write."""


def create(
    db: Database,
    *,
    project_id: str,
    name: str,
    pepper: Pepper,
    is_operator: bool = False,
    expires_at: float | None = None,
    scopes: Sequence[str] | None = None,
) -> tuple[ApiKey, str]:
    """Create a key. Returns its row and its secret, which can't be shown again.

    scopes: None: all that its kind can have. This function checks no rights; catalog.tenancy.api_keys does.
    """
    key, secret = new_key(project_id, name, pepper)
    with db.write() as session:
        key.is_operator, key.created_at, key.expires_at = is_operator, read_clock(session), expires_at
        key.scopes = None if scopes is None else list(scopes)
        add(session, key)
    return key, secret


def create_first(db: Database, *, project_id: str, name: str, pepper: Pepper) -> str | None:
    """Create an operator key if there is no key yet. Returns its secret, or None. Only one concurrent call succeeds."""
    key, secret = new_key(project_id, name, pepper)
    with db.write() as session:
        serialize(session, "first key")
        if session.scalar(select(ApiKey.id).limit(1)) is not None:
            return None
        key.is_operator, key.created_at = True, read_clock(session)
        add(session, key)
    return secret


def add(session: Session, key: ApiKey, *, created_by: str | None = None) -> None:
    """Store a new key. created_by: the id of the key that requests it; None: a command on the server."""
    key.created_by = created_by or log.actor_id()
    session.add(key)
    details = {"name": key.name, "is_operator": key.is_operator, "scopes": key.scopes, "expires_at": key.expires_at}
    limits = {"requests_per_minute": key.requests_per_minute, "jobs_per_day": key.jobs_per_day}
    limits |= {"highest_priority": PriorityClass(key.highest_priority).name}
    note(session, "api_key.created", key, now=key.created_at, details={**details, **limits})


def note(
    session: Session,
    type: AuditType,  # noqa: A002
    key: ApiKey,
    *,
    now: float,
    details: Json | None = None,
    by: Actor | None = None,
) -> None:
    """Write an audit event about a key. by: the actor, if it is not the current one."""
    log.note(session, type, now=now, object_id=key.id, project_id=key.project_id, details=details, actor=by)


def an_operator(db: Database) -> str:
    """Return the id of a valid operator key: preferably one with every scope, then one that was not rotated, then the
    oldest. Raises NotFound."""
    with db.read() as session:
        now = read_clock(session)
        live = [key for key in session.scalars(_operators()) if is_live(key, now)]
    if live:
        return min(live, key=lambda key: (key.scopes is not None, key.replaced_by is not None)).id
    raise NotFound("operator_key_not_found")


def lasting_operators(session: Session, *, now: float) -> list[ApiKey]:
    """Return the operator keys that keep the service manageable: valid, with every scope, without an expiration, and
    not rotated. If there is none, return valid operator keys that can create further keys."""
    keys = [key for key in session.scalars(_operators()) if is_live(key, now) and key.replaced_by is None]
    lasting = [key for key in keys if is_lasting(key)]
    return lasting or [key for key in keys if "keys:write" in granted(key.scopes, is_operator=True)]


def is_lasting(key: ApiKey) -> bool:
    """Return whether an operator key has every scope and no expiration."""
    return key.expires_at is None and granted(key.scopes, is_operator=True) == granted(None, is_operator=True)


def authenticate(db: Database, *, secret: str, pepper: Pepper) -> Caller:
    """Return the caller with this key. Raises Unauthorized for an unknown, expired or revoked one.

    During a rotation of the pepper, a key that is hashed with the previous pepper is rehashed with the current one.
    """
    given = pepper.digests(secret)
    parts = secret.split("_", 2)
    key_id = parts[1] if len(parts) == 3 else ""
    with db.read() as session:
        named = _owned().add_columns(clock_of(session)).where(ApiKey.id == key_id)  # runs once per request
        found = session.execute(named).one_or_none()
        digest = found[0].digest if found else ""
        is_same = [hmac.compare_digest(digest, candidate) for candidate in given]
        if not any(is_same) or found is None:
            raise _key_refused("unknown" if KEY_TEXT.fullmatch(secret) else "malformed")
        if not is_live(found[0], found[3]):
            raise _key_refused("expired" if found[0].revoked_at is None else "revoked", api_key_id=found[0].id)
        key, project, organization, now = found
        caller = _caller(key, project, organization)
    if key.last_used_at is None or key.last_used_at < now - LAST_USED_SECONDS or not is_same[0]:
        _note_use(db, key, digest=given[0], now=now)
    return caller


def new_key(project_id: str, name: str, pepper: Pepper) -> tuple[ApiKey, str]:
    """Return a key's row, which is not stored yet, and its secret."""
    key = ApiKey(id=new_id("key"), project_id=project_id, name=name, highest_priority=PriorityClass.normal)
    secret = f"lorry_{key.id}_{secrets.token_urlsafe(32)}"
    key.digest, key.ending = pepper.digest(secret), secret[-ENDING_CHARACTERS:]
    return key, secret


def check_valid(session: Session, api_key_id: str, *, now: float) -> None:
    """Check the key again in the transaction that acts for it: it may have been revoked since the request was
    authenticated. A concurrent revocation waits until the transaction has ended. Raises Unauthorized."""
    key = get_once(session, ApiKey, api_key_id, lock="share")
    if key is None:
        raise _key_refused("unknown")
    if not is_live(key, now):
        raise _key_refused("expired" if key.revoked_at is None else "revoked", api_key_id=key.id)


def is_live(key: ApiKey, now: float) -> bool:
    """Return whether the key is neither revoked nor expired."""
    return key.revoked_at is None and (key.expires_at is None or key.expires_at > now)


def create_sign_in_link(db: Database, *, api_key_id: str, pepper: Pepper, seconds: float = 900) -> str:
    """Return a token that can be exchanged once for a browser session."""
    token = secrets.token_urlsafe(32)
    with db.write() as session:
        now = read_clock(session)
        session.execute(delete(SignIn).where(SignIn.expires_at <= now))
        session.add(
            SignIn(
                id=new_id("signin"),
                api_key_id=api_key_id,
                link_digest=pepper.digest(token),
                created_at=now,
                expires_at=now + seconds,
            )
        )
        note(session, "sign_in_link.created", session.get_one(ApiKey, api_key_id), now=now)
    return token


def read_sign_in_link(db: Database, *, token: str, pepper: Pepper) -> tuple[Caller, float]:
    """Return the caller that the link signs in, and the link's expiration, without using it. Raises Unauthorized."""
    with db.read() as session:
        now = read_clock(session)
        unused = (SignIn.link_digest.in_(pepper.digests(token)), SignIn.expires_at > now)
        linked = _owned().add_columns(SignIn.expires_at).join(SignIn, SignIn.api_key_id == ApiKey.id).where(*unused)
        found = session.execute(linked).one_or_none()
        if found is None or not is_live(found[0], now):
            raise _link_refused()
        key, project, organization, end = found
        return _caller(key, project, organization), end


def exchange_sign_in(db: Database, *, token: str, pepper: Pepper, seconds: float = 12 * 3600) -> str:
    """Exchange a link's token for the secret of a browser session. Raises Unauthorized if it was used or expired."""
    browser = secrets.token_urlsafe(32)
    with db.write() as session:
        now = read_clock(session)
        unused = (SignIn.link_digest.in_(pepper.digests(token)), SignIn.expires_at > now)
        sign_in = session.scalar(select(SignIn).where(*unused).with_for_update())
        if sign_in is None:
            raise _link_refused()
        sign_in.link_digest, sign_in.browser_digest = None, pepper.digest(browser)
        sign_in.expires_at = now + seconds
        _note_sign_in(session, "login.succeeded", sign_in, now=now)
    return browser


def authenticate_browser(db: Database, *, secret: str, pepper: Pepper) -> Caller:
    """Return the caller of the browser session. Raises Unauthorized if the session has ended."""
    with db.read() as session:
        now = read_clock(session)
        live = (SignIn.browser_digest.in_(pepper.digests(secret)), SignIn.expires_at > now)
        signed_in = _owned().add_columns(SignIn.expires_at).join(SignIn, SignIn.api_key_id == ApiKey.id).where(*live)
        found = session.execute(signed_in).one_or_none()
        if found is None or not is_live(found[0], now):
            raise Unauthorized("browser_session_ended", reason="session_ended")
        key, project, organization, end = found
        return replace(_caller(key, project, organization), is_browser=True, expires_at=min(end, key.expires_at or end))


def end_browser(db: Database, *, secret: str, pepper: Pepper) -> None:
    """End the browser session, if it exists."""
    with db.write() as session:
        sign_in = session.scalar(select(SignIn).where(SignIn.browser_digest.in_(pepper.digests(secret))))
        if sign_in is not None:
            _note_sign_in(session, "logout.succeeded", sign_in, now=read_clock(session))
            session.delete(sign_in)


def _note_sign_in(
    session: Session,
    type: Literal["login.succeeded", "logout.succeeded"],  # noqa: A002
    sign_in: SignIn,
    *,
    now: float,
) -> None:
    """Write the audit event. Its actor is the browser, with the id and name of the key that signed it in."""
    key = session.get_one(ApiKey, sign_in.api_key_id)
    note(session, type, key, now=now, by=Actor(type="browser", id=key.id, name=key.name))


def _note_use(db: Database, key: ApiKey, *, digest: str, now: float) -> None:
    """Update the key's last use and digest. While the database can't be written, requests succeed without this.

    digest: hashed with the current pepper.
    """
    with suppress(OutOfSpace, Unavailable), db.write_briefly() as session:
        unchanged = (ApiKey.id == key.id, ApiKey.digest == key.digest)
        session.execute(update(ApiKey).where(*unchanged).values(last_used_at=now, digest=digest))


def _operators() -> Select[ApiKey]:
    """Select the operator keys of projects that are not archived, the oldest first."""
    operators = select(ApiKey).join(Project).where(ApiKey.is_operator.is_(True), Project.archived_at.is_(None))
    return operators.order_by(ApiKey.created_at, ApiKey.id)


@cache
def _owned() -> Select[ApiKey, Project, Organization]:
    """Select keys with their projects and organizations."""
    with_project = select(ApiKey, Project, Organization).join(Project, Project.id == ApiKey.project_id)
    return with_project.join(Organization, Organization.id == Project.organization_id)


def _caller(key: ApiKey, project: Project, organization: Organization) -> Caller:
    """Return the caller with this key. Raises Unauthorized if the project is archived."""
    if project.archived_at is not None:
        raise Unauthorized("project_archived", project=project.name, reason="project_archived", api_key_id=key.id)
    return Caller(
        api_key_id=key.id,
        project_id=project.id,
        project_name=project.name,
        organization_id=organization.id,
        organization_name=organization.name,
        is_operator=key.is_operator,
        name=key.name,
        scopes=granted(key.scopes, is_operator=key.is_operator),
        is_limited=key.scopes is not None,
        expires_at=key.expires_at,
        requests_per_minute=key.requests_per_minute,
        jobs_per_day=key.jobs_per_day,
        highest_priority=key.highest_priority,
    )


def _key_refused(reason: RejectionReason, *, api_key_id: str | None = None) -> Unauthorized:
    """Return the error, which is the same for every reason. The reason is only counted and logged."""
    return Unauthorized("invalid_api_key", reason=reason, api_key_id=api_key_id)


def _link_refused() -> Unauthorized:
    return Unauthorized("invalid_sign_in_link", reason="sign_in_link")
