# pyright: basic
"""The packed batch of one pass: slices of several jobs, concatenated without padding between sequences.

T, the number of tokens, is rounded up to a multiple of 16 with a padding sequence that belongs to no job. Below 16
rows a GEMM uses other kernels, and at odd sizes the last elements use scalar code, so results would depend on T.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lora_core.adapter.flat_adapter import FlatAdapter
from lora_core.config import ObjectiveConfig
from lora_core.kernels.drawing import mask_like, uniform_rows
from lora_core.kernels.kv_cache import SequenceCache
from lora_core.kernels.selection import Kernels
from lora_core.runtime.counter_rng import philox_keys
from lora_core.runtime.transfers import upload

ROW_MULTIPLE = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class NoiseKey:
    """Key of the NEFTune noise of one slice, whose sequences have these lengths."""

    alpha: float
    seed: int
    step: int
    slice_index: int
    lengths: tuple[int, ...]

    def noise_tD(self, num_features: int, device: torch.device) -> Tensor:
        """Return the noise: fp32 [t, num_features].

        It is uniform within ± alpha / √(length · num_features) of each sequence (arXiv 2310.05914).
        """
        bounds_t = np.repeat(self.alpha / np.sqrt(np.array(self.lengths) * num_features), self.lengths)
        key = ("neftune", self.seed, self.step, self.slice_index)
        return uniform_rows(bounds_t, num_features, *key, device=device)


def with_noise(y_1TD: Tensor, places: list[tuple[slice, NoiseKey]]) -> Tensor:
    """Add the noise of each slice to its tokens. Other tokens keep their bits."""
    if not places:
        return y_1TD
    noisy_1TD = y_1TD.clone()
    for place, key in places:
        noisy_1TD[0, place] += key.noise_tD(y_1TD.shape[-1], y_1TD.device)
    return noisy_1TD


@dataclass(frozen=True, kw_only=True, slots=True)
class DropoutKey:
    """Key of the dropout mask of one slice. The module's name completes it."""

    probability: float
    seed: int
    step: int
    slice_index: int

    @property
    def threshold(self) -> int:
        return round((1 - self.probability) * 65536)

    def keep_TD(self, module: str, like_TD: Tensor) -> Tensor:
        """Return the mask, 1 for kept elements: uint8 shaped as `like_TD`."""
        return mask_like(like_TD, *self._key, module, threshold=self.threshold)

    def dropped(self, x_TD: Tensor, keep_TD: Tensor) -> Tensor:
        """Return x / (fraction kept) where `keep_TD` is 1 and 0 elsewhere, as torch.nn.Dropout does."""
        return x_TD * keep_TD.to(x_TD.dtype).mul_(self.keep_factor)

    @property
    def keep_factor(self) -> float:
        return 65536 / self.threshold

    def philox_keys(self, modules: Sequence[str]) -> NDArray[np.uint64]:
        """Return the key of each module's random numbers, uint64 [number, 2], for kernels that generate the mask."""
        return philox_keys(*self._key, endings=modules)

    @property
    def _key(self) -> tuple[int | str, ...]:
        """The parts that the keys of all modules share."""
        return ("dropout", self.seed, self.step, self.slice_index)


