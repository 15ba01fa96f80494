"""When a worker looks for something to import or to prepare."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from catalog.errors import Unavailable
from tests.worker.pack_site import OUTAGE, PackSite
from worker.background import base_models, tokenization
from worker.background.chores import Chores
from worker.context.context import WorkerContext


@pytest.fixture
def looks(site: PackSite, monkeypatch: pytest.MonkeyPatch) -> list[bool | Unavailable]:
    """What each look for files to prepare finds, the last one first; every one takes its own out."""
    answers: list[bool | Unavailable] = []

    def look(_context: WorkerContext) -> bool:
        answer = answers.pop()
        if isinstance(answer, Unavailable):
            raise answer
        return answer

    monkeypatch.setattr(base_models, "import_next", lambda _context: False)
    monkeypatch.setattr(base_models, "clean", lambda _context: None)
    monkeypatch.setattr(tokenization, "prepare_next", look)
    site.settings = site.settings.model_copy(update={"poll_seconds": 3600})
    site.context.settings = site.settings
    return answers


def finished(chores: Chores, go_on: Callable[[], bool]) -> bool:
    """Of the look that begins with `go_on`: whether it found something."""
    assert go_on()
    chores.wait(30)
    return chores.go_on()


def test_a_ring_brings_the_next_look_forward(site: PackSite, looks: list[bool | Unavailable]) -> None:
    looks += [False, False]
    with Chores(site.context) as chores:
        finished(chores, chores.go_on)

        assert not chores.go_on()
        assert not finished(chores, lambda: chores.go_on(has_rung=True))

    assert looks == []


def test_after_an_outage_a_ring_brings_nothing_forward(site: PackSite, looks: list[bool | Unavailable]) -> None:
    looks += [False, OUTAGE]
    with Chores(site.context) as chores:
        finished(chores, chores.go_on)

        assert not chores.go_on(has_rung=True)

    assert looks == [False]


def test_a_node_on_which_one_preparation_after_the_other_comes_to_nothing_waits_longer_and_longer(
    site: PackSite, looks: list[bool | Unavailable], monkeypatch: pytest.MonkeyPatch
) -> None:
    def hindered(_context: WorkerContext) -> bool:
        raise tokenization.Hindered

    mine = Chores(site.context)
    sound = tokenization.prepare_next
    monkeypatch.setattr(tokenization, "prepare_next", hindered)
    with mine:
        assert finished(mine, mine.go_on), "the next may be another's fault: at once"
        pauses: list[float] = []
        for _ in range(7):
            assert not mine._do_one()  # pyright: ignore[reportPrivateUsage]
            pauses.append(mine._back_off())  # pyright: ignore[reportPrivateUsage]
        monkeypatch.setattr(tokenization, "prepare_next", sound)
        looks += [True]
        assert mine._do_one()  # pyright: ignore[reportPrivateUsage]

    assert pauses == [10, 20, 40, 80, 160, 320, 320]
    assert mine._back_off() == 10  # pyright: ignore[reportPrivateUsage]


def test_what_was_prepared_rings_for_those_who_train(site: PackSite, looks: list[bool | Unavailable]) -> None:
    looks += [True]
    with Chores(site.context) as chores:
        assert finished(chores, chores.go_on)

    assert site.context.bell.has_rung()
