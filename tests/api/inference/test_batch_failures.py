"""A line that is interrupted by the end of its batch is charged, and one whose answer crashes fails alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import openai
import pytest

from api.deps import Services
from api.inference import batch_lines
from catalog.tables.serving import Batch
from tests.api.inference.batch_service import BatchTrainer, counts, create, input_line, rows_of, used_tokens, wait
from tests.api.site import until
from tests.catalog.world import World

pytestmark = pytest.mark.usefixtures("quick")


@pytest.mark.parametrize("end", ["cancelled", "expired"])
def test_tokens_of_interrupted_answers_count(
    client: openai.OpenAI,
    batch_trainer: BatchTrainer,
    services: Services,
    world: World,
    num_begun: Callable[[], int],
    end: str,
) -> None:
    batch_trainer.suspends = lambda prompt: prompt == "suspended"
    batch_trainer.holds = lambda prompt: prompt == "held"
    made = create(client, input_line("a"), input_line("b", "suspended"), input_line("c", "held"))
    until(lambda: counts(client.batches.retrieve(made.id)) == (3, 1, 0))
    until(lambda: num_begun() == 2)

    if end == "cancelled":
        client.batches.cancel(made.id)
    else:
        with services.db.write() as session:
            session.get_one(Batch, made.id).expires_at = 1.0
    batch = wait(client, made.id)

    assert (batch.status, *counts(batch)) == (end, 3, 1, 0)
    assert used_tokens(services.db, world) == (2, 4, 3)
    assert batch.usage is not None
    assert (batch.usage.input_tokens, batch.usage.output_tokens) == (4, 3)


def test_line_whose_answer_crashes_fails_alone_and_counts(
    client: openai.OpenAI,
    services: Services,
    world: World,
    batch_trainer: BatchTrainer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    success_result = batch_lines.success_result

    def crash(custom_id: str, *given: Any) -> Any:
        assert custom_id != "b", "as if the answer could not be written as JSON"
        return success_result(custom_id, *given)

    monkeypatch.setattr(batch_lines, "success_result", crash)
    batch = wait(client, create(client, input_line("a"), input_line("b"), input_line("c")).id)

    assert (batch.status, *counts(batch)) == ("completed", 3, 2, 1)
    assert used_tokens(services.db, world) == (3, 6, 9)
    assert len(batch_trainer.prompts) == 3
    (row,) = rows_of(client, batch.error_file_id)
    error = row["response"]["body"]["error"]
    assert (row["custom_id"], row["response"]["status_code"], error["code"]) == ("b", 500, "internal_error")
    assert row["response"]["request_id"] in error["message"]
