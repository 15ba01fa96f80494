"""When a worker polls for base models to import and files to prepare."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from catalog.errors import Unavailable
from tests.worker.pack_site import OUTAGE, PackSite
from worker.background import base_models, exports, tokenization
from worker.background.task_runner import TaskRunner, _ExportThread  # pyright: ignore[reportPrivateUsage]
from worker.context.context import WorkerContext


@pytest.fixture
def results(site: PackSite, monkeypatch: pytest.MonkeyPatch) -> list[bool | Unavailable]:
    """Return the results of the polls for files to prepare. Each poll pops the last one."""
    answers: list[bool | Unavailable] = []

    def poll(_context: WorkerContext) -> bool:
        answer = answers.pop()
        if isinstance(answer, Unavailable):
            raise answer
        return answer

    monkeypatch.setattr(_ExportThread, "advance", lambda _self, **_options: False)
    monkeypatch.setattr(base_models, "import_next", lambda _context: False)
    monkeypatch.setattr(base_models, "clean", lambda _context: None)
    monkeypatch.setattr(tokenization, "prepare_next", poll)
    site.settings = site.settings.model_copy(update={"poll_seconds": 3600})
    site.context.settings = site.settings
    return answers


def finished(tasks: TaskRunner, start: Callable[[], bool]) -> bool:
    """Return whether the poll that `start` begins found something."""
    assert start()
    tasks.wait(30)
    return tasks.advance()


def test_a_notification_advances_the_next_poll(site: PackSite, results: list[bool | Unavailable]) -> None:
    results += [False, False]
    with TaskRunner(site.context) as tasks:
        finished(tasks, tasks.advance)

        assert not tasks.advance()
        assert not finished(tasks, lambda: tasks.advance(was_notified=True))

    assert results == []


def test_a_notification_does_not_advance_a_poll_after_an_outage(
    site: PackSite, results: list[bool | Unavailable]
) -> None:
    results += [False, OUTAGE]
    with TaskRunner(site.context) as tasks:
        finished(tasks, tasks.advance)

        assert not tasks.advance(was_notified=True)

    assert results == [False]


def test_repeated_preparation_failures_back_off_exponentially(
    site: PackSite, results: list[bool | Unavailable], monkeypatch: pytest.MonkeyPatch
) -> None:
    def hindered(_context: WorkerContext) -> bool:
        raise tokenization.PreparationDelayed

    mine = TaskRunner(site.context)
    sound = tokenization.prepare_next
    monkeypatch.setattr(tokenization, "prepare_next", hindered)
    with mine:
        assert finished(mine, mine.advance), "the job may have caused the first failure: the next poll is immediate"
        pauses: list[float] = []
        for _ in range(7):
            assert not mine._do_one()  # pyright: ignore[reportPrivateUsage]
            pauses.append(mine._back_off())  # pyright: ignore[reportPrivateUsage]
        monkeypatch.setattr(tokenization, "prepare_next", sound)
        results += [True]
        assert mine._do_one()  # pyright: ignore[reportPrivateUsage]

    assert pauses == [10, 20, 40, 80, 160, 320, 320]
    assert mine._back_off() == 10  # pyright: ignore[reportPrivateUsage]


def test_a_finished_preparation_notifies_the_workers(site: PackSite, results: list[bool | Unavailable]) -> None:
    results += [True]
    with TaskRunner(site.context) as tasks:
        assert finished(tasks, tasks.advance)

    assert site.context.notifier.was_notified()


def test_a_long_export_does_not_delay_the_preparation_of_jobs(
    site: PackSite, results: list[bool | Unavailable], monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, ended = threading.Event(), threading.Event()

    def export(_context: WorkerContext) -> bool:
        begun.set()
        return ended.wait(30)

    monkeypatch.undo()
    monkeypatch.setattr(exports, "export_next", export)
    monkeypatch.setattr(base_models, "import_next", lambda _context: False)
    monkeypatch.setattr(tokenization, "prepare_next", lambda _context: bool(results.pop()))
    results += [True]
    with TaskRunner(site.context) as tasks:
        assert tasks.advance()
        assert begun.wait(30)
        tasks.wait(30)

        assert results == []
        assert tasks.advance(), "the export is still running"
        ended.set()
