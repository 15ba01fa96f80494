"""Full ids from what a user typed: a unique prefix of an id or, for an adapter, a unique part of its name.

An adapter is also found by the id or the suffix of the job that trained it. A full id costs no request. If nothing
matches, the text is returned unchanged, and the service's error explains it. If a search fails, its error is raised.
"""

from __future__ import annotations

import re
from itertools import islice
from typing import TYPE_CHECKING, Any

from lorry.errors import LorryError, NotFound, PermissionDenied

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from lorry.client import Lorry
    from lorry.models import Adapter, Job

FULL_ID = re.compile(r"[a-z]+-[0-9a-f]{24}")
SEARCHED = 5000
"""A prefix is matched against the newest 5,000 objects. With more, it is not known to be unique."""
SHOWN = 10
WITHOUT_RESULT = (NotFound, PermissionDenied)
"""Errors of a search that count as no match. An older service may lack a list. A key without the scope to list may have
the scope of the command: then the service decides."""


def job(lorry: Lorry, typed: str) -> str:
    return _full_id("job", typed, lorry.jobs.list)


def file(lorry: Lorry, typed: str) -> str:
    return _full_id("file", typed, lorry.files.list)


def batch(lorry: Lorry, typed: str) -> str:
    return _full_id("batch", typed, lorry.batches.list)


def key(lorry: Lorry, typed: str) -> str:
    return _full_id("key", typed, lorry.keys.list)


def plan(lorry: Lorry, typed: str) -> str:
    return _full_id("plan", typed, lorry.plans.list)


def sweep(lorry: Lorry, typed: str) -> str:
    return _full_id("sweep", typed, lorry.sweeps.list)


def webhook(lorry: Lorry, typed: str) -> str:
    return _full_id("webhook", typed, lorry.webhooks.list)


def worker(lorry: Lorry, typed: str) -> str:
    return _full_id("worker", typed, lorry.workers.list)


def project(lorry: Lorry, typed: str) -> str:
    """A name is returned unchanged: the service accepts both."""
    return typed if not typed.startswith("proj-") else _full_id("project", typed, lorry.projects.list)


def organization(lorry: Lorry, typed: str) -> str:
    """A name is returned unchanged: the service accepts both."""
    return typed if not typed.startswith("org-") else _full_id("organization", typed, lorry.organizations.list)


def adapter(lorry: Lorry, typed: str) -> str:
    """Return the name or id of one adapter.

    Accepts a name or an id, a unique prefix of either, a unique part of a name such as the suffix, and the id of a
    sweep for its best adapter. The id of a job selects the final adapter that the job trained. If no adapter matches,
    the text is taken as the suffix of a job, of which the newest counts. Raises LorryError for a job without a final
    adapter.
    """
    if typed.startswith("ftjob-"):
        return _adapter_of_job(lorry, typed)
    if typed.startswith("sweep-"):
        return sweep(lorry, typed)
    try:
        lorry.adapters.get(typed)
    except PermissionDenied:
        return typed
    except NotFound:
        pass
    else:
        return typed
    found = _listed(lorry.adapters.list)
    by_part = [one for one in found if typed in one.name.split(":")]
    matches = by_part or [one for one in found if one.name.startswith(typed) or one.id.startswith(typed)]
    if not matches and (trained := _newest_job(lorry, typed)):
        return _adapter_of(trained)
    return _only("adapter", typed, matches, found, _name) or typed


def permission(lorry: Lorry, adapter_name: str, typed: str) -> str:
    """Return the id of the permission that `typed` names: its own id, or the project that it was given to."""
    given = _listed(lambda: lorry.adapters.permissions(adapter_name))
    project_id = typed
    if not typed.startswith(("cp-", "proj-")):
        project_id = lorry.projects.get(typed).id
    matches = [one for one in given if one.id.startswith(typed) or one.project_id.startswith(project_id)]
    return _only("permission", typed, matches, given, lambda one: one.id) or typed


def export(lorry: Lorry, adapter_name: str, typed: str) -> str:
    return _full_id("export", typed, lambda: lorry.adapters.exports.list(adapter_name))


def _adapter_of_job(lorry: Lorry, typed: str) -> str:
    return _adapter_of(lorry.jobs.get(job(lorry, typed)))


def _newest_job(lorry: Lorry, suffix: str) -> Job | None:
    if not suffix:
        return None
    try:
        return next((one for one in islice(lorry.jobs.list(), SEARCHED) if one.suffix == suffix), None)
    except WITHOUT_RESULT:
        return None


def _adapter_of(found: Job) -> str:
    if found.fine_tuned_model is None:
        raise LorryError(
            "job_without_adapter"
            if found.is_final
            else ("paused_job_without_adapter" if found.status == "paused" else "running_job_without_adapter"),
            id=found.id,
            state=found.status,
        )
    return found.fine_tuned_model


def _full_id(kind: str, typed: str, listing: Callable[[], Iterable[Any]]) -> str:
    if FULL_ID.fullmatch(typed):
        return typed
    found = _listed(listing)
    if any(one.id == typed for one in found):
        return typed
    matches = [one for one in found if typed and one.id.startswith(typed)]
    return _only(kind, typed, matches, found, lambda one: one.id) or typed


def _listed(listing: Callable[[], Iterable[Any]]) -> list[Any]:
    try:
        return list(islice(listing(), SEARCHED + 1))
    except WITHOUT_RESULT:
        return []


def _only(
    kind: str, typed: str, matches: Sequence[Any], found: Sequence[Any], name_of: Callable[[Any], str]
) -> str | None:
    """Raises LorryError if several objects match, or if there are too many to be sure."""
    if len(matches) == 1 and len(found) <= SEARCHED:
        return name_of(matches[0])
    if not matches:
        return None
    names = [name_of(one) for one in matches]
    shown = "".join(f"\n  {name}" for name in names[:SHOWN])
    more = f"\n  and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    wanted = "name or ID" if kind == "adapter" else "ID"
    if len(matches) == 1:
        raise LorryError("possibly_ambiguous_id", typed=typed, kind=kind, searched=SEARCHED, shown=shown, wanted=wanted)
    raise LorryError("ambiguous_id", typed=typed, num=len(matches), kind=kind, shown=f"{shown}{more}", wanted=wanted)


def _name(one: Adapter) -> str:
    return one.name or one.id
