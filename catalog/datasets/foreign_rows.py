"""Rows in forms of others, which this service does not read: each is told by its name, with how to write it here."""

from __future__ import annotations

from typing import Any

from catalog.datasets.chat import BadRow

PAIR = (
    '{"input": {"messages": [{"role": "user", "content": PROMPT}]}, '
    '"preferred_output": [{"role": "assistant", "content": CHOSEN}], '
    '"non_preferred_output": [{"role": "assistant", "content": REJECTED}]}'
)
PAIR_REMEDY = f"Write each pair in OpenAI's form: {PAIR}."
SHARED_PROMPT_REMEDY = (
    f"{PAIR_REMEDY} Without a key of its own, the prompt is what chosen and rejected begin with alike."
)
ALPACA_REMEDY = (
    'Write {"prompt": INSTRUCTION, "completion": OUTPUT}, with the text of input, where there is any, '
    "after the instruction in the prompt."
)
SHAREGPT_REMEDY = 'Write {"messages": [...]}: from becomes role (human: user, gpt: assistant), and value content.'


def refuse_foreign(row: dict[str, Any]) -> None:
    """Raises BadRow for a row of pairs in TRL's form, of instructions in Alpaca's, and of turns in ShareGPT's."""
    if "chosen" in row or "rejected" in row:
        remedy = PAIR_REMEDY if "prompt" in row else SHARED_PROMPT_REMEDY
        raise BadRow("trl_pair", "the row is a pair of answers in TRL's form, chosen and rejected", remedy)
    if "instruction" in row and "output" in row:
        raise BadRow("alpaca_row", "the row is in Alpaca's form, instruction, input and output", ALPACA_REMEDY)
    if "conversations" in row and "messages" not in row:
        raise BadRow("sharegpt_row", "the row is in ShareGPT's form, conversations", SHAREGPT_REMEDY)
