"""Counts the rows of a validation file that are also in the training file, with the same tokens after truncation.

Runs as a child process, `python -m worker.children.data_overlap ARGUMENTS.json`, without torch. It uses eight bytes of
memory for each row.
"""

from __future__ import annotations

import json
import sys
from hashlib import blake2b
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from worker.protocol.mailbox import read_json, write_json

Number = TypeVar("Number", np.int32, np.int64)


def count(train: Path, valid: Path, *, in_pairs: bool) -> tuple[int, int]:
    """Return (rows of `valid` that are also in `train`, rows of `valid`). The files have the format of
    worker.children.tokenizer.token_file.

    in_pairs: two consecutive rows are one row of a preference file.
    """
    held_out = _digests(valid, in_pairs=in_pairs)
    return int(np.isin(held_out, _digests(train, in_pairs=in_pairs)).sum()), len(held_out)


def _digests(path: Path, *, in_pairs: bool) -> NDArray[np.uint64]:
    """Return a digest of each row's tokens. A collision among a million rows occurs in one of 40 million files."""
    ids, offsets = _read(path)
    step = 2 if in_pairs else 1
    digests = np.empty((len(offsets) - 1) // step, dtype=np.uint64)
    for place in range(len(digests)):
        bounds = offsets[place * step : (place + 1) * step + 1]
        row = blake2b(ids[bounds[0] : bounds[-1]].tobytes(), digest_size=8)
        row.update(str(bounds[1] - bounds[0]).encode())  # where the first of a pair ends
        digests[place] = int.from_bytes(row.digest(), "little")
    return digests


def _read(path: Path) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Return (ids [N], offsets [rows + 1]). They are memory-mapped."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    start = 8 + length
    return _tensor(path, header["input_ids"], start, np.int32), _tensor(path, header["row_offsets"], start, np.int64)


def _tensor(path: Path, entry: Any, start: int, dtype: type[Number]) -> NDArray[Number]:
    """Map a tensor that worker.children.tokenizer.token_file wrote in little-endian order, which is the byte order of
    every machine that trains."""
    return np.memmap(path, dtype=dtype, mode="r", offset=start + entry["data_offsets"][0], shape=tuple(entry["shape"]))


def main(arguments_path: Path) -> int:
    """Read {train, valid, in_pairs, result} from a file, and write the result file."""
    arguments = read_json(arguments_path)
    num_rows, of_rows = count(Path(arguments["train"]), Path(arguments["valid"]), in_pairs=bool(arguments["in_pairs"]))
    write_json(Path(arguments["result"]), {"rows": num_rows, "of_rows": of_rows})
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
