"""Jobs of the SDK: creation, waiting, following, lists and states."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from lorry import Job, Lorry, WaitTimeout
from lorry.cli.render.job_view import status
from lorry.errors import ConnectionFailed, LorryError, NotFound, ServerFailed
from lorry.resources import follow as live
from lorry.resources import resource
from lorry.resources.follow import JobUpdate
from tests.lorry.scripted_server import Reply, Script

JOBS = "/v1/fine_tuning/jobs"
SSE = {"content-type": "text/event-stream"}


def wire(status: str, step: int = 0) -> dict[str, Any]:
    return {"id": "j", "status": status, "progress": {"step": step, "num_steps": 10, "newer": 1}, "newer": {"x": 1}}


def sse(event: str, data: dict[str, Any], ident: int) -> bytes:
    return f"event: {event}\nid: {ident}\ndata: {json.dumps(data)}\n\n".encode()


def test_only_given_fields_are_sent(service: Script, client: Lorry) -> None:
    service.on("POST", JOBS, wire("validating_files"))

    client.jobs.create(
        model="m", training_file="file-1", seed=0, lora={"rank": 4}, hyperparameters={"n_epochs": 2}, priority="batch"
    )

    assert json.loads(service.seen[0].body) == {
        "model": "m",
        "training_file": "file-1",
        "seed": 0,
        "lora": {"rank": 4},
        "method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2}}},
        "priority": "batch",
    }


def test_extra_body_sends_unknown_fields(service: Script, client: Lorry) -> None:
    service.on("POST", JOBS, wire("queued"))

    client.jobs.create(model="m", training_file="f", max_length="auto", extra_body={"newer": {"x": 1}, "max_length": 9})

    sent = json.loads(service.seen[0].body)
    assert sent == {"model": "m", "training_file": "f", "max_length": 9, "newer": {"x": 1}}


def test_retried_creation_reuses_its_idempotency_key(service: Script, client: Lorry) -> None:
    service.on("POST", JOBS, Reply(status=502, body=b""), wire("queued"))

    client.jobs.create(model="m", training_file="f")
    client.jobs.create(model="m", training_file="f")

    first, repeated, other = [request.headers["idempotency-key"] for request in service.seen]
    assert first == repeated != other


def test_wait_returns_the_final_job_and_reports_each_poll(service: Script, client: Lorry, slept: list[float]) -> None:
    service.on("GET", f"{JOBS}/j", wire("queued"), wire("running", 3), wire("failed", 3))
    steps: list[int] = []

    job = client.jobs.wait("j", on_progress=lambda seen: steps.append(seen.progress.step), poll_seconds=2)

    assert job.status == "failed"
    assert steps == [0, 3, 3]
    assert slept == [2, 2]


def test_wait_raises_after_its_timeout(service: Script, client: Lorry) -> None:
    service.on("GET", f"{JOBS}/j", wire("running"))

    with pytest.raises(WaitTimeout, match=r"Job j did not finish within 0 s\. Its status is 'running'\.") as expired:
        client.jobs.wait("j", timeout_seconds=0)
    assert "`lorry jobs why j`" in expired.value.remedy


def test_follow_polls_when_the_stream_breaks_and_then_resumes_it(
    service: Script, client: Lorry, slept: list[float]
) -> None:
    broken = Reply(body=sse("job", wire("running", 1), 11) + sse("event", {"message": "a"}, 12), headers=SSE, cut=True)
    rest = Reply(body=sse("event", {"message": "b"}, 13) + sse("job", wire("succeeded", 10), 14), headers=SSE)
    service.on("GET", f"{JOBS}/j/stream", broken, rest)
    service.on("GET", f"{JOBS}/j", wire("running", 5))

    updates = list(client.jobs.follow("j"))

    assert [u.job.progress.step for u in updates if u.job] == [1, 5, 10]
    assert [u.event.message for u in updates if u.event] == ["a", "b"]
    assert [r.headers.get("last-event-id") for r in service.requests("GET", f"{JOBS}/j/stream")] == [None, "12"]
    assert slept == [1.0]


def test_follow_works_by_polling_without_a_stream(service: Script, client: Lorry) -> None:
    service.on("GET", f"{JOBS}/j", wire("queued"), wire("running"), wire("cancelled"))

    assert [u.job.status for u in client.jobs.follow("j") if u.job] == ["queued", "running", "cancelled"]


def test_follow_of_a_missing_job_raises(client: Lorry) -> None:
    with pytest.raises(NotFound):
        list(client.jobs.follow("gone"))


@pytest.mark.parametrize(
    "trouble",
    [ConnectionFailed("answer_stream_ended"), ServerFailed("The service is away.", code="x", remedy="", status=503)],
)
def test_follow_tolerates_a_restart_but_not_a_long_outage(trouble: LorryError) -> None:
    now = [0.0]
    answers = iter([None, None, Job(status="running"), None, Job(status="succeeded")])

    def gone(_last: str | None) -> Any:
        raise ConnectionFailed("answer_stream_ended")

    def look() -> Job:
        job = next(answers, None)
        if job is None:
            raise trouble
        return job

    def sleep(seconds: float) -> None:
        now[0] += seconds

    def follow(patience: float) -> list[JobUpdate]:
        return list(
            live.follow(gone, look, sleep=sleep, clock=lambda: now[0], poll_seconds=10, patience_seconds=patience)
        )

    assert [u.job.status for u in follow(60) if u.job] == ["running", "succeeded"]
    with pytest.raises(type(trouble)):
        follow(60)


def test_unknown_updates_are_skipped(service: Script, client: Lorry) -> None:
    body = (
        b"event: job\ndata: nonsense\n\nevent: job\ndata: []\n\n" + sse("newer", {}, 1) + sse("metric", {"step": 2}, 2)
    )
    service.on("GET", f"{JOBS}/j/stream", Reply(body=body, headers=SSE))

    assert [(u.kind, u.metric) for u in client.jobs.stream("j")] == [("metric", {"step": 2})]


def test_lists_follow_pages(service: Script, client: Lorry) -> None:
    service.on(
        "GET",
        f"{JOBS}/j/events",
        {"data": [{"id": "e3"}, {"id": "e2"}], "has_more": True},
        {"data": [{"id": "e1"}], "has_more": False},
    )

    assert [event.id for event in client.jobs.events("j")] == ["e3", "e2", "e1"]
    assert "after=e2" in service.seen[1].path


def test_ids_are_escaped_in_paths(service: Script, client: Lorry) -> None:
    with pytest.raises(NotFound):
        client.jobs.get("../../files?x=1")

    assert service.seen[0].path == f"{JOBS}/..%2F..%2Ffiles%3Fx%3D1"


def test_unknown_fields_are_kept_and_missing_ones_have_a_default() -> None:
    job = Job.of({"id": "j", "error": None, "progress": "odd", "later": [1]})

    assert job.raw["later"] == [1]
    assert job.progress.step == 0
    assert job.error is None


def test_running_status_names_loading_and_verification() -> None:
    statuses = {
        phase: status(Job.of({"id": "j", "status": "running", "phase": phase}))
        for phase in ("loading", "training", "verifying", None)
    }

    assert statuses == {
        "loading": "running: loading the base model",
        "training": "running",
        "verifying": "running: verifying the adapter",
        None: "running",
    }


Wait = Callable[..., Any]
UNFINISHED: dict[str, tuple[str, dict[str, str], Callable[[Lorry], Wait]]] = {
    "job": ("fine_tuning/jobs/x", {"status": "running"}, lambda lorry: lorry.jobs.wait),
    "plan": ("plans/x", {"status": "computing"}, lambda lorry: lorry.plans.wait),
    "sweep": ("sweeps/x", {"status": "running"}, lambda lorry: lorry.sweeps.wait),
    "model": ("models/x", {"state": "importing"}, lambda lorry: lorry.models.wait),
    "export": (
        "adapters/a/exports/x",
        {"status": "running"},
        lambda lorry: lambda ident, **given: lorry.adapters.exports.wait("a", ident, **given),
    ),
}


class Clock:
    """A clock that only the client's sleeping advances."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.mark.parametrize("kind", UNFINISHED)
def test_every_wait_raises_after_its_timeout_and_names_the_object(
    service: Script, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    path, response, wait_of = UNFINISHED[kind]
    service.on("GET", f"/v1/{path}", response)
    clock = Clock()
    monkeypatch.setattr(resource, "time", clock)

    with Lorry(service.url, "lorry_key", sleep=clock.sleep) as lorry, pytest.raises(WaitTimeout) as expired:
        wait_of(lorry)("x", timeout_seconds=5, poll_seconds=2)

    assert (clock.now, len(service.seen)) == (106.0, 4)
    assert " x " in expired.value.message
    assert "within 5 s." in expired.value.message
    assert expired.value.remedy.startswith("Wait again")
