# pyright: basic
"""Exact resume: the flat row and a few numbers, as of the last completed optimizer step. Never pickle.

Where a job keeps its best weights, they are a vector beside those of the adapter.
"""

import hashlib
import json
from dataclasses import asdict
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
from lora_core.runtime.safetensors_io import read_header, write_directory, write_json

FORMAT = 4
VECTORS = ("p", "m", "v")
"""In fp32, with `best` where one is kept. A start that is subtracted (PiSSA, OLoRA) is in its own dtype."""
BEST, START = "best", "start"
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16"}
Belonging = dict[str, str | None]


HELD = ("dtype", "quantization", "task")
"""How a base is held, by the arguments of load_base."""
OTHER_BASE = "Load the base model that the job began on, or start again."


def belonging(base: BaseModel, config: JobConfig, *, data_digest: str, parent_sha256: str | None) -> Belonging:
    """What a checkpoint goes on with, and with nothing else: all that the rest of a job follows from."""
    return {
        "config_digest": config.digest(),
        "data_digest": data_digest,
        "parent_sha256": parent_sha256,
        "dtype": str(base.dtype).removeprefix("torch."),
        "quantization": base.quantization,
        "task": base.task,
        "base_digest": base.digest,
    }


def save_checkpoint(job: TrainingJob, base: BaseModel, directory: Path) -> None:
    """Write state.json and row.safetensors; `directory` must not exist and appears whole or not at all."""
    write_directory(directory, lambda temporary: _write(job, base, temporary))


def _write(job: TrainingJob, base: BaseModel, directory: Path) -> None:
    vectors_file = directory / "row.safetensors"
    vectors = {name: getattr(job.adapter, name).cpu() for name in VECTORS}
    if job.best is not None:
        vectors[BEST] = job.best.cpu()
    if job.adapter.lora.subtracts_start:
        vectors[START] = job.adapter.start().cpu()
    save_file(vectors, vectors_file)
    epoch, position = divmod(job.step * job.config.batch_size, job.num_examples)
    state = {
        "format": FORMAT,
        "progress": asdict(job.progress),
        "epoch": epoch,
        "position_in_epoch": position,
        **belonging(base, job.config, data_digest=job.data_digest, parent_sha256=job.parent_sha256),
        "targets": [target.name for target in job.adapter.targets],
        "row_sha256": hashlib.sha256(vectors_file.read_bytes()).hexdigest(),
    }
    write_json(directory / "state.json", state)


def load_checkpoint(
    directory: Path, *, adapter: FlatAdapter, best: Tensor | None, expected: Belonging
) -> TrainingProgress:
    """Fill `row`, and `best` where the job keeps its best weights, and return the progress. `expected`: what it must
    belong to.

    Raises BadCheckpoint if the files are damaged or belong to another configuration, data, parent or base model, or to
    one that is held in another dtype, otherwise quantized or for another task.
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


def _check_state(state: dict[str, Any], expected: Belonging, targets: list[str]) -> None:
    if state["format"] != FORMAT:
        remedy = "Go on with the version of lora_core that wrote it, or start again."
        raise _bad(f"has format {state['format']}, not {FORMAT}", remedy)
    for name, value in expected.items():
        if state[name] != value:
            raise _foreign(name, was=state[name], value=value)
    if state["targets"] != targets:
        raise _bad("belongs to another base model: its adapted layers differ", OTHER_BASE)


def _foreign(name: str, *, was: object, value: str | None) -> BadCheckpoint:
    if name in HELD:
        reason = f"was made on a base with {name} {was!r}, and this one has {value!r}"
        return _bad(reason, f"Load the base with {name}={was!r}, or start again.")
    if name == "base_digest":
        return _bad(f"belongs to another base model: its {name} differs", OTHER_BASE)
    return _bad(f"belongs to another job: its {name} differs")


def _load_vectors(path: Path, adapter: FlatAdapter, best: Tensor | None, sha256: str) -> None:
    vectors = {name: getattr(adapter, name) for name in VECTORS} | ({} if best is None else {BEST: best})
    if adapter.lora.subtracts_start:
        vectors[START] = adapter.start()
    expected = {name: (DTYPES[vector.dtype], tuple(vector.shape)) for name, vector in vectors.items()}
    if read_header(path) != expected:
        raise _bad(f"doesn't hold the vectors {', '.join(vectors)} of this adapter")
    if hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
        raise _bad("is damaged: the adapter's digest differs")
    for name, vector in load_file(path).items():
        if not torch.isfinite(vector).all():
            raise _bad(f"holds numbers in {name} that are not finite")
        vectors[name].copy_(vector)
    if adapter.lora.subtracts_start:
        adapter.keep_start(vectors[START])
    adapter.g.zero_()
    adapter.refresh_compute()


def _bad(reason: str, remedy: str = "Resume from an older checkpoint, or start again.") -> BadCheckpoint:
    return BadCheckpoint(f"The checkpoint {reason}.", remedy=remedy)
