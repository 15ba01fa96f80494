"""Single answers with labels as text: each after its prompt, and nothing but the answer learnt."""

from __future__ import annotations

from dataclasses import replace

from catalog.datasets.unpaired_preference import LabelledAnswer, turns_of
from worker.children.tokenizer.chat_template import Refused, Rendered
from worker.children.tokenizer.text_encoder import BaseText


def render_labelled(base: BaseText, row: LabelledAnswer) -> Rendered:
    """Raises Refused."""
    turns = turns_of(row["answer"])
    if turns is None:
        rendered = base.render("completion", row["answer"], loss="assistant")
    else:
        rendered = base.template.render_last(turns)
    return replace(rendered, is_desirable=row["is_desirable"])


def refuse_one_label(num_rows: int, num_desirable: int) -> None:
    """Where all answers are called the same there is nothing to tell apart, and training would only make all of them
    likelier, which plain answers teach better, or all of them unlikely. Raises Refused."""
    if 0 < num_desirable < num_rows:
        return
    label = "true" if num_desirable else "false"
    instead = "or learn these by the method supervised, without labels" if num_desirable else "or remove the file"
    raise Refused(
        "one_label",
        f"All {num_rows} answers that are trained on have the label {label}, so there is nothing to tell apart.",
        f"Add answers with the other label, {instead}.",
    )
