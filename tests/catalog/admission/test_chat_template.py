"""Conversations for a base model without a chat template are rejected when the job, plan or sweep is created."""

from __future__ import annotations

from typing import Any

import pytest

from catalog.errors import InvalidRequest
from tests.catalog.world import World

REMEDY = "lorry models add NAME SOURCE --chat-template chatml|gemma|llama3|zephyr|FILE"


@pytest.mark.parametrize(
    ("param", "training", "validation", "method"),
    [
        ("training_file", "chat", None, "supervised"),
        ("validation_file", "text", "chat", "supervised"),
        ("training_file", "preference", None, "dpo"),
    ],
)
def test_rows_that_need_a_template_are_rejected(
    world: World, param: str, training: str, validation: str | None, method: str
) -> None:
    base = world.base("plain", has_chat_template=False)
    files: dict[str, Any] = {"training_file": world.file(kind=training)}
    if validation is not None:
        files["validation_file"] = world.file(kind=validation)

    with pytest.raises(InvalidRequest, match="but base model 'plain' has no chat template") as refused:
        world.submit(model=base, method={"type": method}, **files)

    assert (refused.value.code, refused.value.param) == ("base_has_no_chat_template", param)
    assert files[param] in str(refused.value)
    assert REMEDY in str(refused.value.remedy)


@pytest.mark.parametrize("kind", ["text", "completion"])
def test_rows_of_text_need_no_template(world: World, kind: str) -> None:
    base = world.base("plain", has_chat_template=False)

    assert world.submit(model=base, training_file=world.file(kind=kind)).base_model == "plain"


def test_conversations_are_accepted_if_there_is_a_template(world: World) -> None:
    base = world.base("chatty", has_chat_template=True)

    assert world.submit(model=base).base_model == "chatty"
