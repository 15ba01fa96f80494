# pyright: basic
"""Tells a step that was computed with worthless weights: its loss is not zero, and its gradient is, exactly.

Steps at an absurd rate make weights so large that norms divide everything else away: the logits are those of no
text, and nothing that the job trains moves them. All numbers are finite, and none of a later step is of use.
"""

from collections.abc import Iterable

import numpy as np

from lora_core.adapter.flat_adapter import FlatAdapter
from lora_core.config import ObjectiveConfig
from lora_core.data.token_dataset import TokenDataset

LEAST_LOSS = 1e-3
"""Of a label. Rows known by heart have less, and then nothing is left to learn: their gradient may be zero."""


def is_dead(
    adapter: FlatAdapter,
    objective: ObjectiveConfig,
    dataset: TokenDataset,
    slices: Iterable[tuple[int, ...]],
    *,
    norm: float,
    loss: float,
) -> bool:
    """Of a whole step: `norm` of its gradient, which lies in the row, its mean `loss`, and its rows of the data.

    The slope of a cross-entropy, or of a square, is zero where the loss is. That of a preference need not be: KTO's
    saturates at a loss of 1, and what pulls equal answers apart cancels out. Those are never called dead.
    """
    if norm > 0 or loss <= LEAST_LOSS or objective.is_preference or bool(adapter.g.any()):
        return False  # (the norm is 0 also where the squares are too small for fp32)
    return any(_chooses(dataset, index) for part in slices for index in part)


def _chooses(dataset: TokenDataset, index: int) -> bool:
    """Whether attention has a choice before the row's last label. After a single token, or one repeated, whatever it
    attends to is the same, so that a job of queries and keys alone has no gradient by nature."""
    ids, mask = dataset.row(index)
    before = ids[: np.flatnonzero(mask)[-1]] if mask.any() else ids
    return bool((before != before[0]).any())
