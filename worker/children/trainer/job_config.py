"""Converts a user's job specification (catalog.spec.job.JobSpec) to the configuration of the engine.

Only the trainer imports this module. No other code does this conversion.
"""

from __future__ import annotations

import math
from typing import Any, cast

from catalog.resources.memory import FURTHER_SLICES, MOST_JOB_TOKENS, tick_tokens
from catalog.spec.job import JobSpec
from catalog.spec.lora import LoraSpec
from catalog.spec.methods import SupervisedOptions
from catalog.spec.training import ScheduleSpec
from lora_core.config import (
    EarlyStoppingConfig,
    JobConfig,
    LoraConfig,
    ObjectiveConfig,
    OptimizerConfig,
    ScheduleConfig,
)
from lora_core.engine_config import EngineConfig
from worker.protocol.mailbox import Json

TICKS_ALONE = 3
"""Ticks of each size that a job computes alone, to measure how jobs slow each other down; see
catalog/resources/throughput.py."""


def engine_config(settings: Json, *, num_threads: int) -> EngineConfig:
    """Return the configuration of the engine. settings: the trainer's. num_threads: cores that it may use. On a CPU,
    each core is a lane."""
    kind = "cpu" if settings["device"] == "cpu" else "cuda"
    num_lanes = num_threads if kind == "cpu" else 1
    return EngineConfig(
        token_budget=tick_tokens(kind, num_lanes=num_threads),
        job_tokens=MOST_JOB_TOKENS[kind],
        job_slices=1 + FURTHER_SLICES,
        num_lanes=num_lanes,
        ticks_alone=TICKS_ALONE,
        batch_invariant=bool(settings["batch_invariant"]),
    )


def job_config(spec: JobSpec, *, num_steps: int, evaluate_every_steps: int | None) -> JobConfig:
    """Return everything that determines the job's result. Raises lora_core's ConfigError."""
    options = spec.method_options
    return JobConfig(
        lora=_lora_config(spec.lora),
        optimizer=OptimizerConfig(kind=spec.optimizer.type, **spec.optimizer.model_dump(exclude={"type"})),
        schedule=_schedule_config(spec.schedule, num_steps),
        batch_size=spec.batch_size,
        num_steps=num_steps,
        seed=spec.seed,
        evaluate_every_steps=evaluate_every_steps,
        slice_tokens=spec.slice_tokens,
        early_stopping=EarlyStoppingConfig(**spec.early_stopping.model_dump()) if spec.early_stopping else None,
        keep=spec.evaluation.keep,
        objective=objective_config(spec),
        neftune_alpha=options.neftune_alpha if isinstance(options, SupervisedOptions) else 0.0,
    )


def _schedule_config(schedule: ScheduleSpec, num_steps: int) -> ScheduleConfig:
    """Return the schedule. The decay takes ⌈ratio · num_steps⌉ steps, but at most the steps after the warm-up."""
    num_warmup = warmup_steps(schedule.warmup_ratio, num_steps)
    num_decay = min(num_steps - num_warmup, math.ceil((schedule.decay_ratio or 0) * num_steps))
    return ScheduleConfig(kind=schedule.type, warmup_steps=num_warmup, decay_steps=num_decay, num_steps=num_steps)


def _lora_config(lora: LoraSpec) -> LoraConfig:
    """Return the LoRA configuration, with tuples in place of lists and objects. Patterns are sorted by their keys,
    because JSON objects have no order. Two keys never conflict for the same layer."""
    return LoraConfig(**{name: _as_tuple(value) for name, value in lora.model_dump().items()})


def _as_tuple(value: Any) -> Any:
    if isinstance(value, dict):
        return tuple(sorted(cast(Json, value).items()))
    return tuple(cast("list[Any]", value)) if isinstance(value, list) else value


def objective_config(spec: JobSpec) -> ObjectiveConfig:
    """Return the loss that the job minimizes."""
    return ObjectiveConfig(kind=spec.method, **spec.method_options.model_dump(exclude={"neftune_alpha"}))


def warmup_steps(ratio: float, num_steps: int) -> int:
    """Return ⌈ratio · num_steps⌉, but at most num_steps - 1, so that a step at the peak learning rate follows."""
    return min(num_steps - 1, math.ceil(ratio * num_steps))
