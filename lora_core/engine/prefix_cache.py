# pyright: basic
"""Caches the activations below a job's lowest adapter, computed once per sequence by frozen layers.

They depend on the frozen base model and the sequence alone, so any job that reads the sequence again can enter at that
block. The cache does not change results (docs/internals/engine.md). Shape suffixes: T tokens of the pack, S of a
sequence, D features.
"""

import contextlib
import hashlib
import math
import shutil
import tempfile
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from lora_core.adapter.flat_adapter import FlatAdapter
from lora_core.base_model.model import BaseModel
from lora_core.config import LoraConfig
from lora_core.engine.job import TrainingJob
from lora_core.engine_config import EngineConfig
from lora_core.errors import ANY_FAILURE
from lora_core.forward.language_model import hidden_states
from lora_core.packing.packed_batch import BlockRange, EntryBlock, PackedBatch, SliceInput, bare_pack
from lora_core.runtime.counter_rng import random_words
from lora_core.runtime.device_errors import interrupts_wait, is_device_fault, shortage_named

LEAST_SHARE = 0.25
"""Minimum fraction of blocks in a prefix. A shorter one isn't worth a pass apart from jobs that adapt all blocks."""
PROBE_LENGTHS = (19, 9, 5)


Key = bytes
NO_OWNER = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class PrefixCounts:
    """Tokens computed through a prefix, tokens that skipped it thanks to the cache, bytes cached, and damaged files."""

    computed_tokens: int
    reused_tokens: int
    memory_bytes: int
    disk_bytes: int
    damaged_files: int


class Prefixes:
    """The prefix cache of one engine. Without a budget every job enters at the embeddings."""

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

    def entry_block(self, adapter: FlatAdapter) -> int:
        """Return the lowest block that the job adapts. 0 if the model can't be entered there or it isn't worth it."""
        if not self._is_on or adapter.trained.token_ids:
            return 0
        block = min((self._blocks.number_of(name) for name in adapter.sites), default=0)
        if block < LEAST_SHARE * len(self._blocks.modules) or block == 0:
            return 0
        if block not in self._enterable:
            self._enterable[block] = self._can_enter(block)
        return block if self._enterable[block] else 0

    def cost(self, part: SliceInput, num_tokens: int) -> int:
        """Return the number of tokens through the whole base model that take as long as this slice of `num_tokens`."""
        if part.entry is None or not all(key in self._store for key in _keys(part)):
            return num_tokens
        depth = len(self._blocks.modules)
        return math.ceil(num_tokens * (depth - part.entry.block) / depth)

    def entered(self, pack: PackedBatch, parts: Sequence[SliceInput]) -> PackedBatch:
        """Return `pack`, built of these parts, with the cached input of the one block at which all of them enter."""
        entry = parts[0].entry
        if entry is None:
            return pack
        states = self._states(entry.block, parts)
        compared = [found for part, found in zip(parts, states, strict=True) if part.objective.needs_reference]
        reference = pack.reference
        if reference is not None:
            reference = replace(reference, passage=_block_range(entry.block, compared, reference))
        return replace(pack, passage=_block_range(entry.block, states, pack), reference=reference)

    def disown(self, job: str) -> None:
        self._store.disown(job)

    def counts(self) -> PrefixCounts:
        return PrefixCounts(
            computed_tokens=self._computed_tokens,
            reused_tokens=self._reused_tokens,
            memory_bytes=self._store.memory_bytes,
            disk_bytes=self._store.disk_bytes,
            damaged_files=self._store.num_damaged,
        )

    def _states(self, block: int, parts: Sequence[SliceInput]) -> list[list[Tensor]]:
        """Return the states [S, D] of each sequence of each part, from the cache or computed in one pass."""
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
                ):  # not cached then: the tick itself still fits
                    self._store.keep(key, found[key], part.entry.job)
        with self._lock:
            self._reused_tokens += num_reused
            self._computed_tokens += sum(map(len, found.values())) - num_reused
        return [[found[key] for key in own] for own in keys]

    @torch.no_grad()
    def _computed(self, block: int, sequences: Sequence[SliceInput]) -> Sequence[Tensor]:
        passage = BlockRange(last=block)
        pack = replace(bare_pack(sequences, device=self._base.device), passage=passage)
        hidden_states(self._base, pack)
        assert passage.left_TD is not None
        return passage.left_TD.split(list(pack.sequence_lengths))[: len(sequences)]

    @torch.no_grad()
    def _can_enter(self, block: int) -> bool:
        """Return whether sequences that enter at this block give the same hidden states as through all blocks.

        Raises torch.OutOfMemoryError, which does not decide the question for this block.
        """
        whole = _probe_slice(self._base)
        pack = bare_pack([whole], device=self._base.device)
        expected_TD = hidden_states(self._base, pack)
        sequences = [_alone(whole, index) for index in range(len(PROBE_LENGTHS))]
        try:
            with shortage_named():
                states = [self._computed(block, [sequence])[0] for sequence in sequences]
                got_TD = hidden_states(self._base, replace(pack, passage=_block_range(block, [states], pack)))
        except torch.OutOfMemoryError:
            raise
        except ANY_FAILURE as error:
            if is_device_fault(error):
                raise
            return False  # the blocks of this family pass more than hidden states to each other
        count = sum(PROBE_LENGTHS)
        if self._invariance == "bitwise":
            return torch.equal(got_TD[:count], expected_TD[:count])
        largest = float(expected_TD[:count].abs().max())
        return float((got_TD[:count] - expected_TD[:count]).abs().max()) <= 0.05 * largest


