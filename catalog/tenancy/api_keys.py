"""Creates, lists, rotates and limits API keys. A caller can't grant more rights than it has.

A caller may rotate and revoke its own key, and other keys only if it could have created them. catalog/revocation.py
revokes keys.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from sqlalchemy import func, or_, select
from sqlalchemy.orm import Session

from catalog.db.database import Database, read_clock, serialize
from catalog.db.pagination import Page, paginate
from catalog.errors import Conflict, Forbidden, InvalidRequest, NotFound, listed
from catalog.pepper import Pepper
from catalog.states import Priority, PriorityClass
from catalog.tables.table import Json
from catalog.tables.tenancy import ApiKey, Project
from catalog.tenancy import authentication, projects
from catalog.tenancy.authentication import Caller, is_live, lasting_operators, new_key
from catalog.tenancy.scopes import OPERATORS, granted

MAX_VALID_KEYS = 100
"""Maximum per project. Each key has its own limits of requests and downloads, so their number must be limited."""


@dataclass(frozen=True, kw_only=True, slots=True)
class KeyRequest:
    """The properties of a key to create."""

    name: str
    project: str | None = None
    """Id or name of the project; None: the caller's."""
    scopes: Sequence[str] | None = None
    """None: all that the caller can grant."""
    is_operator: bool = False
    expires_at: float | None = None
    """None: the caller's expiration."""
    requests_per_minute: int | None = None
    jobs_per_day: int | None = None
    """Both limits: None: the caller's. Only operators can set another limit."""
    highest_priority: Priority | None = None
    """None: `normal`, or the caller's if that is lower. Only operators can set another one."""


def create(
    db: Database, *, caller: Caller, request: KeyRequest, pepper: Pepper, idempotency_key: str | None = None
) -> tuple[ApiKey, str]:
    """Create a key. Returns its row and its secret, which is not stored and can't be shown again.

    Raises Forbidden for more rights than the caller has, and Unauthorized if the caller's key was revoked meanwhile.
    Raises Conflict if the project has MAX_VALID_KEYS, or if the caller has already created a key with this
    Idempotency-Key: a repeated request must not create a second key, and the secret can't be returned again.
    """
    wanted = _wanted_scopes(caller, request)
    limits = {"requests_per_minute": request.requests_per_minute, "jobs_per_day": request.jobs_per_day}
    given = {name: value for name, value in limits.items() if value is not None}
    highest = request.highest_priority
    _check_limits(caller, [*given, *(["highest_priority"] if highest is not None else [])])
    copies_scopes = request.scopes is None and not caller.is_limited
    with db.write() as session:
        now = _begin(session, caller)
        if idempotency_key is not None:
            _check_unused(session, caller, idempotency_key)
        project_id = caller.project_id
        if request.project is not None:
            project_id = projects.find(session, caller=caller, project=request.project, param="project").id
        key, secret = new_key(project_id, request.name, pepper)
        key.is_operator, key.created_at = request.is_operator, now
        key.scopes = None if copies_scopes else sorted(wanted)
        key.expires_at = _expiry(caller, request.expires_at, caller.expires_at, now=now)
        key.requests_per_minute = given.get("requests_per_minute", caller.requests_per_minute)
        key.jobs_per_day = given.get("jobs_per_day", caller.jobs_per_day)
        usual = max(PriorityClass.normal, caller.highest_priority)
        key.highest_priority = usual if highest is None else PriorityClass[highest]
        key.idempotency_key = idempotency_key
        _check_num_keys(session, project_id, now=now)
        authentication.add(session, key, created_by=caller.api_key_id)
    return key, secret


def list_page(
    db: Database, *, caller: Caller, project: str | None = None, after: str | None = None, limit: int = 20
) -> Page[ApiKey]:
    """Return a page of the project's keys, newest first, including revoked and expired ones. project: id or name; None:
    the caller's."""
    with db.read() as session:
        project_id = caller.project_id
        if project is not None:
            project_id = projects.find(session, caller=caller, project=project, param="project").id
        scope = select(ApiKey).where(ApiKey.project_id == project_id)
        return paginate(session, scope, created=ApiKey.created_at, ident=ApiKey.id, after=after, limit=limit)


