"""One line of single answers with a label, in TRL's form: a prompt, an answer to it, and whether it is desirable.

Prompt and answer are those of plain_rows; as messages, the answer is the one assistant message that follows the prompt.
"""

from __future__ import annotations

from typing import Any, TypedDict, cast

from catalog.datasets.chat import BadRow, Message, kind_of, quoted
from catalog.datasets.completion import COMPLETION_KEYS, Completion, check_completion

LABEL = "label"
UNPAIRED_FORM = '{"prompt": ..., "completion": ..., "label": true}'
LABEL_REMEDY = f"Write true for a desirable answer and false for another: {UNPAIRED_FORM}."
ONE_ANSWER = 'Write [{"role": "assistant", "content": "..."}].'


class LabelledAnswer(TypedDict):
    """One answer to one prompt, and what was said of it."""

    answer: Completion
    is_desirable: bool


def check_unpaired(row: dict[str, Any]) -> LabelledAnswer:
    """Raises BadRow."""
    for key in row:
        if key != LABEL and key not in COMPLETION_KEYS:
            raise BadRow("unknown_key", f"the key {quoted(key)} is unknown", f"Write {UNPAIRED_FORM}.")
    if LABEL not in row:
        raise BadRow("label_missing", 'the key "label" is missing', LABEL_REMEDY)
    if not isinstance(row[LABEL], bool):
        raise BadRow("label_not_boolean", f"label is {kind_of(row[LABEL])}, not true or false", LABEL_REMEDY)
    answer = check_completion({key: value for key, value in row.items() if key != LABEL})
    if isinstance(answer["completion"], list):
        _check_turns(cast(list[Message], answer["prompt"]), answer["completion"])
    return LabelledAnswer(answer=answer, is_desirable=row[LABEL])


def turns_of(answer: Completion) -> list[Message] | None:
    """The conversation that ends with the answer; None where both are text."""
    if isinstance(answer["completion"], str):
        return None
    return [*cast(list[Message], answer["prompt"]), *answer["completion"]]


def _check_turns(prompt: list[Message], answer: list[Message]) -> None:
    if len(answer) > 1:
        remedy = "Put earlier turns into the prompt: the answer is the one assistant message that follows them."
        raise BadRow("several_answers", f"the completion has {len(answer)} messages, not one", remedy)
    if answer[0]["role"] != "assistant":
        raise BadRow("answer_not_assistant", f"completion[0].role is {quoted(answer[0]['role'])}", ONE_ANSWER)
    if prompt[-1]["role"] == "assistant":
        remedy = "An answer belongs in the completion; end the prompt with what is asked."
        raise BadRow("prompt_ends_with_answer", "the prompt ends with an assistant message", remedy)
    if any("weight" in message for message in (*prompt, *answer)):
        remedy = "Leave it out: the labelled answer is learnt and nothing else."
        raise BadRow("invalid_weight", "a message of a labelled answer has a weight", remedy)
