"""Looks at an exported audit log without the service: does every event fit the one before?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from lorry import canonical_json
from lorry.accounts import AuditMisfit, AuditVerification

GENESIS = "0" * 64


def check(events: Iterable[Mapping[str, Any]]) -> AuditVerification:
    """`events` in the order of the chain, as exported. One that begins in the middle is taken at its word there."""
    link, digest, number = 0, GENESIS, 0
    for event in events:
        if number == 0 and isinstance(first := event.get("link"), int) and first > 1:
            link, digest = first - 1, str(event.get("previous"))
        fault = _fault(event, link=link + 1, previous=digest)
        if fault is not None:
            misfit = AuditMisfit(link=link + 1, id=None if fault == "missing" else event.get("id"), fault=fault)
            return AuditVerification(num_events=number, last_link=link, last_digest=digest, misfit=misfit)
        link, digest, number = link + 1, str(event["digest"]), number + 1
    return AuditVerification(is_sound=True, num_events=number, last_link=link, last_digest=digest)


def digest_of(event: Mapping[str, Any]) -> str:
    """sha256 of the RFC 8785 form of all but the digest, without what is null in the event and in its actor."""
    told = {name: value for name, value in event.items() if value is not None and name != "digest"}
    actor = told.get("actor")
    if isinstance(actor, dict):
        told["actor"] = {name: value for name, value in actor.items() if value is not None}  # pyright: ignore
    return canonical_json.sha256(told)


def _fault(event: Mapping[str, Any], *, link: int, previous: str) -> str | None:
    if event.get("link") != link:
        return "missing"
    try:
        is_whole = event.get("digest") == digest_of(event)
    except ValueError:  # what no canonical JSON can hold was never sealed
        is_whole = False
    if not is_whole:
        return "changed"
    return None if event.get("previous") == previous else "misplaced"
