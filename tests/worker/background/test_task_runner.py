"""When a worker polls for base models to import and files to prepare."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection

import pytest

from catalog.tasks.task_queue import TaskKind
from tests.worker.pack_site import OUTAGE, PackSite
from worker.background import base_models, task_runner
from worker.background.task_runner import TaskDelayed, TaskRunner
from worker.context.context import WorkerContext


@pytest.fixture
def results(site: PackSite, monkeypatch: pytest.MonkeyPatch) -> list[bool | Exception]:
    """Return the results of the polls for files to prepare. Each poll pops the last one. No export waits."""
    answers: list[bool | Exception] = []

    def poll(_context: WorkerContext, kinds: Collection[TaskKind]) -> bool:
        answer = answers.pop() if TaskKind.PREPARATION in kinds else False
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(task_runner, "run_next", poll)
    monkeypatch.setattr(base_models, "clean", lambda _context: None)
    site.settings = site.settings.model_copy(update={"poll_seconds": 3600})
    site.context.settings = site.settings
    return answers


def finished(tasks: TaskRunner, start: Callable[[], bool]) -> bool:
    """Return whether the poll that `start` begins found something."""
    assert start()
    while tasks.is_busy:
        tasks.wait(30)
    return tasks.advance()


def test_a_notification_advances_the_next_poll(site: PackSite, results: list[bool | Exception]) -> None:
    results += [False, False]
    with TaskRunner(site.context) as tasks:
        finished(tasks, tasks.advance)

        assert not tasks.advance()
        assert not finished(tasks, lambda: tasks.advance(was_notified=True))

    assert results == []


def test_a_notification_does_not_advance_a_poll_after_an_outage(
    site: PackSite, results: list[bool | Exception]
) -> None:
    results += [False, OUTAGE]
    with TaskRunner(site.context) as tasks:
        finished(tasks, tasks.advance)

        assert not tasks.threads[0].advance(was_notified=True)

    assert results == [False]


def test_repeated_preparation_failures_back_off_exponentially(site: PackSite, results: list[bool | Exception]) -> None:
    results += [True, *(TaskDelayed() for _ in range(8))]
    thread = TaskRunner(site.context).threads[0]

    assert thread.do_one(), "the job may have caused the first failure: the next poll is immediate"
    pauses: list[float] = []
    for _ in range(7):
        assert not thread.do_one()
        pauses.append(thread.back_off())
    assert thread.do_one()

    assert pauses == [10, 20, 40, 80, 160, 320, 320]
    assert thread.back_off() == 10


def test_a_finished_preparation_notifies_the_workers(site: PackSite, results: list[bool | Exception]) -> None:
    results += [True]
    with TaskRunner(site.context) as tasks:
        assert finished(tasks, tasks.advance)

    assert site.context.notifier.was_notified()


def test_a_long_export_does_not_delay_the_preparation_of_jobs(
    site: PackSite, results: list[bool | Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, ended = threading.Event(), threading.Event()
    poll = task_runner.run_next

    def export(context: WorkerContext, kinds: Collection[TaskKind]) -> bool:
        if TaskKind.EXPORT not in kinds:
            return poll(context, kinds)
        begun.set()
        return ended.wait(30)

    monkeypatch.setattr(task_runner, "run_next", export)
    results += [True]
    with TaskRunner(site.context) as tasks:
        assert tasks.advance()
        assert begun.wait(30)
        tasks.wait(30)

        assert results == []
        assert tasks.advance(), "the export is still running"
        ended.set()
