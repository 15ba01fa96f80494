"""Writes the safetensors file of tokenised rows, row by row: memory holds no more than the row offsets.

input_ids int32 [N], loss_mask uint8 [N], row_offsets int64 [rows + 1], and where rows have labels fp32 [rows]; what
lora_core.data.token_dataset reads.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from array import array
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO

import numpy as np
from numpy.typing import NDArray

COPY_BYTES = 2**20


class TokenFile:
    """A context manager. `finish` makes the file appear, whole; leaving without it leaves nothing."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offsets = array("q", [0])
        self._labels = array("f")
        self.num_supervised = 0

    def __enter__(self) -> TokenFile:
        self._ids: IO[bytes] = tempfile.TemporaryFile(dir=self._path.parent)
        self._mask: IO[bytes] = tempfile.TemporaryFile(dir=self._path.parent)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ids.close()
        self._mask.close()

    @property
    def num_rows(self) -> int:
        return len(self._offsets) - 1

    @property
    def num_tokens(self) -> int:
        return self._offsets[-1]

    def add_row(self, ids: NDArray[np.int32], mask: NDArray[np.uint8], label: float | None = None) -> None:
        """One row: ids int32 [T], mask uint8 [T]. All rows have a label, or none."""
        if label is not None:
            self._labels.append(label)
        self._ids.write(_little(ids).tobytes())
        self._mask.write(mask.tobytes())
        self._offsets.append(self._offsets[-1] + len(ids))
        self.num_supervised += int(mask.sum())

    def finish(self) -> None:
        """Write header and tensors beside the path, then rename."""
        assert len(self._labels) in (0, self.num_rows)
        offsets = _little(np.array(self._offsets, dtype=np.int64)).tobytes()
        labels = _little(np.array(self._labels, dtype=np.float32)).tobytes()
        temporary = self._path.with_name(f".{self._path.name}.{os.getpid()}.tmp")
        try:
            with temporary.open("wb") as out:
                out.write(_header(self.num_rows, self.num_tokens, has_labels=bool(labels)))
                out.write(offsets)
                out.write(labels)
                for part in (self._ids, self._mask):
                    part.seek(0)
                    shutil.copyfileobj(part, out, COPY_BYTES)
                out.flush()
                os.fsync(out.fileno())
            temporary.replace(self._path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def _header(num_rows: int, num_tokens: int, *, has_labels: bool) -> bytes:
    """As the safetensors library writes it: widest type first, padded to 8 bytes."""
    tensors: list[tuple[str, str, int, int]] = [
        ("row_offsets", "I64", num_rows + 1, 8),
        *([("labels", "F32", num_rows, 4)] if has_labels else []),
        ("input_ids", "I32", num_tokens, 4),
        ("loss_mask", "U8", num_tokens, 1),
    ]
    entries: dict[str, dict[str, str | Sequence[int]]] = {}
    start = 0
    for name, dtype, length, width in tensors:
        stop = start + length * width
        entries[name] = {"dtype": dtype, "shape": [length], "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _little(values: NDArray[np.generic]) -> NDArray[np.generic]:
    return values.byteswap() if sys.byteorder == "big" else values
