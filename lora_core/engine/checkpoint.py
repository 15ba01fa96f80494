# pyright: basic
"""Checkpoints for exact resume: the adapter's vectors and a few counters after the last completed step. Never pickle.

If a job keeps its best weights, they are stored as one more vector.
"""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lora_core.adapter.flat_adapter import FlatAdapter
from lora_core.base_model.model import BaseModel
from lora_core.config import JobConfig
from lora_core.engine.early_stopping import Selection
from lora_core.engine.job import TrainingJob, TrainingProgress
from lora_core.errors import BadCheckpoint, UnsafeFile
from lora_core.runtime.safetensors_io import file_sha256, read_header, write_directory, write_json
from lora_core.runtime.transfers import NamedVectors

FORMAT = 4
VECTORS = ("p", "m", "v")
"""Stored in fp32, as is `best`. The start that is subtracted (PiSSA, OLoRA) has the compute dtype."""
BEST, START = "best", "start"
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16"}
Fingerprint = dict[str, str | None]


BASE_ARGUMENTS = ("dtype", "quantization", "task")
"""Arguments of load_base that must be the same on resume."""
OTHER_BASE = "Load the base model that the job started on, or start again."


def fingerprint(base: BaseModel, config: JobConfig, *, data_digest: str, parent_sha256: str | None) -> Fingerprint:
    """Return everything that determines the rest of a job. A checkpoint can only be resumed if all of it is equal."""
    return {
        "config_digest": config.digest(),
        "data_digest": data_digest,
        "parent_sha256": parent_sha256,
        "dtype": str(base.dtype).removeprefix("torch."),
        "quantization": base.quantization,
        "task": base.task,
        "base_digest": base.digest,
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointSnapshot:
    """A job's state after its last completed step. It is valid until the next tick, a `lasting` one permanently."""

    state: dict[str, Any]
    """The content of state.json without the digest of the vectors."""
    vectors: NamedVectors

    def lasting(self) -> "CheckpointSnapshot":
        """Begin to copy the vectors to the host. Raises torch.OutOfMemoryError."""
        return replace(self, vectors=self.vectors.lasting())

    def write(self, directory: Path) -> None:
        """Write state.json and row.safetensors. `directory` must not exist and is created atomically.

        A lasting snapshot may be written in any thread. Raises OSError and torch.OutOfMemoryError.
        """
        write_directory(directory, self._fill)

    def _fill(self, directory: Path) -> None:
        vectors_file = directory / "row.safetensors"
        save_file(self.vectors.on_host(), vectors_file)
        write_json(directory / "state.json", self.state | {"row_sha256": file_sha256(vectors_file)})


def take_snapshot(job: TrainingJob, base: BaseModel) -> CheckpointSnapshot:
    vectors = {name: getattr(job.adapter, name) for name in VECTORS}
    if job.best is not None:
        vectors[BEST] = job.best
    if job.adapter.lora.subtracts_start:
        vectors[START] = job.adapter.start()
    epoch, position = divmod(job.step * job.config.batch_size, job.num_examples)
    state = {
        "format": FORMAT,
        "progress": asdict(job.progress),
        "epoch": epoch,
        "position_in_epoch": position,
        **fingerprint(base, job.config, data_digest=job.data_digest, parent_sha256=job.parent_sha256),
        "targets": [target.name for target in job.adapter.targets],
    }
    return CheckpointSnapshot(state=state, vectors=NamedVectors(vectors=vectors))


def load_checkpoint(
    directory: Path, *, adapter: FlatAdapter, best: Tensor | None, expected: Fingerprint
) -> TrainingProgress:
    """Load the vectors into `adapter`, and into `best` if the job keeps its best weights. Return the progress.

    Raises BadCheckpoint if the files are damaged or don't match `expected`: another configuration, data set, parent or
    base model, or a base model with another dtype, quantization or task.
    """
    try:
        state = json.loads((directory / "state.json").read_text())
        _check_state(state, expected, [target.name for target in adapter.targets])
        progress = TrainingProgress(**state["progress"] | {"selection": Selection(**state["progress"]["selection"])})
        _load_vectors(directory / "row.safetensors", adapter, best, state["row_sha256"])
    except (OSError, ValueError, TypeError, KeyError, UnsafeFile) as error:
        if isinstance(error, BadCheckpoint):
            raise
        reason = error.message if isinstance(error, UnsafeFile) else error
        raise _bad(f"can't be read ({type(error).__name__}: {reason})") from error
    return progress


def _check_state(state: dict[str, Any], expected: Fingerprint, targets: list[str]) -> None:
    if state["format"] != FORMAT:
        remedy = "Resume with the version of lora_core that wrote it, or start again."
        raise _bad(f"has format {state['format']}, but this version reads only format {FORMAT}", remedy)
    for name, value in expected.items():
        if state[name] != value:
            raise _mismatch(name, was=state[name], value=value)
    if state["targets"] != targets:
        raise _bad("belongs to another base model: the adapted layers differ", OTHER_BASE)


def _mismatch(name: str, *, was: object, value: str | None) -> BadCheckpoint:
    if name in BASE_ARGUMENTS:
        reason = f"was created with {name} {was!r}, but this base model has {value!r}"
        return _bad(reason, f"Load the base model with {name}={was!r}, or start again.")
    if name == "base_digest":
        return _bad(f"belongs to another base model: its {name} differs", OTHER_BASE)
    return _bad(f"belongs to another job: its {name} differs")


def _load_vectors(path: Path, adapter: FlatAdapter, best: Tensor | None, sha256: str) -> None:
    vectors = {name: getattr(adapter, name) for name in VECTORS} | ({} if best is None else {BEST: best})
    if adapter.lora.subtracts_start:
        vectors[START] = adapter.start()
    expected = {name: (DTYPES[vector.dtype], tuple(vector.shape)) for name, vector in vectors.items()}
    if read_header(path) != expected:
        raise _bad(f"does not contain the vectors {', '.join(vectors)} of this adapter")
    if file_sha256(path) != sha256:
        raise _bad("is damaged: the digest of row.safetensors differs")
    for name, vector in load_file(path).items():
        if not torch.isfinite(vector).all():
            raise _bad(f"contains values in {name} that are not finite")
        vectors[name].copy_(vector)
    if adapter.lora.subtracts_start:
        adapter.keep_start(vectors[START])
    adapter.g.zero_()
    adapter.refresh_compute()


def _bad(reason: str, remedy: str = "Resume from an older checkpoint, or start again.") -> BadCheckpoint:
    return BadCheckpoint(f"The checkpoint {reason}.", remedy=remedy)
