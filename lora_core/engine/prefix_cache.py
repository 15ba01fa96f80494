# pyright: basic
"""Frozen prefixes: what the blocks below a job's lowest adapter give for a sequence is computed once, and kept.

It is a function of the frozen base and the sequence alone, so whoever reads the sequence again at that block enters
there. Nobody can tell from a result (docs/ENGINE.md). Letters: T tokens of the pack, S of a sequence, D features.
"""

import hashlib
import math
import threading
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from lora_core.adapter.flat_adapter import AdapterRow
from lora_core.base_model.model import BaseModel
from lora_core.config import LoraConfig
from lora_core.engine.job import Job
from lora_core.engine.prefix_store import PrefixStore
from lora_core.engine.shelf import Key
from lora_core.engine_config import EngineConfig
from lora_core.errors import ANY_FAILURE
from lora_core.forward.language_model import hidden_states
from lora_core.packing.block_range import Entry, Passage
from lora_core.packing.packed_batch import Pack, SliceInput, bare_pack
from lora_core.runtime.counter_rng import random_words
from lora_core.runtime.device_errors import shortage_named
from lora_core.runtime.device_faults import is_device_fault

LEAST_SHARE = 0.25
"""Of the blocks, below which a prefix isn't worth a pass apart from jobs that adapt all."""
PROBE_LENGTHS = (19, 9, 5)


@dataclass(frozen=True, kw_only=True, slots=True)
class PrefixCounts:
    """Tokens that went through a prefix, and tokens that entered above one that had gone through before; bytes kept
    now; files that a disk had damaged."""

    computed_tokens: int
    reused_tokens: int
    memory_bytes: int
    disk_bytes: int
    damaged_files: int


class Prefixes:
    """Of one engine. Without a budget no job enters anywhere but at the embeddings."""

    def __init__(self, base: BaseModel, config: EngineConfig, *, invariance: Literal["bitwise", "allclose"]) -> None:
        assert base.attachment is not None
        self._base = base
        self._blocks = base.attachment.blocks
        self._invariance = invariance
        self._is_on = bool(config.prefix_memory_bytes or config.prefix_disk_bytes)
        self._store = PrefixStore(
            memory_bytes=config.prefix_memory_bytes,
            disk_bytes=config.prefix_disk_bytes,
            folder=config.prefix_folder,
        )
        self._enterable: dict[int, bool] = {}
        self._lock = threading.Lock()
        self._computed_tokens = self._reused_tokens = 0

    def entry_block(self, row: AdapterRow) -> int:
        """The lowest block that the job adapts; 0 where the base can't be entered there, or it isn't worth it."""
        if not self._is_on or row.trained.token_ids:
            return 0
        block = min((self._blocks.number_of(name) for name in row.sites), default=0)
        if block < LEAST_SHARE * len(self._blocks.modules) or block == 0:
            return 0
        if block not in self._enterable:
            self._enterable[block] = self._can_enter(block)
        return block if self._enterable[block] else 0

    def cost(self, part: SliceInput, num_tokens: int) -> int:
        """Tokens through the whole base that take about as long as this slice, whose passes take `num_tokens`."""
        if part.entry is None or not all(key in self._store for key in _keys(part)):
            return num_tokens
        depth = len(self._blocks.modules)
        return math.ceil(num_tokens * (depth - part.entry.block) / depth)

    def entered(self, pack: Pack, parts: Sequence[SliceInput]) -> Pack:
        """`pack`, built of these parts, which all enter at one block: there, with what enters it."""
        entry = parts[0].entry
        if entry is None:
            return pack
        states = self._states(entry.block, parts)
        compared = [found for part, found in zip(parts, states, strict=True) if part.objective.needs_reference]
        reference = pack.reference
        if reference is not None:
            reference = replace(reference, passage=_entering(entry.block, compared, reference))
        return replace(pack, passage=_entering(entry.block, states, pack), reference=reference)

    def leave(self, job: str) -> None:
        self._store.leave(job)

    def counts(self) -> PrefixCounts:
        return PrefixCounts(
            computed_tokens=self._computed_tokens,
            reused_tokens=self._reused_tokens,
            memory_bytes=self._store.memory_bytes,
            disk_bytes=self._store.disk_bytes,
            damaged_files=self._store.num_damaged,
        )

    def _states(self, block: int, parts: Sequence[SliceInput]) -> list[list[Tensor]]:
        """[S, D] of each sequence of each part: what was kept, and the rest computed in one pass."""
        keys = [_keys(part) for part in parts]
        found: dict[Key, Tensor] = {}
        missing: dict[Key, SliceInput] = {}
        for part, own in zip(parts, keys, strict=True):
            assert part.entry is not None
            for index, key in enumerate(own):
                if key in found or key in missing:
                    continue
                kept_SD = self._store.take(key, part.entry.job)
                if kept_SD is None:
                    missing[key] = _alone(part, index)
                else:
                    found[key] = kept_SD.to(self._base.device)
        num_reused = sum(map(len, found.values()))
        if missing:
            found |= zip(missing, self._computed(block, list(missing.values())), strict=True)
        for key, part in missing.items():
            if part.entry is not None and part.entry.keeps:
                with (
                    suppress(torch.OutOfMemoryError),
                    shortage_named(),
                ):  # computed again, then: the tick itself has room
                    self._store.keep(key, found[key], part.entry.job)
        with self._lock:
            self._reused_tokens += num_reused
            self._computed_tokens += sum(map(len, found.values())) - num_reused
        return [[found[key] for key in own] for own in keys]

    @torch.no_grad()
    def _computed(self, block: int, sequences: Sequence[SliceInput]) -> Sequence[Tensor]:
        passage = Passage(last=block)
        pack = replace(bare_pack(sequences, device=self._base.device), passage=passage)
        hidden_states(self._base, pack)
        assert passage.left_TD is not None
        return passage.left_TD.split(list(pack.sequence_lengths))[: len(sequences)]

    @torch.no_grad()
    def _can_enter(self, block: int) -> bool:
        """Whether sequences that enter this block, computed each by itself, end as those that went all the way. Raises
        torch.OutOfMemoryError, from which nothing follows for the block."""
        whole = _probe_slice(self._base)
        pack = bare_pack([whole], device=self._base.device)
        expected_TD = hidden_states(self._base, pack)
        sequences = [_alone(whole, index) for index in range(len(PROBE_LENGTHS))]
        try:
            with shortage_named():
                states = [self._computed(block, [sequence])[0] for sequence in sequences]
                got_TD = hidden_states(self._base, replace(pack, passage=_entering(block, [states], pack)))
        except torch.OutOfMemoryError:
            raise
        except ANY_FAILURE as error:
            if is_device_fault(error):
                raise
            return False  # a family whose blocks give each other more than hidden states
        count = sum(PROBE_LENGTHS)
        if self._invariance == "bitwise":
            return torch.equal(got_TD[:count], expected_TD[:count])
        largest = float(expected_TD[:count].abs().max())
        return float((got_TD[:count] - expected_TD[:count]).abs().max()) <= 0.05 * largest