@dataclass(frozen=True, kw_only=True, slots=True)
class SliceInput:
    """One slice of one job: its sequences, which tokens are labels, and the weight of each label in the loss.

    For a pairwise objective the sequences alternate between chosen and rejected, and `label_weight` is the weight of a
    pair. The weights of labels follow from the loss. For KTO it is the weight of a sequence, whose entry in `labels`
    is 1 if it is desirable. A KTO slice without `reference_point` (nats) belongs to the pass that measures it.
    """

    adapter: FlatAdapter
    sequences: tuple[tuple[np.ndarray, np.ndarray], ...]  # (input_ids, loss_mask) each
    label_weight: float
    dropout: DropoutKey | None
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    labels: tuple[float, ...] = ()  # one per sequence, for classification and KTO
    reference_point: float | None = None
    token_types: tuple[np.ndarray | None, ...] = ()
    noise: NoiseKey | None = None
    is_by_row: bool = False
    """Compute LoRA row by row, so that the bits of a row don't depend on the number of rows (kernels/generation.py)."""
    reference: FlatAdapter | None = None
    """The reference model of the objective: no adapter on the base model, or the parent adapter."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Compared:
    """The answers of a segment whose loss depends on their log-probabilities (losses/preference.py).

    `weight` is that of a pair or a single answer in the loss. `num_labels` has one entry per sequence.
    `reference_start` is the index of the first of these labels in the reference pack.
    """

    objective: ObjectiveConfig
    weight: float
    num_labels: tuple[int, ...]
    reference_start: int
    labels: tuple[float, ...]
    reference_point: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Graded:
    """Sequences [first, last) of the pack belong to a segment. `weight` is that of a sequence or pair in the loss."""

    objective: ObjectiveConfig
    first: int
    last: int
    weight: float
    labels: tuple[float, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchSegment:
    """Rows [start, stop) and labels [label_start, label_stop) of the pack belong to one slice."""

    start: int
    stop: int
    adapter: FlatAdapter
    dropout: DropoutKey | None
    label_start: int
    label_stop: int
    compared: Compared | None
    graded: Graded
    noise: NoiseKey | None
    is_by_row: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedBatch:
    """Sequences of several slices as the input of one pass. T is the number of tokens, L of labels, S of sequences.

    Attributes:
        input_ids, position_ids: int64 [1, T]. Positions restart at 0 in each sequence.
        sequence_bounds_S: int32 [S + 1]: the start of each sequence, and the end of the last.
        label_positions_L: int64 [L]: the rows before the labels, from which they are predicted.
        label_weights_L: fp32 [L].
        label_smoothing_L: fp32 [L] (losses/chunked_cross_entropy.py), or None.
        host_ids_T: input_ids on the host, so that reading them does not wait for a device.
        newest_rows_n: int64 [n], in generation: the row of each sequence that has tokens in its KV cache.
        addresses_Cn4: int64 [C, n, 4] on a GPU in generation: the `addresses` of the KV caches of these sequences.
        reference: The sequences of jobs that need a reference model, with that model's adapters. It has a pass of
            its own, because nothing in it is differentiated.
    """

    input_ids: Tensor
    position_ids: Tensor
    sequence_lengths: tuple[int, ...]
    sequence_bounds_S: Tensor
    segments: tuple[BatchSegment, ...]
    label_positions_L: Tensor
    labels_L: Tensor
    label_weights_L: Tensor
    host_ids_T: np.ndarray[Any, Any]
    label_smoothing_L: Tensor | None = None
    reference: "PackedBatch | None" = None
    token_types: Tensor | None = None
    is_pooled: bool = False  # segments count sequences, not tokens
    is_checkpointed: bool = (
        False  # activation checkpointing: the backward recomputes each block (layers/activation_checkpointing.py)
    )
    plans: dict[int, Any] = field(default_factory=dict)  # of layers/tiled_lora.py, by the identity of `segments`
    caches: tuple[SequenceCache, ...] = ()  # in generation (forward/continuous_batch.py): the pack has only new tokens
    newest_rows_n: Tensor | None = None
    addresses_Cn4: Tensor | None = None

    @property
    def whole_lengths(self) -> tuple[int, ...]:
        """Number of tokens of each sequence, including those in the KV cache."""
        fillers = (0,) * (len(self.sequence_lengths) - len(self.caches))
        before = (*(cache.num_tokens for cache in self.caches), *fillers)
        return tuple(old + new for old, new in zip(before, self.sequence_lengths, strict=True))


def build_pack(slices: Sequence[SliceInput], *, device: str) -> PackedBatch:
    """Concatenate the slices in order, and pad to a multiple of 16 tokens."""
    compared = [
        replace(part, adapter=part.reference, dropout=None, noise=None) for part in slices if part.reference is not None
    ]
    reference = _concatenated(compared, _segments(compared), device=device) if compared else None
    return replace(_concatenated(slices, _segments(slices), device=device), reference=reference)


def _concatenated(slices: Sequence[SliceInput], segments: tuple[BatchSegment, ...], *, device: str) -> PackedBatch:
    sequences = [sequence for part in slices for sequence in part.sequences]
    lengths = [len(ids) for ids, _ in sequences]
    filler = -sum(lengths) % ROW_MULTIPLE
    lengths += [filler] if filler else []
    ids = np.concatenate([*(ids for ids, _ in sequences), np.zeros(filler, np.int32)])
    mask = np.concatenate([*(mask for _, mask in sequences), np.zeros(filler, np.uint8)])
    label_rows = np.flatnonzero(mask)
    weights = [np.full(sum(_num_labels(part)), part.label_weight, np.float32) for part in slices]
    arrays = {
        "input_ids": ids.astype(np.int64)[None],
        "position_ids": np.concatenate([np.arange(length) for length in lengths])[None],
        "sequence_bounds_S": np.array([0, *accumulate(lengths)], np.int32),
        "label_positions_L": label_rows - 1,
        "labels_L": ids[label_rows].astype(np.int64),
        "label_weights_L": np.concatenate(weights),
        "label_smoothing_L": _label_smoothing(slices),
        "token_types": _token_types(slices, filler),
    }
    present = {name: array for name, array in arrays.items() if array is not None}
    tensors: dict[str, Any] = dict(zip(present, upload(list(present.values()), device), strict=True))
    return PackedBatch(sequence_lengths=tuple(lengths), segments=segments, host_ids_T=ids, **tensors)


def _token_types(slices: Sequence[SliceInput], filler: int) -> np.ndarray[Any, Any] | None:
    """Return int64 [1, T], with 0 for jobs without token types. None if no job has any."""
    if not any(types is not None for part in slices for types in part.token_types):
        return None
    parts: list[np.ndarray] = []
    for part in slices:
        given = part.token_types or (None,) * len(part.sequences)
        sequences = zip(part.sequences, given, strict=True)
        parts += [np.zeros(len(ids), np.uint8) if types is None else types for (ids, _), types in sequences]
    return np.concatenate([*parts, np.zeros(filler, np.uint8)]).astype(np.int64)[None]


def _label_smoothing(slices: Sequence[SliceInput]) -> np.ndarray[Any, Any] | None:
    """Return fp32 [L], or None if no job uses label smoothing."""
    if not any(part.objective.token_smoothing for part in slices):
        return None
    parts = [np.full(sum(_num_labels(part)), part.objective.token_smoothing, np.float32) for part in slices]
    return np.concatenate(parts)


def _segments(slices: Sequence[SliceInput]) -> tuple[BatchSegment, ...]:
    segments: list[BatchSegment] = []
    start = label_start = reference_start = first = 0
    for part in slices:
        num_labels = _num_labels(part)
        stop = start + sum(len(ids) for ids, _ in part.sequences)
        label_stop = label_start + sum(num_labels)
        segments.append(
            BatchSegment(
                start=start,
                stop=stop,
                adapter=part.adapter,
                dropout=part.dropout,
                label_start=label_start,
                label_stop=label_stop,
                compared=_compared(part, num_labels, reference_start),
                graded=Graded(
                    objective=part.objective,
                    first=first,
                    last=first + len(part.sequences),
                    weight=part.label_weight,
                    labels=part.labels,
                ),
                noise=part.noise,
                is_by_row=part.is_by_row,
            )
        )
        first += len(part.sequences)
        start, label_start = stop, label_stop
        reference_start += 0 if part.reference is None else sum(num_labels)
    return tuple(segments)


def _compared(part: SliceInput, num_labels: tuple[int, ...], reference_start: int) -> Compared | None:
    if not part.objective.is_preference or part.objective.grades_sequences:
        return None
    return Compared(
        objective=part.objective,
        weight=part.label_weight,
        num_labels=num_labels,
        reference_start=reference_start,
        labels=part.labels,
        reference_point=part.reference_point,
    )


def _num_labels(part: SliceInput) -> tuple[int, ...]:
    """Return the number of labels of each sequence."""
    return tuple(int(mask.sum()) for _, mask in part.sequences)


_current: ContextVar[tuple[PackedBatch, Kernels] | None] = ContextVar("lora_core_pack", default=None)
_ahead: ContextVar[dict[str, tuple[Tensor, Tensor]]] = ContextVar("lora_core_ahead")


def current_pack() -> PackedBatch | None:
    """Return the pack of the running forward pass, which patched linears and attention read. None outside a pass."""
    current = _current.get()
    return None if current is None else current[0]


def current_kernels() -> Kernels:
    """Return the kernels of the running forward pass. Outside a pass, those of a CPU."""
    current = _current.get()
    return Kernels() if current is None else current[1]


def num_used_rows() -> int | None:
    """Return the number of rows of the running forward pass before the padding, or None if it isn't known."""
    pack = current_pack()
    return pack.segments[-1].stop if pack is not None and pack.segments else None


def computed_ahead() -> dict[str, tuple[Tensor, Tensor]]:
    """Return (input, output) of linears that a fused matmul of this pass has computed already, by module path."""
    return _ahead.get()


@contextmanager
def running(pack: PackedBatch, kernels: Kernels) -> Iterator[None]:
    token, ahead = _current.set((pack, kernels)), _ahead.set({})
    try:
        yield
    finally:
        _current.reset(token)
        _ahead.reset(ahead)