def get(db: Database, *, caller: Caller, api_key_id: str) -> ApiKey:
    """Return the key. Raises NotFound, also for a key of a project that the caller can't see."""
    with db.read() as session:
        return find(session, caller, api_key_id)


def rotate(
    db: Database,
    *,
    caller: Caller,
    api_key_id: str,
    overlap_seconds: float,
    expires_at: float | None = None,
    pepper: Pepper,
) -> tuple[ApiKey, str]:
    """Create a key with the same name and rights. Returns its row and its secret. The old key stays valid for
    `overlap_seconds`.

    expires_at: None: the new key has the expiration of the old one, or the caller's if that is earlier and the old key
    is not the caller's. If a non-operator rotates another key, the new key has the caller's limits and at most the
    caller's highest priority, so that rotation can't circumvent them.

    Raises Conflict for a key that is not valid or was already rotated, if the last operator key would get an
    expiration, and if the project has MAX_VALID_KEYS and the old key stays valid. Raises Forbidden in a browser
    session or for more rights than the caller has. Raises Unauthorized if the caller's key was revoked meanwhile.
    """
    with db.write() as session:
        now = _begin(session, caller)
        old = find(session, caller, api_key_id)
        reason = "the new keys would remain valid after the session ends"
        refuse_browsers(caller, "rotate API keys", reason, f"lorry keys rotate {old.id}")
        check_may_change(session, caller, old)
        _check_rotatable(caller, old, now)
        key, secret = new_key(old.project_id, old.name, pepper)
        key.is_operator, key.scopes, key.created_at = old.is_operator, old.scopes, now
        key.expires_at = _end(caller, old) if expires_at is None else _expiry(caller, expires_at, None, now=now)
        if key.expires_at is not None and [one.id for one in lasting_operators(session, now=now)] == [old.id]:
            raise _expires_last_operator(old, can_omit=expires_at is not None and _end(caller, old) is None)
        key.requests_per_minute, key.jobs_per_day = old.requests_per_minute, old.jobs_per_day
        key.highest_priority = old.highest_priority
        if old.id != caller.api_key_id and not caller.is_operator:
            key.requests_per_minute, key.jobs_per_day = caller.requests_per_minute, caller.jobs_per_day
            key.highest_priority = max(old.highest_priority, caller.highest_priority)
        old.expires_at = min(now + overlap_seconds, old.expires_at or float("inf"))
        session.flush()
        _check_num_keys(session, old.project_id, now=now, is_rotation=True)
        authentication.add(session, key, created_by=caller.api_key_id)
        old.replaced_by = key.id
        authentication.note(
            session, "api_key.rotated", old, now=now, details={"by": key.id, "expires_at": old.expires_at}
        )
    return key, secret


def limit(
    db: Database,
    *,
    caller: Caller,
    api_key_id: str,
    limits: Mapping[str, int | None],
    highest_priority: Priority | None = None,
) -> ApiKey:
    """Change the limits `requests_per_minute` and `jobs_per_day` that are given. None: the service's; 0: no limit.
    highest_priority: None: unchanged.

    Only operators may do this. Raises NotFound and Forbidden, and Unauthorized if the caller's key was revoked
    meanwhile.
    """
    with db.write() as session:
        now = _begin(session, caller)
        key = find(session, caller, api_key_id)
        given: Json = {**limits, **({} if highest_priority is None else {"highest_priority": highest_priority})}
        _check_limits(caller, given, key=key)
        check_may_change(session, caller, key)
        if key.id == caller.api_key_id and caller.is_limited:
            raise Forbidden("own_limits_not_changeable", param="api_key_id")
        key.requests_per_minute = limits.get("requests_per_minute", key.requests_per_minute)
        key.jobs_per_day = limits.get("jobs_per_day", key.jobs_per_day)
        if highest_priority is not None:
            key.highest_priority = PriorityClass[highest_priority]
        authentication.note(session, "api_key.updated", key, now=now, details=given)
        return key


