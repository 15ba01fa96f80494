# pyright: strict
"""Tokenized rows, their order, and how a batch is cut into slices: pure functions of the job alone."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
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
    """Rows of tokens, concatenated: row i is [row_offsets[i], row_offsets[i + 1]).

    input_ids int32 [N]; loss_mask uint8 [N], 1 where the token is a label (predicted from the position
    before it, in the same row); row_offsets int64 [rows + 1]. Of rows that are classified: labels fp32 [rows], the
    number of the class or the number to tell, and then no token need be one. token_types uint8 [N]: which of two
    texts a token is of, where the base model tells them apart.
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
        """Read a safetensors file with the three tensors, and the optional ones that it has.

        Raises BadDataset or UnsafeFile.
        """
        found = {name: dtype for name, (dtype, _) in read_header(path).items()}
        optional = {name: dtype for name, dtype in OPTIONAL_TENSORS.items() if name in found}
        if found != TENSORS | optional:
            raise _bad(f"{path.name} holds {found}, not {TENSORS}, with or without {OPTIONAL_TENSORS}")
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
        """(input_ids, loss_mask) of one row."""
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
        raise _bad("the three tensors have shapes that don't belong together")
    if offsets[0] != 0 or offsets[-1] != len(ids) or np.any(np.diff(offsets) < 2):
        raise _bad("row_offsets must start at 0, end at the number of tokens, and give rows of 2 tokens or more")
    if ids.min() < 0 or mask.max() > 1 or np.any(mask[offsets[:-1]]):
        raise _bad("ids must not be negative, the mask must be 0 or 1, and 0 at the first token of each row")
    if dataset.labels is not None:
        if dataset.labels.shape != (len(offsets) - 1,) or not np.isfinite(dataset.labels).all():
            raise _bad("there must be one finite label a row")
    elif np.any(np.add.reduceat(mask.astype(np.int64), offsets[:-1]) == 0):
        raise _bad("a row has no label")
    types = dataset.token_types
    if types is not None and (types.shape != ids.shape or types.max() > 1):
        raise _bad("token_types must be 0 or 1, one a token")


def _bad(reason: str) -> BadDataset:
    return BadDataset(f"The token file is wrong: {reason}.", remedy="Write it again from the source data.")


def rows_of_step(*, num_rows: int, batch_size: int, seed: int, step: int) -> list[int]:
    """Rows of optimizer step `step` (from 0): one endless stream of epochs, cut into batches.

    Epoch e is the permutation keyed by (seed, e), so the data cursor is the step number alone.
    """
    positions = range(step * batch_size, (step + 1) * batch_size)
    cursors = [divmod(position, num_rows) for position in positions]
    return [int(_epoch_order(seed, epoch, num_rows)[index]) for epoch, index in cursors]


@lru_cache(maxsize=32)
def _epoch_order(seed: int, epoch: int, num_rows: int) -> NDArray[np.int64]:
    return permutation("order", seed, epoch, count=num_rows)


def rows_of_examples(examples: Iterable[int], rows_per_example: int) -> tuple[int, ...]:
    """Rows of the examples, in their order; row 2e is the chosen and row 2e + 1 the rejected answer of pair e."""
    return tuple(example * rows_per_example + part for example in examples for part in range(rows_per_example))


def check_examples(dataset: TokenDataset, rows_per_example: int) -> None:
    """Raises BadDataset where rows are left over."""
    if dataset.num_rows % rows_per_example:
        raise _bad(f"its {dataset.num_rows} rows are no pairs")


def check_labels(dataset: TokenDataset, num_labels: int) -> None:
    """Raises BadDataset where a row of classification has no label, or one that isn't among the classes."""
    labels = dataset.labels
    if labels is None:
        raise _bad("its rows have no labels, which classification needs")
    if num_labels > 1 and np.any((labels != np.floor(labels)) | (labels < 0) | (labels >= num_labels)):
        raise _bad(f"a label isn't the number of a class, 0 to {num_labels - 1}")


def cut_slices(rows: list[int], lengths: NDArray[np.int64], *, slice_tokens: int) -> list[tuple[int, ...]]:
    """Consecutive rows of at most `slice_tokens` tokens together; a longer row is a slice of its own."""
    slices: list[tuple[int, ...]] = []
    current: list[int] = []
    num_tokens = 0
    for row in rows:
        length = int(lengths[row])
        if current and num_tokens + length > slice_tokens:
            slices.append(tuple(current))
            current, num_tokens = [], 0
        current.append(row)
        num_tokens += length
    return [*slices, tuple(current)] if current else slices


def data_digest(*datasets: TokenDataset | None) -> str:
    """sha256 over the token files of a job: a checkpoint continues on the same data only."""
    digest = hashlib.sha256()
    for dataset in datasets:
        if dataset is not None:
            arrays = (dataset.input_ids, dataset.loss_mask, dataset.row_offsets, dataset.labels, dataset.token_types)
            for array in (array for array in arrays if array is not None):
                digest.update(f"{array.dtype.str}{array.shape}".encode())
                digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
