# pyright: strict
"""Tokenized rows, their order, and how batches are cut into slices. All are pure functions of the job alone."""

import hashlib
from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file  # pyright: ignore[reportUnknownVariableType]

from lora_core.errors import BadDataset
from lora_core.runtime.counter_rng import permutation
from lora_core.runtime.safetensors_io import read_header

TENSORS = {"input_ids": "I32", "loss_mask": "U8", "row_offsets": "I64"}
OPTIONAL_TENSORS = {"labels": "F32", "token_types": "U8"}


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenDataset:
    """Concatenated rows of tokens: row i is [row_offsets[i], row_offsets[i + 1]).

    Attributes:
        input_ids: int32 [N].
        loss_mask: uint8 [N], 1 if the token is a label, which is predicted from the position before it. 0 at the
            first token of each row.
        row_offsets: int64 [rows + 1]. Each row has at least 2 tokens and, without `labels`, at least one label.
        labels: fp32 [rows] for sequence classification and KTO: the class number, the regression target, or whether
            the answer is desirable.
        token_types: uint8 [N]: which of two texts the token belongs to, for base models that distinguish them.

    Raises:
        BadDataset: The arrays violate this format.
    """

    input_ids: NDArray[np.int32]
    loss_mask: NDArray[np.uint8]
    row_offsets: NDArray[np.int64]
    labels: NDArray[np.float32] | None = None
    token_types: NDArray[np.uint8] | None = None

    def __post_init__(self) -> None:
        _check_rows(self)

    @classmethod
    def load(cls, path: Path) -> "TokenDataset":
        """Read a safetensors file with the three required tensors and any of the optional ones.

        Raises BadDataset or UnsafeFile.
        """
        found = {name: dtype for name, (dtype, _) in read_header(path).items()}
        optional = {name: dtype for name, dtype in OPTIONAL_TENSORS.items() if name in found}
        if found != TENSORS | optional:
            raise invalid(f"{path.name} contains {found}, expected {TENSORS} and optionally {OPTIONAL_TENSORS}")
        return cls(**load_file(path))

    @property
    def num_rows(self) -> int:
        return len(self.row_offsets) - 1

    @property
    def num_tokens(self) -> int:
        return len(self.input_ids)

    @property
    def num_supervised_tokens(self) -> int:
        return int(self.loss_mask.sum(dtype=np.int64))

    def row_lengths(self) -> NDArray[np.int64]:
        return np.diff(self.row_offsets)

    def row(self, index: int) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
        """Return (input_ids, loss_mask) of one row, as views."""
        start, stop = self.row_offsets[index], self.row_offsets[index + 1]
        return self.input_ids[start:stop], self.loss_mask[start:stop]

    def row_label(self, index: int) -> float:
        assert self.labels is not None
        return float(self.labels[index])

    def row_token_types(self, index: int) -> NDArray[np.uint8] | None:
        if self.token_types is None:
            return None
        return self.token_types[self.row_offsets[index] : self.row_offsets[index + 1]]


def _check_rows(dataset: TokenDataset) -> None:
    ids, mask, offsets = dataset.input_ids, dataset.loss_mask, dataset.row_offsets
    if ids.ndim != 1 or mask.shape != ids.shape or offsets.ndim != 1 or len(offsets) < 2:
        raise invalid("the shapes of the three tensors don't match")
    if offsets[0] != 0 or offsets[-1] != len(ids) or np.any(np.diff(offsets) < 2):
        raise invalid("row_offsets must start at 0, end at the number of tokens, and delimit rows of at least 2 tokens")
    if ids.min() < 0 or mask.max() > 1 or np.any(mask[offsets[:-1]]):
        raise invalid("ids must not be negative, and the mask must be 0 or 1, and 0 at the first token of each row")
    if dataset.labels is not None:
        if dataset.labels.shape != (len(offsets) - 1,) or not np.isfinite(dataset.labels).all():
            raise invalid("each row must have one finite label")
    elif np.any(np.add.reduceat(mask.astype(np.int64), offsets[:-1]) == 0):
        raise invalid("a row has no label")
    types = dataset.token_types
    if types is not None and (types.shape != ids.shape or types.max() > 1):
        raise invalid("token_types must have one value of 0 or 1 for each token")


