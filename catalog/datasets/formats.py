"""Defines the kinds of rows that a data set may have. Only this table distinguishes them.

The keys of a row determine its kind. All rows of a file must have the kind of its first row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

from catalog.datasets.chat import check_chat, is_supervised
from catalog.datasets.row_json import BadRow, quoted
from catalog.datasets.rows import (
    COMPLETION_FORM,
    LABEL,
    PAIR_FORM,
    TEXT_FORM,
    UNPAIRED_FORM,
    check_completion,
    check_pair,
    check_text,
    check_unpaired,
    is_completion_supervised,
)

DataKind = Literal["chat", "completion", "text", "preference", "unpaired"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RowKind:
    """One kind of row."""

    name: DataKind
    keys: tuple[str, ...]
    """A row with any of these keys is of this kind. `_is_labeled` detects answers with a label."""
    noun: str
    plural: str
    form: str
    check: Callable[[dict[str, Any]], Any]
    """Return the validated row. Raises BadRow."""
    is_supervised: Callable[[Any], bool]
    """Return whether the result of `check` has tokens to train on."""


PREFERENCE = RowKind(
    name="preference",
    keys=("input", "preferred_output", "non_preferred_output"),
    noun="a preference pair",
    plural="preference pairs",
    form=PAIR_FORM,
    check=check_pair,
    is_supervised=lambda _: True,
)
UNPAIRED = RowKind(
    name="unpaired",
    keys=(),
    noun="a labeled answer",
    plural="labeled answers",
    form=UNPAIRED_FORM,
    check=check_unpaired,
    is_supervised=lambda _: True,
)
COMPLETION = RowKind(
    name="completion",
    keys=("prompt", "completion"),
    noun="a prompt with its completion",
    plural="prompts with completions",
    form=COMPLETION_FORM,
    check=check_completion,
    is_supervised=is_completion_supervised,
)
KINDS = (
    RowKind(
        name="chat",
        keys=("messages",),
        noun="a chat",
        plural="chats",
        form='{"messages": [...]}',
        check=check_chat,
        is_supervised=is_supervised,
    ),
    COMPLETION,
    RowKind(
        name="text",
        keys=("text",),
        noun="plain text",
        plural="plain text",
        form=TEXT_FORM,
        check=check_text,
        is_supervised=lambda _: True,
    ),
    PREFERENCE,
    UNPAIRED,
)
KIND_NAMES = tuple(kind.name for kind in KINDS)
MAX_NAMED_KEYS = 5
FORMS = ", ".join(kind.form for kind in KINDS[:-1]) + f" or {KINDS[-1].form}"


def row_kind(name: str | None) -> RowKind:
    """Return the kind of a data set's rows. name: `kind` of the file's database row."""
    return next(kind for kind in KINDS if kind.name == name)


def kind_of_row(row: dict[str, Any], *, before: RowKind | None, first_line: int = 1) -> RowKind:
    """Return the row's kind. before: kind of the previous rows, the first of which is in line `first_line`. None for
    the first row. Raises BadRow."""
    refuse_foreign(row)
    found = next((kind for kind in KINDS if any(key in row for key in kind.keys)), before)
    if found is None:
        raise _unknown(row)
    if found is COMPLETION and _is_labeled(row, before):
        found = UNPAIRED
    if before is not None and found is not before:
        raise BadRow("mixed_kinds", kind=found.noun, first_line=first_line, first_kind=before.noun)
    return found


def _is_labeled(row: dict[str, Any], before: RowKind | None) -> bool:
    """Return whether a prompt with an answer is a labeled one. After labeled rows, its label is missing."""
    return LABEL in row or before is UNPAIRED


def _unknown(row: dict[str, Any]) -> BadRow:
    if row:
        keys = [quoted(key) for key in islice(row, MAX_NAMED_KEYS)]
        if len(row) == 1:
            return BadRow("only_key_unsupported", key=keys[0])
        if len(row) > len(keys):
            return BadRow("keys_unsupported_and_more", keys=", ".join(keys), num_more=len(row) - len(keys))
        return BadRow("keys_unsupported", keys=", ".join(keys))
    return BadRow("row_empty")


def refuse_foreign(row: dict[str, Any]) -> None:
    """Raises BadRow for preference pairs in TRL's format, and for rows in the formats of Alpaca and ShareGPT."""
    if "chosen" in row or "rejected" in row:
        raise BadRow("trl_pair" if "prompt" in row else "trl_pair_without_prompt")
    if "instruction" in row and "output" in row:
        raise BadRow("alpaca_row")
    if "conversations" in row and "messages" not in row:
        raise BadRow("sharegpt_row")
