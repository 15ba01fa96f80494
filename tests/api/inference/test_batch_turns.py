"""Batches take turns. At the end of its turn, a batch stops only requests that no worker answers yet."""

from __future__ import annotations

from collections.abc import Callable

import openai
import pytest

from api.deps import Services
from api.inference import batch_lines, batch_loop
from catalog.batches import execution
from catalog.db.database import Database
from catalog.tables.tenancy import Project
from tests.api.inference.batch_service import BatchTrainer, counts, create, input_line, strict_client, wait
from tests.api.site import Site, until
from tests.catalog.world import World

pytestmark = pytest.mark.usefixtures("quick")


def test_batches_take_turns(
    client: openai.OpenAI, batch_trainer: BatchTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_loop, "MAX_BATCHES", 1)
    monkeypatch.setattr(batch_lines, "TURN_SECONDS", 0.0)
    monkeypatch.setattr(batch_lines, "LINES_AT_ONCE", 2)
    monkeypatch.setattr(batch_lines, "MAX_IN_FLIGHT", 2)  # the first batch waits until both exist
    batch_trainer.gate.clear()
    first = create(client, *(input_line(str(n), f"first {n}") for n in range(20)))
    second = create(client, *(input_line(str(n), f"second {n}") for n in range(2)))
    batch_trainer.gate.set()

    wait(client, first.id)
    wait(client, second.id)

    order = [prompt.partition(" ")[0] for prompt in batch_trainer.prompts]
    assert order[:20] != ["first"] * 20
    assert (order.count("first"), order.count("second")) == (20, 2)


@pytest.mark.parametrize("num_lines", [1, 40])
def test_batch_that_can_not_progress_lets_others_continue(
    site: Site,
    client: openai.OpenAI,
    stranger_key: str,
    services: Services,
    world: World,
    batch_trainer: BatchTrainer,
    monkeypatch: pytest.MonkeyPatch,
    num_lines: int,
) -> None:
    monkeypatch.setattr(batch_loop, "MAX_BATCHES", 1)
    monkeypatch.setattr(batch_lines, "TURN_SECONDS", 0.5)
    monkeypatch.setattr(batch_lines, "GRACE_SECONDS", 3.0)
    monkeypatch.setattr(batch_lines, "CHECK_SECONDS", 0.1)
    with services.db.write() as session:
        session.get_one(Project, world.caller.project_id).max_tokens_per_day = 0
    stuck = create(client, *(input_line(str(number)) for number in range(num_lines)))
    wait(client, stuck.id, {"in_progress"})

    with strict_client(site, stranger_key) as other:
        assert wait(other, create(other, input_line("a", "theirs")).id).status == "completed"

    assert client.batches.retrieve(stuck.id).status == "in_progress"
    assert set(batch_trainer.prompts) == {"theirs"}  # on a slow machine, its turn may end before the worker's answer


@pytest.fixture
def observed(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Make turns short, with one batch at a time. Returns a function that returns how often a batch has found another
    one that waits."""
    monkeypatch.setattr(batch_loop, "MAX_BATCHES", 1)
    monkeypatch.setattr(batch_lines, "TURN_SECONDS", 0.0)
    monkeypatch.setattr(batch_lines, "GRACE_SECONDS", 0.3)
    is_any_waiting = execution.is_any_waiting
    found: list[bool] = []

    def counted(db: Database) -> bool:
        found.append(is_any_waiting(db))
        return found[-1]

    monkeypatch.setattr(execution, "is_any_waiting", counted)
    return lambda: sum(found)


def test_answer_that_takes_longer_than_a_turn_is_not_stopped(
    client: openai.OpenAI, batch_trainer: BatchTrainer, observed: Callable[[], int], num_begun: Callable[[], int]
) -> None:
    batch_trainer.suspends = lambda prompt: prompt == "long"
    first = create(client, input_line("a", "long"))
    until(lambda: num_begun() == 1)
    second = create(client, input_line("b", "short"))
    until(lambda: observed() >= 3)

    batch_trainer.resuming.set()

    assert counts(wait(client, first.id)) == (1, 1, 0)
    assert counts(wait(client, second.id)) == (1, 1, 0)
    assert batch_trainer.prompts == ["long", "short"]


def test_only_requests_without_an_answer_are_stopped_and_sent_again(
    client: openai.OpenAI, batch_trainer: BatchTrainer, observed: Callable[[], int], num_begun: Callable[[], int]
) -> None:
    batch_trainer.suspends = lambda prompt: prompt == "long"
    batch_trainer.holds = lambda prompt: prompt == "held"
    first = create(client, input_line("a", "long"), input_line("b", "held"))
    until(lambda: num_begun() == 1 and "held" in batch_trainer.prompts)
    batch_trainer.holds = lambda _: False
    second = create(client, input_line("c", "short"))
    until(lambda: observed() >= 3)

    batch_trainer.resuming.set()

    assert counts(wait(client, second.id)) == (1, 1, 0)
    assert counts(wait(client, first.id)) == (2, 2, 0)
    assert batch_trainer.prompts.count("long") == 1
    assert batch_trainer.prompts.count("held") >= 2
