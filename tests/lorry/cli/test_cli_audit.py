"""`lorry audit`: the log, its verification by the server, and its export."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, get_args

import pytest
from typer.testing import Result

from api.errors.validation import explain
from catalog.audit.log import AuditType
from lorry.cli.render import output
from tests.lorry.scripted_server import Reply, Script

Run = Callable[..., Result]
PATH = "/v1/audit_events"
ACTOR = {"type": "api_key", "id": "key-1", "name": "ci"}


def _log(number: int = 4) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = []
    for link in range(1, number + 1):
        event: dict[str, Any] = {"object": "audit_event", "id": f"audit-{link}", "type": "job.cancelled"}
        event |= {"effective_at": 1790000000.5, "actor": ACTOR, "object_id": f"ftjob-{link}", "address": None}
        event |= {"details": {"from": "running"}, "link": link}
        events.append({**event, "previous": f"{link - 1:064}", "digest": f"{link:064}"})
    return events


def _found(**fields: Any) -> dict[str, Any]:
    return {"is_sound": True, "num_events": 4, "last_link": 4, "last_digest": "d" * 64, "has_more": False, **fields}


def test_list_shows_events_and_sends_filters(service: Script, run: Run) -> None:
    service.on("GET", PATH, {"data": _log(2), "has_more": False})

    listed = run("audit", "list", "--type", "job.cancelled", "--type", "job.paused", "--actor", "key-1").stdout

    _, first, *_ = listed.splitlines()
    assert [word in first for word in ("job.cancelled", "ftjob-1", "ci", "from=running")] == [True] * 4
    (request,) = service.requests("GET", PATH)
    assert "event_types%5B%5D=job.cancelled&event_types%5B%5D=job.paused&actor_ids%5B%5D=key-1" in request.path


def test_digests_are_shortened_except_in_json(service: Script, run: Run) -> None:
    event = {**_log(1)[0], "details": {"artifact": "0123456789abcdef" * 4, "hex": "0123456789abcdef"}}
    service.on("GET", PATH, {"data": [event], "has_more": False})

    assert "artifact=01234567… hex=0123456789abcdef\n" in run("audit", "list").stdout
    assert json.loads(run("audit", "list", "--json").stdout)[0]["details"] == event["details"]


def test_times_in_details_are_formatted(service: Script, run: Run) -> None:
    event = {**_log(1)[0], "details": {"taken_at": 1790000000.5, "at_once": 2}}
    service.on("GET", PATH, {"data": [event], "has_more": False})

    shown = run("audit", "list").stdout

    assert f"taken_at={output.when(1790000000)} at_once=2" in shown


@pytest.mark.parametrize(
    ("typed", "printed"),
    [
        ("job.canceled", "Did you mean job.cancelled?"),
        ("job.*", "Event types of job: job.created, job.cancelled,"),
        ("job", "Event types of job: job.created, job.cancelled,"),
        ("file.x", "Event types of file: file.created, file.deleted, file.downloaded."),
        ("nonsense", "Groups of event types: adapter.*, adapter_export.*, api_key.*,"),
    ],
)
def test_unknown_event_type_suggests_similar_types(service: Script, run: Run, typed: str, printed: str) -> None:
    listed = [{"type": "literal_error", "loc": ("query", "event_types[]", 1), "input": typed}]
    expected = {"expected": ", ".join(map(repr, get_args(AuditType)))}
    refused = explain([{**problem, "msg": "", "ctx": expected} for problem in listed], body=None, route=None)
    error = {"message": refused.message, "remedy": refused.remedy, "param": refused.param, "code": refused.code}
    service.on("GET", PATH, Reply(status=400, body={"error": error}))

    result = run("audit", "list", "--type", "job.paused", "--type", typed)

    assert result.exit_code == 1
    first, second = result.stderr.splitlines()
    assert first == f"Error: Unknown event type {typed!r}. (at --type)"
    assert second.startswith(printed)


def test_other_errors_are_printed_unchanged(service: Script, run: Run) -> None:
    error = {"message": "'limit' must be less.", "param": "limit", "code": "invalid_value"}
    service.on("GET", PATH, Reply(status=400, body={"error": error}))

    assert run("audit", "list", "--type", "job.paused").stderr == "Error: 'limit' must be less.\n"


def test_verify_confirms_an_unchanged_log(service: Script, run: Run) -> None:
    first, last = _found(has_more=True), _found(num_events=2, last_link=6, num_unsealed=1)
    service.on("GET", f"{PATH}/verify", first, last)

    result = run("audit", "verify")

    assert result.exit_code == 0
    assert "OK: 6 sealed events are unchanged; 1 are not sealed yet." in result.stderr


ANCHOR = "audit/anchors/2026-11-28.json"


@pytest.mark.parametrize(
    ("link", "ident", "fault", "printed"),
    [
        (0, ANCHOR, "anchor_changed", f"FAILED: anchor {ANCHOR} is not what the server wrote."),
        (5, "audit-5", "changed", "FAILED: event 5 (audit-5) was changed after it was sealed"),
    ],
)
def test_verify_names_the_first_misfit(
    service: Script, run: Run, link: int, ident: str, fault: str, printed: str
) -> None:
    misfit = {"link": link, "id": ident, "fault": fault}
    service.on("GET", f"{PATH}/verify", _found(is_sound=False, misfit=misfit))

    result = run("audit", "verify")

    assert result.exit_code == 1
    assert printed in result.stderr


def test_export_writes_one_line_per_event(service: Script, run: Run) -> None:
    log = _log()
    service.on("GET", f"{PATH}/export", Reply(body="".join(f"{json.dumps(event)}\n" for event in log).encode()))

    exported = run("audit", "export").stdout

    assert [json.loads(line) for line in exported.splitlines()] == log
