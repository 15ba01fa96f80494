"""The supervisor while an export runs, which may take hours: outages, internal errors, and how often it polls."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection
from typing import Any

import pytest

from catalog.db.database import Database
from catalog.error_texts import ErrorText
from catalog.errors import OutOfSpace
from catalog.queue import claiming
from catalog.queue.claiming import Claim
from catalog.tasks.task_queue import TaskKind
from tests.worker.pack_site import OUTAGE, PackSite
from worker import supervisor
from worker.background import base_models, task_runner
from worker.background.task_runner import TaskRunner
from worker.context.context import WorkerContext

FULL = OutOfSpace(ErrorText(code="out_of_space", message="The disk is full.", remedy="Free some space."))
PATIENCE_SECONDS = 120


@pytest.fixture
def ended(site: PackSite, monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Return an event. One export runs until it is set, or the worker has no more use for the export."""
    ended, begun = threading.Event(), threading.Event()

    def run_next(context: WorkerContext, kinds: Collection[TaskKind]) -> bool:
        if TaskKind.EXPORT not in kinds or begun.is_set():
            return False
        begun.set()
        while not ended.wait(0.01) and not context.draining:
            pass
        return True

    monkeypatch.setattr(task_runner, "run_next", run_next)
    monkeypatch.setattr(base_models, "clean", lambda _context: [])
    return ended


def supervised(site: PackSite) -> Callable[[], BaseException | None]:
    """Supervise on a thread. Returns a function that waits for the end, and returns the error."""
    errors: list[BaseException] = []

    def supervise() -> None:
        try:
            supervisor.supervise(site.context)
        except BaseException as error:  # noqa: BLE001  (the test compares it)
            errors.append(error)

    thread = threading.Thread(target=supervise, daemon=True)
    thread.start()

    def join() -> BaseException | None:
        thread.join(PATIENCE_SECONDS)
        assert not thread.is_alive()
        return errors[0] if errors else None

    return join


def claims_that(
    monkeypatch: pytest.MonkeyPatch, answer: Callable[[int], list[Claim]], *, claims: list[int] | None = None
) -> None:
    """Replace the claims of jobs by answer(number of the claim)."""
    made: list[int] = [] if claims is None else claims

    def claim_pack(_db: Database, **_options: Any) -> list[Claim]:
        made.append(len(made))
        return answer(made[-1])

    monkeypatch.setattr(claiming, "claim_pack", claim_pack)


@pytest.mark.parametrize("outage", [OUTAGE, FULL])
def test_an_outage_does_not_make_the_supervisor_wait_for_an_export(
    site: PackSite, ended: threading.Event, monkeypatch: pytest.MonkeyPatch, outage: Exception
) -> None:
    was_running: list[bool] = []

    def claim(number: int) -> list[Claim]:
        if number < 2:
            raise outage
        was_running.append(not ended.is_set())
        ended.set()
        return []

    claims_that(monkeypatch, claim)
    monkeypatch.setattr(supervisor, "OUTAGE_SECONDS", 0.01)

    assert supervised(site)() is None

    assert was_running[0], "the claim after the outage comes while the export is still running"


def test_an_outage_without_a_background_task_ends_the_supervisor(
    site: PackSite, ended: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended.set()

    def claim(_number: int) -> list[Claim]:
        raise OUTAGE

    claims_that(monkeypatch, claim)
    monkeypatch.setattr(supervisor, "OUTAGE_SECONDS", 0.01)

    assert supervised(site)() is OUTAGE


def test_an_internal_error_stops_the_export(
    site: PackSite, ended: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    def claim(_number: int) -> list[Claim]:
        raise RuntimeError("ours")

    claims_that(monkeypatch, claim)

    assert isinstance(supervised(site)(), RuntimeError)

    assert not ended.is_set()
    assert not site.context.draining, "the next turn of this worker works again"


def test_an_idle_worker_polls_no_more_often_during_an_export(
    site: PackSite, ended: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.settings = site.settings.model_copy(update={"poll_seconds": 3600})
    site.context.settings = site.settings
    claims: list[int] = []
    waited: list[bool] = []
    wait = TaskRunner.wait

    def counted(tasks: TaskRunner, seconds: float) -> bool:
        is_due = wait(tasks, min(seconds, 0.001))
        waited.append(is_due)
        if len(waited) == 200:
            site.context.notifier.wake_workers()
        if len(waited) == 300:
            ended.set()
        return is_due

    claims_that(monkeypatch, lambda _number: [], claims=claims)
    monkeypatch.setattr(TaskRunner, "wait", counted)

    assert supervised(site)() is None

    assert len(waited) >= 300
    assert len(claims) < 10, "at the start, after the notification, and when tasks end"
