"""Checks a database and its store against the invariants of the fault matrix, I1 to I8; see findings.py.

The auditor shares no logic with Lorry: it reads tables, the objects of the store and docs/reference/job-states.md.
artifacts.py checks stored files, and leftovers.py checks for leaks.
"""

from __future__ import annotations

import hmac
import re
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from hashlib import sha256
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import rfc8785

from qa.chaos.audit import artifacts, leftovers, tables
from qa.chaos.audit.findings import Finding, Invariant, Seen, Sighting
from qa.chaos.audit.tables import Row, Tables, by_job

STATES_PAGE = Path(__file__).parents[3] / "docs/reference/job-states.md"
ARROW = re.compile(r"^\s*(\S+) --> (\S+?)(?:: (\w+))?\s*$", re.MULTILINE)
OUTSIDE = "[*]"
KILL_SECONDS = 10.0
"""In addition to a lease, the time for which two trainers of one job may be observed together."""
ByJob = Mapping[str, Sequence[Row]]
GENESIS = "0" * 64
ASKED = {"cancelled_by_user": "job.cancelled", "paused_by_user": "job.paused"}
HOOKS = {"succeeded", "failed", "cancelled"}


def audit(
    database_url: str,
    *,
    store_url: str,
    lease_seconds: float,
    pepper: bytes,
    seen: Seen | None = None,
    work_dir: Path | None = None,
    is_settled: bool = True,
    now: float | None = None,
) -> list[Finding]:
    """Return the violations of invariants. An empty list means that there are none.

    store_url: file:///… or s3://…, as in LORRY_STORE_URL. pepper: of the API servers. work_dir: of the workers, all of
    which have exited; None: folders and processes are not checked. is_settled: every job has had time to finish. now:
    the time of the database, in seconds since 1970.
    """
    found = tables.read(database_url)
    known = seen or Seen()
    moment = time.time() if now is None else now
    attempts = by_job(found["attempts"])
    moves = by_job({**event["data"], "job_id": event["job_id"]} for event in found["events"] if _is_move(event))
    return [
        *_one_end(found, moves, known, is_settled=is_settled),
        *_one_completion(found, attempts),
        *_one_trainer(attempts, known.trainers, lease_seconds=lease_seconds),
        *artifacts.damaged(found, store_url),
        *_one_job_a_key(found, known),
        *_hooks(found, known, is_settled=is_settled),
        *leftovers.rows(found, now=moment, lease_seconds=lease_seconds),
        *(leftovers.on_machine(work_dir) if work_dir is not None else ()),
        *_moves(found, moves, attempts),
        *_people(found, moves),
        *_chain(found, pepper),
    ]


def _is_move(event: Row) -> bool:
    return event["type"] == "transition"


@cache
def _diagram() -> tuple[frozenset[tuple[str, str, str]], frozenset[str]]:
    """Return (state, verb, state) of every transition, and the final states, as drawn in the document."""
    arrows = ARROW.findall(STATES_PAGE.read_text("utf-8"))
    moves = frozenset((start, verb, end) for start, end, verb in arrows if end != OUTSIDE)
    return moves, frozenset(start for start, end, _ in arrows if end == OUTSIDE)


def _one_end(found: Tables, moves: ByJob, seen: Seen, *, is_settled: bool) -> Iterator[Finding]:
    _, final = _diagram()
    known = {job["id"] for job in found["jobs"]}
    for job in found["jobs"]:
        told = [move["to"] for move in moves.get(job["id"], ())]
        ends = [state for state in told if state in final]
        if is_settled and job["state"] not in final:
            yield _finding("I1", job["id"], f"it is {job['state']}, which is not a final state")
        if len(ends) > 1 or (ends and told[-1] not in final):
            yield _finding("I1", job["id"], f"it changed after its final state: {' → '.join(told)}")
        if (job["state"] in final) != (job["finished_at"] is not None):
            yield _finding("I1", job["id"], f"it is {job['state']}, but finished_at is {job['finished_at']}")
    for key, ids in seen.submissions.items():
        for job_id in set(ids) - known:
            yield _finding("I1", job_id, f"it was accepted with the key {key}, but does not exist")