def slices_of(job: TrainingJob, offsets: Iterable[int]) -> list[SliceInput]:
    """Return slices of a job by their offset from the next one, with their entry block."""
    return [replace(part, entry=entry_of(job)) for part in job.next_slices(offsets)]


def entry_of(job: TrainingJob) -> EntryBlock | None:
    """Return the entry block of the job's current unit.

    None if training adds noise to the embeddings or no sequence would be processed twice. The last epoch and KTO's
    mismatched answers are not cached.
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
    return EntryBlock(block=job.entry_block, job=job.name, keeps=keeps)


def by_entry(lane: Sequence[int], slices: Sequence[SliceInput]) -> list[tuple[list[int], list[SliceInput]]]:
    """Group the indices of a lane, and their slices, by entry block. The order within a group is kept."""
    groups: dict[int, list[int]] = {}
    for index in lane:
        entry = slices[index].entry
        groups.setdefault(0 if entry is None else entry.block, []).append(index)
    return [(group, [slices[index] for index in group]) for group in groups.values()]


def _keys(part: SliceInput) -> list[Key]:
    """Return the cache keys: sha256 of block, tokens and token types of each sequence. The base model is implied."""
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
    """Return one sequence of a slice as a slice."""
    types = part.token_types[index : index + 1]
    return replace(part, sequences=part.sequences[index : index + 1], token_types=types, labels=())


def _block_range(block: int, states: Sequence[Sequence[Tensor]], pack: PackedBatch) -> BlockRange:
    """Return the input at `block`: the states of all sequences, then zeros for the padding sequence."""
    found = [state_SD for part in states for state_SD in part]
    num_filler = pack.input_ids.shape[1] - sum(map(len, found))
    return BlockRange(first=block, entering_TD=torch.cat([*found, found[0].new_zeros(num_filler, found[0].shape[1])]))


def _probe_slice(base: BaseModel) -> SliceInput:
    sequences = []
    for length in PROBE_LENGTHS:
        words = random_words("entrance", length, count=length)
        mask = np.zeros(length, np.uint8)
        sequences.append(((words % np.uint64(base.vocab_size)).astype(np.int32), mask))
    adapter = FlatAdapter((), LoraConfig(rank=1, alpha=1), dtype=base.dtype, device=base.device)
    return SliceInput(adapter=adapter, sequences=tuple(sequences), label_weight=0.0, dropout=None)


class CacheBudget:
    """Cached entries by the job that used each last. The entries of a job are in least recently used order."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._owner_of: dict[Key, str] = {}
        self._entries: dict[str, OrderedDict[Key, int]] = {}
        self._bytes: dict[str, int] = {}

    def __contains__(self, key: Key) -> bool:
        return key in self._owner_of

    def __len__(self) -> int:
        return len(self._owner_of)

    @property
    def num_bytes(self) -> int:
        return sum(self._bytes.values())

    def use(self, key: Key, job: str) -> None:
        """Make `job` the owner of the entry, and the entry its most recently used one."""
        self._insert(key, self.remove(key), job)

    def place(self, key: Key, num_bytes: int, job: str) -> dict[Key, str] | None:
        """Add a new entry. Return the evicted entries with their owners, or None if the entry was not accepted.

        If it is not accepted, nothing is evicted.
        """
        victims = self._victims(num_bytes, job)
        if victims is None:
            return None
        owners = {victim: self._owner_of[victim] for victim in victims}
        for victim in victims:
            self.remove(victim)
        self._insert(key, num_bytes, job)
        return owners

    def remove(self, key: Key) -> int:
        """Remove an entry. Return its bytes."""
        owner = self._owner_of.pop(key)
        num_bytes = self._entries[owner].pop(key)
        self._bytes[owner] -= num_bytes
        return num_bytes

    def disown(self, job: str) -> None:
        """Disown the entries of `job`. They stay for other jobs with the same sequences until space is needed."""
        for key, _ in list(self._of(job)):
            self.use(key, NO_OWNER)
        self._entries.pop(job, None)
        self._bytes.pop(job, None)

    def _insert(self, key: Key, num_bytes: int, job: str) -> None:
        self._owner_of[key] = job
        self._entries.setdefault(job, OrderedDict())[key] = num_bytes
        self._bytes[job] = self._bytes.get(job, 0) + num_bytes

    def _victims(self, num_bytes: int, job: str) -> list[Key] | None:
        wanted = self.num_bytes + num_bytes - self.max_bytes
        victims: list[Key] = []
        for key, size in self._of(NO_OWNER):
            if wanted <= 0:
                break
            victims.append(key)
            wanted -= size
        others = [owner for owner in self._bytes if owner not in (job, NO_OWNER)]
        largest_owner = max(others, key=lambda owner: self._bytes[owner], default=NO_OWNER)
        excess = self._bytes.get(largest_owner, 0) - self._bytes.get(job, 0) - num_bytes
        for key, size in self._of(largest_owner):
            if wanted <= 0 or largest_owner == NO_OWNER or size > excess:
                break
            victims.append(key)
            wanted -= size
            excess -= size
        return victims if wanted <= 0 else None

    def _of(self, job: str) -> Iterable[tuple[Key, int]]:
        return self._entries[job].items() if job in self._entries else ()


