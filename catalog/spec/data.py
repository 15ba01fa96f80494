"""Options for data files: which tokens are trained on, and how rows that are too long are handled."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from catalog.datasets.formats import RowKind
from catalog.errors import InvalidRequest
from catalog.spec.model_fields import Strict

Loss = Literal["assistant", "last_turn"]
Overflow = Literal["truncate", "drop", "split"]


class DataOptions(Strict):
    """How the rows of the training file and the validation file are used."""

    loss: Loss = Field(
        default="assistant",
        description=(
            "Trained tokens of a chat. assistant: every assistant message whose weight is not 0. last_turn: only the "
            "last assistant message (chats only)."
        ),
    )
    overflow: Overflow = Field(
        default="truncate",
        description=(
            "Handling of rows with more than max_length tokens. truncate: keep the start. drop: skip the row. split: "
            "split the row into consecutive pieces of max_length tokens (plain texts only)."
        ),
    )


def check_data(data: DataOptions, kind: RowKind, *, file_id: str) -> None:
    """Raises InvalidRequest if the options do not apply to this kind of rows."""
    if data.loss == "last_turn" and kind.name != "chat":
        raise InvalidRequest("loss_needs_chat", file_id=file_id, rows=kind.plural, param="data.loss")
    if data.overflow == "split" and kind.name != "text":
        raise InvalidRequest("split_needs_text", file_id=file_id, rows=kind.plural, param="data.overflow")