def _one_completion(found: Tables, attempts: ByJob) -> Iterator[Finding]:
    adapters = by_job(found["adapters"])
    for job in found["jobs"]:
        own = attempts.get(job["id"], [])
        numbers = [attempt["number"] for attempt in own]
        completed = [attempt["number"] for attempt in own if attempt["reason"] == "completed"]
        wanted = numbers[-1:] if job["state"] == "succeeded" else []
        if completed != wanted:
            yield _finding("I2", job["id"], f"it is {job['state']}; attempts {completed} of {numbers} completed it")
        if len(adapters[job["id"]]) != len(wanted):
            yield _finding("I2", job["id"], f"it is {job['state']}, with {len(adapters[job['id']])} adapters")
        if numbers != list(range(1, len(numbers) + 1)) or job["attempt"] != len(numbers):
            yield _finding("I2", job["id"], f"its attempts are {numbers}, but its row has {job['attempt']}")


def _one_trainer(attempts: ByJob, sightings: Sequence[Sighting], *, lease_seconds: float) -> Iterator[Finding]:
    for job_id, own in attempts.items():
        for before, after in pairwise(own):
            if before["ended_at"] is None or before["ended_at"] > after["started_at"]:
                sentence = f"attempt {after['number']} began before attempt {before['number']} had ended"
                yield _finding("I3", job_id, sentence)
    job_of = {attempt["claim_id"]: job_id for job_id, own in attempts.items() for attempt in own}
    together: dict[str, list[Sighting]] = defaultdict(list)
    for sighting in sightings:
        together[job_of.get(sighting.claim_id, sighting.claim_id)].append(sighting)
    for job_id, of_job in together.items():
        for one, other in combinations(of_job, 2):
            seconds = min(one.last_at, other.last_at) - max(one.first_at, other.first_at)
            if one.pid != other.pid and seconds > lease_seconds + KILL_SECONDS:
                yield _finding("I3", job_id, f"processes {one.pid} and {other.pid} both trained it for {seconds:.1f} s")


def _one_job_a_key(found: Tables, seen: Seen) -> Iterator[Finding]:
    jobs = {job["id"]: job for job in found["jobs"]}
    rows = {row["key"]: row for row in found["idempotency_keys"]}
    for key, row in rows.items():
        job = jobs.get(row["job_id"])
        if job is None or (job["body_digest"], job["project_id"]) != (row["body_digest"], row["project_id"]):
            yield _finding("I5", row["job_id"], f"the key {key} is of another request, or has no job")
    for key, ids in seen.submissions.items():
        stands_for = {rows[key]["job_id"]} if key in rows else set[str]()
        if len({*ids, *stands_for}) > 1 or not stands_for:
            yield _finding("I5", key, f"responses named {sorted(set(ids))}, but the database has {sorted(stands_for)}")
    made: dict[str, list[str]] = defaultdict(list)
    for event in found["audit_events"]:
        if event["type"] == "job.created" and event["request_id"] and "sweep" not in event["details"]:
            made[event["request_id"]].append(event["object_id"])
    for request_id, ids in made.items():
        if len(ids) > 1:
            yield _finding("I5", request_id, f"one request created the jobs {ids}")


def _hooks(found: Tables, seen: Seen, *, is_settled: bool) -> Iterator[Finding]:
    """Check the webhooks of each finished job, to each endpoint that existed and subscribed to the event."""
    events: dict[str, set[str]] = {}
    for job in (job for job in found["jobs"] if job["state"] in HOOKS):
        mine = [row for row in found["webhook_deliveries"] if row["data"].get("id") == job["id"] and not row["is_test"]]
        events[job["id"]] = {row["event_id"] for row in mine}
        yield from _hooks_of(job, mine, found["webhook_endpoints"], is_settled=is_settled)
    yield from _sent(found, seen)
    tests = {row["event_id"] for row in found["webhook_deliveries"] if row["is_test"]}
    for hook in seen.hooks:
        if hook.event_id not in tests | events.get(hook.job_id, set()):
            yield _finding("I6", hook.job_id, f"{hook.event_type} came with another's id, {hook.event_id}")


def _hooks_of(job: Row, mine: list[Row], endpoints: list[Row], *, is_settled: bool) -> Iterator[Finding]:
    event_type = f"fine_tuning.job.{job['state']}"
    ids = sorted({row["event_id"] for row in mine})
    if wrong := [row["event_type"] for row in mine if row["event_type"] != event_type]:
        yield _finding("I6", job["id"], f"it is {job['state']}, but {wrong} was to be sent")
    if len(ids) > 1:
        yield _finding("I6", job["id"], f"one event has several ids: {ids}")
    for endpoint in (endpoint for endpoint in endpoints if _is_due(endpoint, job, event_type)):
        sent = [row for row in mine if row["endpoint_id"] == endpoint["id"]]
        if len(sent) != 1:
            yield _finding("I6", job["id"], f"{len(sent)} deliveries were recorded for {endpoint['id']}")
        elif is_settled and endpoint["disabled_at"] is None and sent[0]["status"] != "delivered":
            yield _finding("I6", job["id"], f"{sent[0]['id']} was not delivered to {endpoint['id']}")


