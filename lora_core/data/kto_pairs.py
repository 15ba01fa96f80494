# pyright: strict
"""Mismatched prompts and answers for KTO's reference point. Does not import torch.

The reference point z0 measures how far the adapter is from the base model on answers that don't belong to their
prompts (arXiv 2402.01306, section 4.1). As in TRL, the answers of a batch are rotated by one: the first prompt gets
the last answer, every other prompt the answer of the previous row. The batch is the whole optimizer step or the whole
validation set. z0 is therefore independent of how the rows are cut into slices.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lora_core.data.token_dataset import TokenDataset, invalid


def check_unpaired(dataset: TokenDataset) -> None:
    """Raise BadDataset if a label is not 1 (desirable) or 0, a row has no answer, or there are fewer than two rows."""
    labels = dataset.labels
    if labels is None or np.any((labels != 0) & (labels != 1)):
        raise invalid("its rows must have labels, 1 for a desirable answer and 0 for an undesirable one")
    if np.any(np.add.reduceat(dataset.loss_mask.astype(np.int64), dataset.row_offsets[:-1]) == 0):
        raise invalid("a row has no answer")
    if dataset.num_rows < 2:
        raise invalid("it has only one row, but kto combines prompts with the answers of other rows")


def mismatched(dataset: TokenDataset, rows: Sequence[int]) -> TokenDataset:
    """Return the prompts of `rows`, each with the answer of the row before it. The first gets the last row's answer.

    Answers are truncated so that no row exceeds the longest row of the dataset, which is known to fit the base model.
    At least one token of the answer remains, because every prompt is shorter than the longest row.
    """
    longest = int(dataset.row_lengths().max())
    parts = [_joined(dataset, prompt, answer)[:, :longest] for prompt, answer in zip(rows, _rotated(rows), strict=True)]
    ids, mask = np.concatenate(parts, axis=1)
    offsets = np.cumsum([0, *(part.shape[1] for part in parts)])
    return TokenDataset(input_ids=ids, loss_mask=mask.astype(np.uint8), row_offsets=offsets)


def _rotated(rows: Sequence[int]) -> list[int]:
    return [*rows[-1:], *rows[:-1]]


def _joined(dataset: TokenDataset, prompt: int, answer: int) -> NDArray[np.int32]:
    """Return int32 [2, T]: token ids and loss mask. The answer of a row starts at its first label."""
    before, after = (np.stack([ids, mask.astype(np.int32)]) for ids, mask in map(dataset.row, (prompt, answer)))
    return np.concatenate([before[:, : int(before[1].argmax())], after[:, int(after[1].argmax()) :]], axis=1)
