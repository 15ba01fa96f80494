# pyright: basic
"""Exact resume: the flat row and a few integers, as of the last completed optimizer step. Never pickle."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from lora_core.adapters import AdapterRow
from lora_core.errors import BadCheckpoint, UnsafeFile
from lora_core.job import Job, Progress
from lora_core.tensor_files import read_header, write_directory, write_json

FORMAT = 2
VECTORS = ("p", "m", "v")


def save_checkpoint(job: Job, directory: Path) -> None:
    """Write state.json and row.safetensors; `directory` must not exist and appears whole or not at all."""
    write_directory(directory, lambda temporary: _write(job, temporary))


def _write(job: Job, directory: Path) -> None:
    row_file = directory / "row.safetensors"
    save_file({name: getattr(job.row, name).cpu() for name in VECTORS}, row_file)
    epoch, position = divmod(job.step * job.config.batch_size, job.num_examples)
    state = {
        "format": FORMAT,
        "progress": asdict(job.progress),
        "epoch": epoch,
        "position_in_epoch": position,
        "config_digest": job.config.digest(),
        "data_digest": job.data_digest,
        "targets": [target.name for target in job.row.targets],
        "row_sha256": hashlib.sha256(row_file.read_bytes()).hexdigest(),
    }
    write_json(directory / "state.json", state)


def load_checkpoint(directory: Path, *, row: AdapterRow, expected: dict[str, str]) -> Progress:
    """Fill `row` and return the progress. `expected` names the digests of configuration and data.

    Raises BadCheckpoint if the files are damaged or belong to another configuration, data or base model.
    """
    try:
        state = json.loads((directory / "state.json").read_text())
        progress = Progress(**state["progress"])
        _check_state(state, expected, [target.name for target in row.targets])
        _load_row(directory / "row.safetensors", row, state["row_sha256"])
    except (OSError, ValueError, TypeError, KeyError, UnsafeFile) as error:
        if isinstance(error, BadCheckpoint):
            raise
        raise _bad(f"can't be read ({type(error).__name__}: {error})") from error
    return progress


def _check_state(state: dict[str, Any], expected: dict[str, str], targets: list[str]) -> None:
    if state["format"] != FORMAT:
        raise _bad(f"has format {state['format']}, not {FORMAT}")
    for name, digest in expected.items():
        if state[name] != digest:
            raise _bad(f"belongs to another job: its {name} differs")
    if state["targets"] != targets:
        raise _bad("belongs to another base model: its adapted layers differ")


def _load_row(path: Path, row: AdapterRow, sha256: str) -> None:
    shape = ("F32", (row.num_parameters,))
    if read_header(path) != dict.fromkeys(VECTORS, shape):
        raise _bad("doesn't hold the vectors p, m and v of this adapter")
    if hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
        raise _bad("is damaged: the row's digest differs")
    for name, vector in load_file(path).items():
        if not torch.isfinite(vector).all():
            raise _bad(f"holds numbers in {name} that are not finite")
        getattr(row, name).copy_(vector)
    row.g.zero_()
    row.refresh_compute()


def _bad(reason: str) -> BadCheckpoint:
    return BadCheckpoint(f"The checkpoint {reason}.", remedy="Resume from an older checkpoint, or start again.")