def _sent(found: Tables, seen: Seen) -> Iterator[Finding]:
    """Check that each delivery with the status `delivered` got a 2xx response, and was received."""
    answered = {row["delivery_id"] for row in found["webhook_tries"] if 200 <= (row["status_code"] or 0) < 300}
    came = {hook.event_id for hook in seen.hooks}
    for row in (row for row in found["webhook_deliveries"] if row["status"] == "delivered"):
        if row["id"] not in answered:
            yield _finding("I6", row["id"], "it is recorded as delivered, but no attempt got a 2xx response")
        if seen.hooks and row["event_id"] not in came:
            yield _finding("I6", row["id"], f"it is recorded as delivered, but {row['event_id']} never came")


def _is_due(endpoint: Row, job: Row, event_type: str) -> bool:
    was_there = endpoint["created_at"] < job["finished_at"] and endpoint["deleted_at"] is None
    return was_there and endpoint["project_id"] == job["project_id"] and event_type in endpoint["event_types"]


def _moves(found: Tables, moves: ByJob, attempts: ByJob) -> Iterator[Finding]:
    """Check that each transition is in the diagram and follows the previous one, and that the last one leads to the
    job's state."""
    allowed, _ = _diagram()
    for job in found["jobs"]:
        state = OUTSIDE
        own = moves.get(job["id"], [])
        for move in own:
            if (move["from"] or OUTSIDE) != state or (state, move["verb"], move["to"]) not in allowed:
                sentence = f"after {state}, an event records {move['verb']} from {move['from']} to {move['to']}"
                yield _finding("I8", job["id"], sentence)
            state = move["to"]
        if state != job["state"]:
            yield _finding("I8", job["id"], f"it is {job['state']}, but its events lead to {state}")
        num_claims, num_attempts = sum(move["verb"] == "claim" for move in own), len(attempts.get(job["id"], ()))
        if num_claims != num_attempts:
            yield _finding("I8", job["id"], f"{num_claims} claims, {num_attempts} attempts")


def _people(found: Tables, moves: ByJob) -> Iterator[Finding]:
    """Check that every request of a user is in the audit log, with the job's id."""
    noted = Counter((event["type"], event["object_id"]) for event in found["audit_events"])
    for job in found["jobs"]:
        own = moves.get(job["id"], [])
        if noted["job.created", job["id"]] != 1:
            yield _finding("I8", job["id"], f"its creation is recorded {noted['job.created', job['id']]} times")
        if job["sweep_id"] is not None:
            continue
        asked = [ASKED[move["reason"]] for move in own if move["reason"] in ASKED and move["verb"] != "requeue"]
        asked += ["job.resumed" for move in own if move["verb"] == "resume"]
        for kind in set(asked):
            if asked.count(kind) > noted[kind, job["id"]]:
                yield _finding("I8", job["id"], f"{kind} happened {asked.count(kind)} times, but has fewer events")


def _chain(found: Tables, pepper: bytes) -> Iterator[Finding]:
    """Check that every sealed event has the digest of its content and of the previous event, up to the head."""
    sealed = sorted(
        (event for event in found["audit_events"] if event["link"] is not None), key=lambda row: row["link"]
    )
    digest = GENESIS
    for link, event in enumerate(sealed, start=1):
        if event["link"] != link or event["previous"] != digest or event["digest"] != _digest(event, pepper):
            yield _finding("I8", event["id"], f"the audit log's chain is broken at link {link}")
            return
        digest = event["digest"]
    heads = [(head["link"], head["digest"]) for head in found["audit_head"]]
    if heads != ([(len(sealed), digest)] if sealed else []):
        yield _finding("I8", "audit_head", f"the audit log ends at {len(sealed)}, but its head is {heads}")


def _digest(event: Row, pepper: bytes) -> str:
    names = ("id", "type", "effective_at", "project_id", "object_id", "request_id", "address", "details", "link")
    told: dict[str, Any] = {name: event[name] for name in (*names, "previous") if event[name] is not None}
    actor = {name: event[f"actor_{name}"] for name in ("type", "id", "name") if event[f"actor_{name}"] is not None}
    key = hmac.digest(pepper, b"lorry: audit chain", sha256)
    return hmac.digest(key, rfc8785.dumps({**told, "object": "audit_event", "actor": actor}), sha256).hex()


def _finding(invariant: Invariant, subject: str, sentence: str) -> Finding:
    return Finding(invariant=invariant, subject=subject, sentence=sentence)
