"""What of a data file's rows is learnt, and what becomes of a row that is too long."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from catalog.datasets.formats import DataKind
from catalog.errors import InvalidRequest
from catalog.spec.strict import Strict

Loss = Literal["assistant", "last_turn"]
Overflow = Literal["truncate", "drop", "split"]


class DataRequest(Strict):
    """How the rows of both files are read."""

    loss: Loss = Field(
        default="assistant",
        description="Of a chat, learn every answer of weight other than 0, or only the last assistant message.",
    )
    overflow: Overflow = Field(
        default="truncate",
        description=(
            "A row of more than max_length tokens: keep its start, leave it out, or (plain texts only) cut it into "
            "consecutive pieces of max_length tokens."
        ),
    )


class DataSpec(Strict):
    """The same, as a job's record has it. The defaults are what records of before it was asked for mean."""

    loss: Loss = "assistant"
    overflow: Overflow = "truncate"


def check_data(data: DataRequest, kind: DataKind, *, file_id: str) -> None:
    """Raises InvalidRequest where the rows are not of a kind that this can be asked of."""
    if data.loss == "last_turn" and kind != "chat":
        raise InvalidRequest(
            f"The loss 'last_turn' is for chats, and the rows of {file_id} are of the kind {kind!r}.",
            code="loss_needs_chat",
            remedy="Leave data.loss out: of other rows what is learnt follows from their kind.",
            param="data.loss",
        )
    if data.overflow == "split" and kind != "text":
        raise InvalidRequest(
            f"Only plain texts can be split, and the rows of {file_id} are of the kind {kind!r}.",
            code="split_needs_text",
            remedy="Say 'truncate' or 'drop', raise max_length, or shorten the rows: a later piece of a conversation "
            "would lack what its answers are to.",
            param="data.overflow",
        )
