"""Live streams over a real connection: ordered, resumable, quiet when idle, and ended in time."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice

import pytest

from api.deps import Services
from api.job_objects import job_objects
from api.schemas.jobs import FineTuningJob
from api.streaming import hub, sources
from catalog.caller import Caller
from catalog.db.database import Database
from catalog.history import changes, queries
from catalog.jobs import commands
from catalog.lifecycle import recording
from catalog.queue import claims
from catalog.states import EndReason
from catalog.tables.jobs import Job
from catalog.tenancy import authentication
from tests.api.site import Message, Site, messages
from tests.catalog.world import World, end_key


@contextmanager
def opened(site: Site, path: str, **headers: str) -> Iterator[Iterator[Message]]:
    with site.http() as http, http.stream("GET", path, headers=headers, timeout=20) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        yield messages(response.iter_lines())


def stream_path(job_id: str) -> str:
    return f"/v1/fine_tuning/jobs/{job_id}/stream"


def test_stream_sends_history_then_updates_then_the_final_job(site: Site, world: World) -> None:
    world.worker()
    claim = world.running()
    history = world.events(claim.job.id)

    with opened(site, stream_path(claim.job.id)) as stream:
        received = list(islice(stream, len(history) + 1))
        recording.record_metrics(world.db, claim.claim_id, [{"kind": "train", "step": 1, "loss": 2.5}])
        recording.record_progress(world.db, claim.claim_id, {"step": 1, "num_steps": 10, "loss": 2.5})
        while (update := next(stream)).event != "metric":
            pass
        world.complete(claim.claim_id)
        rest = list(stream)

    assert [message.event for message in received] == ["event"] * len(history) + ["job"]
    assert [message.id for message in received[:-1]] == [str(event.seq) for event in history]
    assert received[-1].data["status"] == "running"
    assert (update.data["step"], update.data["loss"]) == (1, 2.5)
    assert rest[-1].event == "job"
    assert rest[-1].data["status"] == "succeeded"
    assert rest[-1].data["fine_tuned_model"]
    assert rest[-2].data["message"] == "The job has successfully completed"


def test_stream_resumes_after_the_last_event_id(site: Site, world: World) -> None:
    job = world.queued()
    seen = world.events(job.id)

    with opened(site, stream_path(job.id), **{"last-event-id": str(seen[0].seq)}) as stream:
        received = list(islice(stream, len(seen)))
        commands.cancel(world.db, project_id=world.caller.project_id, job_id=job.id)
        rest = list(stream)

    assert [message.id for message in received] == [*(str(event.seq) for event in seen[1:]), None]
    assert [(message.event, message.data.get("status")) for message in rest] == [("event", None), ("job", "cancelled")]


def test_reconnect_after_the_end_returns_204(site: Site, world: World) -> None:
    job = world.submit()
    commands.cancel(world.db, project_id=world.caller.project_id, job_id=job.id)

    with opened(site, stream_path(job.id)) as stream:
        received = list(stream)
    with site.http() as http:
        last = [message.id for message in received if message.id][-1]
        again = http.get(stream_path(job.id), headers={"last-event-id": str(last)})

    assert received[-1].data["status"] == "cancelled"
    assert again.status_code == 204


def test_idle_stream_sends_comments(site: Site, world: World) -> None:
    job = world.queued()

    with site.http() as http, http.stream("GET", stream_path(job.id)) as response:
        comment = next(line for line in response.iter_lines() if line.startswith(":"))

    assert comment == ": still here"


def test_queue_stream_sends_changes(site: Site, world: World) -> None:
    with opened(site, "/v1/queue/stream") as stream:
        empty = next(stream)
        job = world.submit()
        changed = next(stream)

    assert (empty.event, empty.data["jobs"]) == ("queue", [])
    assert [entry["job_id"] for entry in changed.data["jobs"]] == [job.id]


def test_stream_of_an_unknown_job_returns_the_standard_error(site: Site) -> None:
    with site.http() as http:
        response = http.get(stream_path("ftjob-none"))

    assert response.status_code == 404
    assert response.json()["error"]["code"] == "job_not_found"


def test_open_streams_do_not_delay_shutdown(site: Site, world: World) -> None:
    job = world.queued()

    with opened(site, stream_path(job.id)) as stream:
        next(stream)
        site.server.should_exit = True
        rest = list(stream)

    assert all(message.data.get("status") != "succeeded" for message in rest)


def test_disconnected_listener_is_removed(site: Site, world: World, services: Services) -> None:
    job = world.queued()
    with opened(site, stream_path(job.id)) as stream:
        next(stream)
        assert services.feed.num_listeners() == 1

    with opened(site, "/v1/queue/stream") as stream:  # one poll of the server later
        next(stream)
        world.submit()
        next(stream)
        assert services.feed.num_listeners() == 1


def test_crash_in_one_stream_ends_only_that_stream(site: Site, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    job = world.queued()
    with opened(site, "/v1/queue/stream") as queue, opened(site, stream_path(job.id)) as stream:
        next(queue)
        next(stream)
        look, calls = changes.poll_many, []

        def crash(*given: object) -> object:
            calls.append(given)
            raise RuntimeError("inside")

        monkeypatch.setattr(changes, "poll_many", crash)
        list(stream)
        monkeypatch.setattr(changes, "poll_many", look)
        world.submit()

        assert calls
        assert next(queue).event == "queue"


def test_stream_ends_at_its_maximum_age(site: Site, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "MAX_STREAM_SECONDS", 0.3)
    job = world.queued()

    with opened(site, stream_path(job.id)) as stream:
        received = list(stream)

    assert received[-1].event == "job"


def test_stream_ends_when_its_key_is_revoked(
    site: Site, world: World, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "RECHECK_SECONDS", 0.0)
    job = world.queued()
    key_id = authentication.authenticate(services.db, secret=site.key, pepper=services.pepper).api_key_id

    with opened(site, "/v1/queue/stream") as queue, opened(site, stream_path(job.id)) as stream:
        next(queue)
        next(stream)
        end_key(services.db, key_id)
        rest = [*queue, *stream]

    assert all(message.data.get("status") == "queued" for message in rest if message.event == "job")
    assert services.feed.num_listeners() == 0


def test_replayed_steps_are_sent_again_and_nothing_else_twice(world: World) -> None:
    world.worker()
    claim = world.running()
    mark = changes.start(world.db, project_id=world.caller.project_id, job_id=claim.job.id, last_seen=None)
    recording.record_metrics(
        world.db, claim.claim_id, [{"kind": "train", "step": s, "loss": 1.0} for s in range(1, 301)]
    )

    first = changes.poll(world.db, mark)
    nothing = changes.poll(world.db, mark)
    claims.end(world.db, claim.claim_id, reason=EndReason.DRAINED, detail="")
    (again,) = world.claim()
    recording.record_metrics(
        world.db, again.claim_id, [{"kind": "train", "step": s, "loss": 2.0} for s in range(50, 53)]
    )
    replayed = changes.poll(world.db, mark)

    assert [point.step for point in first.points] == list(range(1, 301))
    assert (nothing.points, nothing.events) == ([], [])
    assert [(point.step, point.loss) for point in replayed.points] == [(50, 2.0), (51, 2.0), (52, 2.0)]


def test_new_watcher_receives_old_messages_but_no_old_metrics(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(changes, "RECENT_SECONDS", 0.0)
    world.worker()
    claim = world.running()
    recording.record_metrics(world.db, claim.claim_id, [{"kind": "train", "step": 1, "loss": 3.0}])
    recording.record_event(world.db, claim.claim_id, "info", "half way")

    mark = changes.start(world.db, project_id=world.caller.project_id, job_id=claim.job.id, last_seen=None)
    first = changes.poll(world.db, mark)
    recording.record_metrics(world.db, claim.claim_id, [{"kind": "train", "step": 2, "loss": 2.0}])
    second = changes.poll(world.db, mark)

    assert "half way" in [event.message for event in first.events]
    assert "metrics" not in [event.type for event in first.events]
    assert first.points == []
    assert [point.step for point in second.points] == [2]
    assert [event.type for event in second.events] == ["metrics"]


def test_returning_watcher_receives_each_point_exactly_once(world: World) -> None:
    world.worker()
    claim = world.running()
    mark = changes.start(world.db, project_id=world.caller.project_id, job_id=claim.job.id, last_seen=None)
    recording.record_metrics(world.db, claim.claim_id, [{"kind": "train", "step": s, "loss": 3.0} for s in (1, 2)])
    seen = changes.poll(world.db, mark).events[-1]
    assert seen.type == "metrics"
    recording.record_metrics(world.db, claim.claim_id, [{"kind": "train", "step": 3, "loss": 2.0}])

    again = changes.start(world.db, project_id=world.caller.project_id, job_id=claim.job.id, last_seen=seen.seq)
    news = changes.poll(world.db, again)

    assert [point.step for point in news.points] == [3]
    assert [event.type for event in news.events] == ["metrics"]


def test_event_follows_the_points_recorded_with_it(world: World) -> None:
    world.worker()
    claim = world.running()
    mark = changes.start(world.db, project_id=world.caller.project_id, job_id=claim.job.id, last_seen=None)
    changes.poll(world.db, mark)
    for first in (1, 3):
        points = [{"kind": "train", "step": step, "loss": 1.0} for step in (first, first + 1)]
        recording.record_metrics(world.db, claim.claim_id, points)

    news = changes.poll(world.db, mark)

    assert [getattr(item, "step", "event") for item in news.items] == [1, 2, "event", 3, 4, "event"]


def test_long_history_is_split_over_several_polls(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(changes, "MAX_ROWS", 10)
    world.worker()
    claim = world.running()
    mark = changes.start(world.db, project_id=world.caller.project_id, job_id=claim.job.id, last_seen=None)
    for step in range(1, 31):
        recording.record_metrics(world.db, claim.claim_id, [{"kind": "train", "step": step, "loss": 1.0}])

    looks = [changes.poll(world.db, mark)]
    while looks[-1].has_more:
        looks.append(changes.poll(world.db, mark))

    assert [point.step for news in looks for point in news.points] == list(range(1, 31))
    assert len(looks) > 3
    assert max(len(news.events) for news in looks) == 10


def test_empty_poll_reads_only_the_jobs_row(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    row_counts: list[int] = []

    def counted(db: Database, rows: Sequence[Job], *, caller: Caller | None = None) -> list[FineTuningJob]:
        row_counts.append(len(rows))
        return job_objects(db, rows, caller=caller)

    monkeypatch.setattr(sources, "job_objects", counted)
    claim = world.running()
    watch, _ = sources.JobWatch.start(world.db, caller=world.caller, job_id=claim.job.id, last_seen=None)

    world.pass_time(5, claim.claim_id)
    quiet = watch.poll()
    recording.record_progress(world.db, claim.claim_id, {"step": 1, "num_steps": 10, "loss": 2.5})
    news = watch.poll()

    assert (quiet.parts, quiet.view_message, news.parts) == ([], b"", [])
    assert row_counts == [1, 1]
    shown = queries.seconds_running(world.db, [claim.job.id])[claim.job.id]
    assert 0 < json.loads(news.view_message.decode().partition("data: ")[2])["seconds_running"] <= shown