def _wanted_scopes(caller: Caller, request: KeyRequest) -> frozenset[str]:
    """Return the scopes of a new key, which the caller can grant. Raises InvalidRequest and Forbidden."""
    able = granted(None, is_operator=request.is_operator)
    wanted = frozenset(request.scopes) if request.scopes is not None else able & caller.scopes
    if not request.is_operator and wanted & OPERATORS:
        name = "operator_scope" if caller.is_operator else "operator_scope_for_operators"
        raise InvalidRequest(name, beyond=_scopes(wanted & OPERATORS), param="scopes")
    if request.is_operator and not caller.is_operator:
        raise Forbidden("operator_key_beyond_own", param="is_operator")
    if wanted - caller.scopes:
        raise Forbidden("scopes_beyond_own", beyond=_scopes(wanted - caller.scopes), param="scopes")
    return wanted


def _begin(session: Session, caller: Caller) -> float:
    """Return the time. No other transaction creates or revokes keys until this one ends: a revocation with descendants
    finds every key that a revoked key created, and a revoked key creates no keys. Raises Unauthorized."""
    serialize(session, "operators' keys")
    now = read_clock(session)
    authentication.check_valid(session, caller.api_key_id, now=now)
    return now


def _check_num_keys(session: Session, project_id: str, *, now: float, is_rotation: bool = False) -> None:
    """Raises Conflict if the project has MAX_VALID_KEYS."""
    valid = (ApiKey.revoked_at.is_(None), or_(ApiKey.expires_at.is_(None), ApiKey.expires_at > now))
    count = select(func.count()).select_from(ApiKey).where(ApiKey.project_id == project_id, *valid)
    number = session.scalar(count) or 0
    if number >= MAX_VALID_KEYS:
        project = session.get_one(Project, project_id).name
        name = "too_many_keys_to_rotate" if is_rotation else "too_many_keys"
        raise Conflict(name, name=project, number=number, max_valid_keys=MAX_VALID_KEYS)


def _check_unused(session: Session, caller: Caller, idempotency_key: str) -> None:
    """Reserve the Idempotency-Key against other requests of the caller until the transaction ends. Raises Conflict."""
    serialize(session, f"keys by {caller.api_key_id}")
    used = (ApiKey.created_by == caller.api_key_id, ApiKey.idempotency_key == idempotency_key)
    key_id = session.scalar(select(ApiKey.id).where(*used).limit(1))
    if key_id is not None:
        raise Conflict(
            "api_key_already_created", key_id=key_id, idempotency_key=idempotency_key, param="Idempotency-Key"
        )


def find(session: Session, caller: Caller, api_key_id: str) -> ApiKey:
    """Return the key, inside a transaction. Raises NotFound, also for a key of a project that the caller can't see."""
    own = select(ApiKey).where(ApiKey.id == api_key_id)
    key = session.scalar(own if caller.is_operator else own.where(ApiKey.project_id == caller.project_id))
    if key is None:
        if caller.is_operator:
            raise NotFound("key_not_found", key=api_key_id, param="api_key_id")
        raise NotFound("key_of_project_not_found", project_name=caller.project_name, key=api_key_id, param="api_key_id")
    return key


def check_may_change(session: Session, caller: Caller, key: ApiKey) -> None:
    """Raises Forbidden unless the key is the caller's own, or the caller could have created it.

    A key that was rotated can't change other keys, because it may have been rotated after a leak.
    """
    if key.id == caller.api_key_id:
        return
    replaced_by = session.get_one(ApiKey, caller.api_key_id).replaced_by
    if replaced_by is not None:
        raise Forbidden("key_superseded", key=caller.api_key_id, replaced_by=replaced_by)
    if key.is_operator and not caller.is_operator:
        raise Forbidden("operator_key_not_changeable", changed=_label(key), param="api_key_id")
    beyond = granted(key.scopes, is_operator=key.is_operator) - caller.scopes
    if beyond:
        name = "operator_key_scopes_beyond_own" if key.is_operator else "key_scopes_beyond_own"
        raise Forbidden(name, changed=_label(key), beyond=_scopes(beyond), param="api_key_id")
    if key.scopes is None and caller.is_limited:
        name = "unlimited_operator_key_not_changeable" if key.is_operator else "unlimited_key_not_changeable"
        raise Forbidden(name, key=_label(key), param="api_key_id")


