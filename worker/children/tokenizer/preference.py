"""Pairs of answers as text: of each the chosen one, then the rejected, both after the same prompt.

Only the answers are learnt. A pair of which the cut leaves an answer without a label is dropped whole, and counted.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from catalog.datasets.preference import PreferencePair
from worker.children.tokenizer.chat_template import ChatTemplate, Refused, Rendered
from worker.children.tokenizer.overflow import Tokens


def render_pair(template: ChatTemplate, pair: PreferencePair) -> tuple[Rendered, Rendered]:
    """(chosen, rejected). Raises Refused."""
    chosen, rejected = (
        template.render_last([*pair["prompt"], answer]) for answer in (pair["preferred"], pair["rejected"])
    )
    if _prompt(chosen) != _prompt(rejected):
        raise Refused(
            "template_changes_prompt",
            "The base's chat template writes the prompt differently for each of the two answers.",
            "Remove the row, or add the base again with a template that doesn't look ahead.",
        )
    return chosen, rejected


def are_equal(rows: Sequence[Tokens]) -> bool:
    """Of a pair, that nothing is left to compare once it was cut; one row alone is never so."""
    return len(rows) == 2 and np.array_equal(rows[0][0], rows[1][0])


def nothing_to_compare(num_pairs: int, longest: int, max_length: int) -> Refused:
    """longest: tokens of the longest prompt with an answer."""
    return Refused(
        "nothing_to_learn",
        f"None of the {num_pairs} pairs has two answers that differ within the first {max_length} tokens, the prompt "
        "included.",
        f"Shorten the prompts, or raise max_length (the longest prompt with its answer has {longest} tokens).",
    )


def _prompt(rendered: Rendered) -> str:
    return rendered.text[: rendered.spans[0][0]] if rendered.spans else rendered.text