def invalid(reason: str) -> BadDataset:
    return BadDataset(f"The token file is invalid: {reason}.", remedy="Create it again from the source data.")


def rows_of_step(*, num_rows: int, batch_size: int, seed: int, step: int) -> list[int]:
    """Return the rows of optimizer step `step` (from 0): consecutive epochs form one stream that is cut into batches.

    The order of epoch e is a permutation keyed by (seed, e), so the step number is the only data cursor.
    """
    positions = range(step * batch_size, (step + 1) * batch_size)
    cursors = [divmod(position, num_rows) for position in positions]
    return [int(_epoch_order(seed, epoch, num_rows)[index]) for epoch, index in cursors]


@lru_cache(maxsize=32)
def _epoch_order(seed: int, epoch: int, num_rows: int) -> NDArray[np.int64]:
    return permutation("order", seed, epoch, count=num_rows)


def rows_of_examples(examples: Iterable[int], rows_per_example: int) -> tuple[int, ...]:
    """Return the rows of the examples, in order. Pair e consists of row 2e (chosen) and row 2e + 1 (rejected)."""
    return tuple(example * rows_per_example + part for example in examples for part in range(rows_per_example))


def check_examples(dataset: TokenDataset, rows_per_example: int) -> None:
    """Raise BadDataset if the number of rows is not a multiple of `rows_per_example`."""
    if dataset.num_rows % rows_per_example:
        raise invalid(f"its {dataset.num_rows} rows can't be grouped into pairs")


def check_labels(dataset: TokenDataset, num_labels: int) -> None:
    """Raise BadDataset if rows for classification have no labels, or a label is not the number of a class."""
    labels = dataset.labels
    if labels is None:
        raise invalid("its rows have no labels, but classification needs them")
    if num_labels > 1 and np.any((labels != np.floor(labels)) | (labels < 0) | (labels >= num_labels)):
        raise invalid(f"a label is not a class number from 0 to {num_labels - 1}")


def cut_slices(rows: list[int], lengths: NDArray[np.int64], *, slice_tokens: int) -> list[tuple[int, ...]]:
    """Group consecutive rows into as few slices of at most `slice_tokens` tokens as possible, of similar sizes.

    A longer row is a slice of its own. Lanes compute slices at the same time, so a large and a small slice would leave
    a core idle: the limit is lowered as far as the number of slices stays the same.
    """
    ends = list(accumulate(int(lengths[row]) for row in rows))
    fewest = len(_slice_starts(ends, slice_tokens))
    lower = bisect_left(range(slice_tokens), True, key=lambda limit: len(_slice_starts(ends, limit)) == fewest)
    starts = _slice_starts(ends, lower)
    return [tuple(rows[start:stop]) for start, stop in pairwise([*starts, len(rows)])]


def _slice_starts(ends: list[int], limit: int) -> list[int]:
    """Return the first row of each slice if each takes as many rows as `limit` tokens allow, and at least one.

    `ends` are the sums of the rows' lengths.
    """
    starts: list[int] = []
    start = before = 0
    while start < len(ends):
        starts.append(start)
        start = max(start + 1, bisect_right(ends, before + limit))
        before = ends[start - 1]
    return starts


def data_digest(*datasets: TokenDataset | None) -> str:
    """Return the sha256 of a job's token datasets. A checkpoint can only be resumed on the same data."""
    digest = hashlib.sha256()
    for dataset in datasets:
        if dataset is not None:
            arrays = (dataset.input_ids, dataset.loss_mask, dataset.row_offsets, dataset.labels, dataset.token_types)
            for array in (array for array in arrays if array is not None):
                digest.update(f"{array.dtype.str}{array.shape}".encode())
                digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
