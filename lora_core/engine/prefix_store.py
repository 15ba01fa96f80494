# pyright: basic
"""Where hidden states are kept between ticks: in memory, then on disk, each within a budget of bytes.

Lanes ask at the same time; one lock serves all. What a disk does to a file can cost time, never a bit: a file whose
bytes aren't those that were written is forgotten, and its states are computed again. Letters: S tokens, D features.
"""

import contextlib
import hashlib
import shutil
import tempfile
import threading
import weakref
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lora_core.engine.shelf import Key, Shelf
from lora_core.runtime.interrupts import interrupts_wait

LEAST_FREE_BYTES = 2**30
"""What is left free on the disk: checkpoints need it more."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Spilled:
    """One file, which holds the numbers and nothing else."""

    path: Path
    digest: bytes
    dtype: torch.dtype
    shape: tuple[int, ...]


class PrefixStore:
    """States [S, D] by key, on the host. `num_damaged` counts files that weren't what had been written."""

    def __init__(self, *, memory_bytes: int, disk_bytes: int, folder: Path | None) -> None:
        """`folder`: where a folder of this store's own is made, which goes with the store."""
        self.num_damaged = 0
        self._lock = threading.Lock()
        self._memory, self._disk = Shelf(memory_bytes), Shelf(disk_bytes if folder else 0)
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
        """What was kept, not to be written to; None where nothing is, or no longer."""
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
        """A copy of the states, in memory where there is room or some is made, else on disk, else nowhere. What is
        raised on the way (memory is short) costs entries, and leaves none without its states."""
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

    def leave(self, job: str) -> None:
        with interrupts_wait(), self._lock:
            self._memory.leave(job)
            self._disk.leave(job)

    def _spill(self, key: Key, states_SD: Tensor, job: str) -> None:
        """The entry is known once the file is whole; a disk that is full or fails keeps nothing."""
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
    """None where the file isn't what was written."""
    try:
        content = np.fromfile(spilled.path, np.uint8)
    except OSError:
        return None
    if hashlib.sha256(content.data).digest() != spilled.digest:
        return None
    return torch.from_numpy(content).view(spilled.dtype).view(spilled.shape)