LEAST_FREE_BYTES = 2**30
"""Minimum free space on the disk, which checkpoints need."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Spilled:
    """A file that contains the raw bytes of one tensor."""

    path: Path
    digest: bytes
    dtype: torch.dtype
    shape: tuple[int, ...]


class PrefixStore:
    """Thread-safe store of states [S, D] by key, in host memory and on disk. `num_damaged` counts damaged files."""

    def __init__(self, *, memory_bytes: int, disk_bytes: int, folder: Path | None) -> None:
        """Create a store whose files are in a new folder inside `folder`, which is deleted with the store."""
        self.num_damaged = 0
        self._lock = threading.Lock()
        self._memory, self._disk = CacheBudget(memory_bytes), CacheBudget(disk_bytes if folder else 0)
        self._tensors: dict[Key, Tensor] = {}
        self._files: dict[Key, Spilled] = {}
        self._folder: Path | None = None
        if folder is not None and disk_bytes:
            self._folder = Path(tempfile.mkdtemp(prefix="prefix-", dir=folder))
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)

    def __contains__(self, key: Key) -> bool:
        with self._lock:
            return key in self._memory or key in self._disk

    @property
    def memory_bytes(self) -> int:
        return self._memory.num_bytes

    @property
    def disk_bytes(self) -> int:
        return self._disk.num_bytes

    def take(self, key: Key, job: str) -> Tensor | None:
        """Return the states, which must not be modified, or None if they are not or no longer cached."""
        with interrupts_wait(), self._lock:
            if key in self._memory:
                self._memory.use(key, job)
                return self._tensors[key]
            if key not in self._disk:
                return None
            states_SD = _read(self._files[key])
            if states_SD is None:
                self.num_damaged += 1
                self._forget_file(key)
            else:
                self._disk.use(key, job)
            return states_SD

    def keep(self, key: Key, states_SD: Tensor, job: str) -> None:
        """Store a copy of the states in memory if there is space or some can be freed, else on disk, else not at all.

        An error, such as out of memory, may lose entries but never leaves an entry without its states.
        """
        with interrupts_wait(), self._lock:
            if key in self._memory or key in self._disk:
                return
            owners = self._memory.place(key, states_SD.nbytes, job)
            if owners is None:
                self._spill(key, states_SD, job)
                return
            victims = [(victim, self._tensors.pop(victim), owner) for victim, owner in owners.items()]
            try:
                self._tensors[key] = states_SD.detach().to("cpu", copy=True)
            except BaseException:
                self._memory.remove(key)
                raise
            for victim, victim_SD, owner in victims:
                self._spill(victim, victim_SD, owner)

    def disown(self, job: str) -> None:
        with interrupts_wait(), self._lock:
            self._memory.disown(job)
            self._disk.disown(job)

    def _spill(self, key: Key, states_SD: Tensor, job: str) -> None:
        """Write the states to disk. An entry is valid once its file is complete. A failing disk stores nothing."""
        if self._folder is None or (victims := self._disk.place(key, states_SD.nbytes, job)) is None:
            return
        for victim in victims:
            self._unlink(victim)
        try:
            if shutil.disk_usage(self._folder).free < LEAST_FREE_BYTES:
                raise OSError("The disk is nearly full.")
            self._files[key] = _written(self._folder / key.hex(), states_SD)
        except OSError:
            self._forget_file(key)
        except BaseException:
            self._forget_file(key)
            raise

    def _forget_file(self, key: Key) -> None:
        self._disk.remove(key)
        self._unlink(key)

    def _unlink(self, key: Key) -> None:
        self._files.pop(key, None)
        if self._folder is not None:
            with contextlib.suppress(OSError):
                (self._folder / key.hex()).unlink()


def _written(path: Path, states_SD: Tensor) -> Spilled:
    content = states_SD.detach().cpu().contiguous().view(torch.uint8).numpy()
    digest = hashlib.sha256(content.data).digest()
    content.tofile(path)
    return Spilled(path=path, digest=digest, dtype=states_SD.dtype, shape=tuple(states_SD.shape))


def _read(spilled: Spilled) -> Tensor | None:
    """Return None if the content of the file is not what was written."""
    try:
        content = np.fromfile(spilled.path, np.uint8)
    except OSError:
        return None
    if hashlib.sha256(content.data).digest() != spilled.digest:
        return None
    return torch.from_numpy(content).view(spilled.dtype).view(spilled.shape)