def slices_of(job: Job, offsets: Iterable[int]) -> list[SliceInput]:
    """Of a job, counted from the one that comes next, and where they enter."""
    return [replace(part, entry=entry_of(job)) for part in job.next_slices(offsets)]


def entry_of(job: Job) -> Entry | None:
    """Of the slices of its unit. None where training adds noise below any block, or nothing would be passed twice.

    The last epoch keeps nothing, nor does a pass that puts answers to others' prompts.
    """
    config, unit = job.config, job.unit
    if unit is None or not job.entry_block or (unit.kind == "train" and config.neftune_alpha):
        return None
    last_epoch = (config.num_steps * config.batch_size - 1) // job.num_examples
    keeps = job.step * config.batch_size // job.num_examples < last_epoch
    if unit.kind == "evaluate":
        keeps = job.step < config.num_steps and not unit.measures_point
    elif not last_epoch and not config.objective.needs_reference:
        return None
    return Entry(block=job.entry_block, job=job.name, keeps=keeps)


def by_entry(lane: Sequence[int], slices: Sequence[SliceInput]) -> list[tuple[list[int], list[SliceInput]]]:
    """The indices of a lane in their order, and their slices, by the block at which these enter."""
    groups: dict[int, list[int]] = {}
    for index in lane:
        entry = slices[index].entry
        groups.setdefault(0 if entry is None else entry.block, []).append(index)
    return [(group, [slices[index] for index in group]) for group in groups.values()]


def _keys(part: SliceInput) -> list[Key]:
    """sha256 of all that a sequence's states depend on, beside the base: block, tokens and their types."""
    assert part.entry is not None
    types = part.token_types or (None,) * len(part.sequences)
    return [
        hashlib.sha256(
            b"%d %d %d|" % (part.entry.block, len(ids), own is not None)
            + np.ascontiguousarray(ids, np.int32).tobytes()
            + (b"" if own is None else np.ascontiguousarray(own, np.uint8).tobytes())
        ).digest()
        for (ids, _), own in zip(part.sequences, types, strict=True)
    ]


def _alone(part: SliceInput, index: int) -> SliceInput:
    """One sequence of a slice."""
    types = part.token_types[index : index + 1]
    return replace(part, sequences=part.sequences[index : index + 1], token_types=types, labels=())


def _entering(block: int, states: Sequence[Sequence[Tensor]], pack: Pack) -> Passage:
    """Behind the sequences comes the filler, which is nobody's: zeros."""
    found = [state_SD for part in states for state_SD in part]
    num_filler = pack.input_ids.shape[1] - sum(map(len, found))
    return Passage(first=block, entering_TD=torch.cat([*found, found[0].new_zeros(num_filler, found[0].shape[1])]))


def _probe_slice(base: BaseModel) -> SliceInput:
    sequences = []
    for length in PROBE_LENGTHS:
        words = random_words("entrance", length, count=length)
        mask = np.zeros(length, np.uint8)
        sequences.append(((words % np.uint64(base.vocab_size)).astype(np.int32), mask))
    row = AdapterRow((), LoraConfig(rank=1, alpha=1), dtype=base.dtype, device=base.device)
    return SliceInput(row=row, sequences=tuple(sequences), label_weight=0.0, dropout=None)
