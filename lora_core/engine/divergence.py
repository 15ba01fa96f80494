# pyright: basic
"""Detects steps with collapsed weights: the loss is not zero, but the gradient is exactly zero.

An excessive learning rate can make weights so large that normalization removes everything else. The logits are then
independent of the text, and no trained parameter changes them. All numbers are finite, but no later step can recover.
"""

from collections.abc import Iterable

import numpy as np

from lora_core.adapter.flat_adapter import FlatAdapter
from lora_core.config import ObjectiveConfig
from lora_core.data.token_dataset import TokenDataset

LEAST_LOSS = 1e-3
"""Loss per label in nats below which a zero gradient is legitimate, because the rows are memorized."""


def is_dead(
    adapter: FlatAdapter,
    objective: ObjectiveConfig,
    dataset: TokenDataset,
    slices: Iterable[tuple[int, ...]],
    *,
    norm: float,
    loss: float,
) -> bool:
    """Return whether a whole step was computed with collapsed weights.

    `norm` is that of its gradient in `adapter`, `loss` its mean loss, and `slices` its rows of `dataset`. The slope of
    a cross-entropy or a squared error is zero only if the loss is zero. Preference losses are never called dead: KTO's
    slope saturates at a loss of 1, and the gradients of two equal answers cancel.
    """
    if norm > 0 or loss <= LEAST_LOSS or objective.is_preference or bool(adapter.g.any()):
        return False  # the norm is also 0 if the squares underflow in fp32, so look at the elements
    return any(_chooses(dataset, index) for part in slices for index in part)


def _chooses(dataset: TokenDataset, index: int) -> bool:
    """Return whether the tokens before the row's last label differ from each other.

    After a single or repeated token, attention returns the same value whatever it attends to. A job that trains only
    queries and keys then has a zero gradient by construction.
    """
    ids, mask = dataset.row(index)
    before = ids[: np.flatnonzero(mask)[-1]] if mask.any() else ids
    return bool((before != before[0]).any())
