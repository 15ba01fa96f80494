"""The engine with one job that adapts only upper blocks. A step is an epoch, with or without cached activations."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gate import Gate
from benchmarks.step_profile import profile_of
from lora_core.base_model.model import load_base
from lora_core.config import JobConfig, LoraConfig, OptimizerConfig, ScheduleConfig
from lora_core.data.token_dataset import TokenDataset
from lora_core.engine.engine import Engine
from lora_core.engine_config import EngineConfig
from lora_core.events import JobStepped

EPOCHS = 1000
"""Epochs of a job that is stopped from outside."""


def upper_blocks(gate: Gate, options: dict[str, Any]) -> None:
    """`keeps`: use the cache. `upper`: number of adapted blocks. `rows`: number of rows per epoch."""
    engine, epoch = _training(options)
    while True:
        gate.wait()
        done = epoch()
        counts = engine.prefixes
        gate.report(
            tokens=sum(event.num_tokens for event in done),
            labels=sum(event.num_supervised_tokens for event in done),
            loss=done[-1].loss,
            computed_tokens=counts.computed_tokens,
            kept_bytes=counts.memory_bytes,
        )


def upper_blocks_profiled(gate: Gate, options: dict[str, Any]) -> None:
    """Profile an epoch after the first one. Reports the seconds of each part."""
    engine, epoch = _training(options)
    epoch()
    gc.disable()
    while True:
        gate.wait()
        parts, _, _ = profile_of(engine.base, epoch)
        gate.report(parts=parts)


def _training(options: dict[str, Any]) -> tuple[Engine, Callable[[], list[JobStepped]]]:
    """Return an engine with its job, and a function that trains it for an epoch."""
    base = load_base(Path(options["base"]), dtype=options["dtype"], device="cpu")
    engine = Engine(base, EngineConfig(prefix_memory_bytes=2**32 if options["keeps"] else 0))
    rows = first_rows(TokenDataset.load(Path(options["tokens"])), options["rows"])
    depth, steps = base.model.config.num_hidden_layers, rows.num_rows // options["batch_size"]
    engine.admit("job", _config(options, range(depth - options["upper"], depth), num_steps=steps * EPOCHS), rows)

    def epoch() -> list[JobStepped]:
        done: list[JobStepped] = []
        while len(done) < steps:
            done += [event for event in engine.tick() if isinstance(event, JobStepped)]
        return done

    return engine, epoch


def first_rows(rows: TokenDataset, count: int) -> TokenDataset:
    stop = int(rows.row_offsets[count])
    return TokenDataset(
        input_ids=rows.input_ids[:stop],
        loss_mask=rows.loss_mask[:stop],
        row_offsets=np.asarray(rows.row_offsets[: count + 1]),
    )


def _config(options: dict[str, Any], blocks: range, *, num_steps: int) -> JobConfig:
    rank = options["rank"]
    return JobConfig(
        lora=LoraConfig(rank=rank, alpha=2 * rank, layers_to_transform=tuple(blocks)),
        optimizer=OptimizerConfig(learning_rate=2e-4),
        schedule=ScheduleConfig(kind="constant", num_steps=num_steps),
        batch_size=options["batch_size"],
        num_steps=num_steps,
        seed=0,
    )
