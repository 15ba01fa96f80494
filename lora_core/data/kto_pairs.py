# pyright: strict
"""Single answers that were called desirable or not, and which of them KTO puts to another's prompt. No torch here.

z0, KTO's reference point, is how far the adapter is from the base on answers that don't belong to their prompts
(arXiv 2402.01306, section 4.1). Here, as in TRL, the answers of a batch go round by one: the first prompt gets the
last answer, each other one the answer before its own. The batch is that of the whole optimizer step, or the held-out
set, so z0 follows from the job's rows alone, and how they are cut into slices doesn't enter.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lora_core.data.token_dataset import TokenDataset
from lora_core.errors import BadDataset


def check_unpaired(dataset: TokenDataset) -> None:
    """Raises BadDataset where a row isn't labeled 1, desirable, or 0, or has no answer, or is alone."""
    labels = dataset.labels
    if labels is None or np.any((labels != 0) & (labels != 1)):
        raise _bad("its rows must have labels, 1 for a desirable answer and 0 for another")
    if np.any(np.add.reduceat(dataset.loss_mask.astype(np.int64), dataset.row_offsets[:-1]) == 0):
        raise _bad("a row has no answer")
    if dataset.num_rows < 2:
        raise _bad("it has one row, and kto puts answers to the prompts of others")


def mismatched(dataset: TokenDataset, rows: Sequence[int]) -> TokenDataset:
    """The prompts of `rows`, each with the answer of the row before it; the first with that of the last.

    None is longer than the longest row of the data, which the base takes: an answer is cut there, and its first token
    is always kept, for no prompt is as long as that.
    """
    longest = int(dataset.row_lengths().max())
    parts = [_joined(dataset, prompt, answer)[:, :longest] for prompt, answer in zip(rows, _moved(rows), strict=True)]
    ids, mask = np.concatenate(parts, axis=1)
    offsets = np.cumsum([0, *(part.shape[1] for part in parts)])
    return TokenDataset(input_ids=ids, loss_mask=mask.astype(np.uint8), row_offsets=offsets)


def _moved(rows: Sequence[int]) -> list[int]:
    return [*rows[-1:], *rows[:-1]]


def _joined(dataset: TokenDataset, prompt: int, answer: int) -> NDArray[np.int32]:
    """[2, T]: ids and mask. A row's answer begins with its first label."""
    before, after = (np.stack([ids, mask.astype(np.int32)]) for ids, mask in map(dataset.row, (prompt, answer)))
    return np.concatenate([before[:, : int(before[1].argmax())], after[:, int(after[1].argmax()) :]], axis=1)


def _bad(reason: str) -> BadDataset:
    return BadDataset(f"The token file is wrong: {reason}.", remedy="Write it again from the source data.")