def last_operator(key: ApiKey) -> Conflict:
    """Return the error for the revocation of the last operator key, perhaps together with other ones."""
    name = "last_lasting_operator_key_revoked" if key.expires_at is None else "last_operator_key_revoked"
    return Conflict(name, key=_label(key), kept=_last_of(key), param="api_key_id")


def _expires_last_operator(key: ApiKey, *, can_omit: bool) -> Conflict:
    """can_omit: without 'expires_at', the new key would not expire."""
    name = "last_operator_key_would_expire" if can_omit else "last_operator_key_replaced"
    return Conflict(name, key=_label(key), kept=_last_of(key), param="expires_at" if can_omit else "api_key_id")


def _last_of(key: ApiKey) -> str:
    """Return the description of the keys of which this one is the last."""
    return "with every scope and no expiration" if authentication.is_lasting(key) else "that can create keys"


def _label(key: ApiKey) -> str:
    return f"{key.name!r} ({key.id})"


def refuse_browsers(caller: Caller, action: str, reason: str, command: str) -> None:
    """Raises Forbidden in a browser session, for actions whose result would outlive it. command: does the same."""
    if caller.is_browser:
        raise Forbidden("api_key_required", action=action, reason=reason, command=command)


def _end(caller: Caller, old: ApiKey) -> float | None:
    """Return the default expiration of the key that replaces `old`."""
    ends = [old.expires_at, None if old.id == caller.api_key_id else caller.expires_at]
    return min((end for end in ends if end is not None), default=None)


def _check_limits(caller: Caller, limits: Collection[str], *, key: ApiKey | None = None) -> None:
    """Raises Forbidden if a caller that is no operator sets limits. limits: names of the limits that are set. key: the
    key to change; None for a new one."""
    if limits and not caller.is_operator:
        names = listed([repr(name) for name in limits])
        options = " ".join(f"--{name.replace('_', '-')} VALUE" for name in limits)
        if key is None:
            raise Forbidden("operator_required_for_limits", names=names, param=next(iter(limits)))
        raise Forbidden("operator_required_for_key", names=names, key=key.id, options=options, param=next(iter(limits)))


def _scopes(scopes: Collection[str]) -> str:
    return f"the scope{'s' if len(scopes) > 1 else ''} {listed(sorted(scopes))}"


def _check_rotatable(caller: Caller, key: ApiKey, now: float) -> None:
    if not is_live(key, now):
        options = " --operator" if key.is_operator else ""
        options += f" --project {key.project_id}" if key.project_id != caller.project_id else ""
        name = "key_expired" if key.revoked_at is None else "key_revoked"
        raise Conflict(name, key=_label(key), options=options, param="api_key_id")
    if key.replaced_by is not None:
        raise Conflict("key_already_rotated", key=_label(key), replaced_by=key.replaced_by, param="api_key_id")


def _expiry(caller: Caller, wanted: float | None, otherwise: float | None, *, now: float) -> float | None:
    """Return the checked expiration, which can't be later than the caller's. otherwise: the value if none is wanted."""
    if wanted is None:
        return otherwise
    if wanted <= now:
        raise InvalidRequest("expires_in_the_past", wanted=int(wanted), now=int(now), param="expires_at")
    if caller.expires_at is not None and wanted > caller.expires_at:
        name = "expires_after_own_session" if caller.is_browser else "expires_after_own_key"
        raise Forbidden(name, wanted=int(wanted), expires_at=int(caller.expires_at), param="expires_at")
    return wanted
