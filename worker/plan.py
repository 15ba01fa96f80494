"""The only bridge from what a person asked for (catalog.spec.JobSpec) to what the engine is told.

Imported by train_entry alone: beside it only import_entry knows lora_core.
"""

from __future__ import annotations

import math

from catalog.course_spec import ScheduleSpec
from catalog.lora_spec import LoraSpec
from catalog.memory import SLICE_TOKENS, tick_tokens
from catalog.spec import JobSpec
from lora_core.config import (
    EarlyStoppingConfig,
    JobConfig,
    LoraConfig,
    ObjectiveConfig,
    OptimizerConfig,
    ScheduleConfig,
)
from lora_core.engine_config import EngineConfig

TICKS_ALONE = 3
"""Of each size, so that the trainer knows what jobs cost each other; see catalog/saturation.py."""


def engine_config(device: str, *, num_threads: int) -> EngineConfig:
    """num_threads: cores that the trainer may use. On a CPU each is a lane of its own."""
    kind = "cpu" if device == "cpu" else "cuda"
    budget = tick_tokens(kind, num_lanes=num_threads)
    if kind == "cpu":
        return EngineConfig(token_budget=budget, max_tick_seconds=1.0, num_lanes=num_threads, ticks_alone=TICKS_ALONE)
    return EngineConfig(token_budget=budget, max_tick_seconds=0.3, ticks_alone=TICKS_ALONE)


def job_config(spec: JobSpec, *, num_steps: int, evaluate_every_steps: int | None) -> JobConfig:
    """Everything that decides the job's result. Raises lora_core's ConfigError."""
    return JobConfig(
        lora=_lora_config(spec.lora),
        optimizer=OptimizerConfig(kind=spec.optimizer.type, **spec.optimizer.model_dump(exclude={"type"})),
        schedule=_schedule_config(spec.schedule, num_steps),
        batch_size=spec.batch_size,
        num_steps=num_steps,
        seed=spec.seed,
        evaluate_every_steps=evaluate_every_steps,
        slice_tokens=SLICE_TOKENS,
        early_stopping=EarlyStoppingConfig(**spec.early_stopping.model_dump()) if spec.early_stopping else None,
        keep=spec.keep,
        objective=objective_config(spec),
        neftune_alpha=spec.supervised.neftune_alpha if spec.supervised else 0.0,
    )


def _schedule_config(schedule: ScheduleSpec, num_steps: int) -> ScheduleConfig:
    """A decay takes ⌈ratio · num_steps⌉ steps, and no more than the warm-up leaves."""
    num_warmup = warmup_steps(schedule.warmup_ratio, num_steps)
    num_decay = min(num_steps - num_warmup, math.ceil((schedule.decay_ratio or 0) * num_steps))
    return ScheduleConfig(kind=schedule.type, warmup_steps=num_warmup, decay_steps=num_decay, num_steps=num_steps)


def _lora_config(lora: LoraSpec) -> LoraConfig:
    """Patterns go by their keys: JSON keeps no order of its own, and no two keys disagree on a layer."""
    targets, layers = lora.target_modules, lora.layers_to_transform
    return LoraConfig(
        rank=lora.rank,
        alpha=lora.alpha,
        dropout=lora.dropout,
        target_modules=targets if isinstance(targets, str) else tuple(targets),
        layers_to_transform=None if layers is None else tuple(layers),
        rank_pattern=tuple(sorted(lora.rank_pattern.items())),
        alpha_pattern=tuple(sorted(lora.alpha_pattern.items())),
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        init_lora_weights=lora.init_lora_weights,
    )


def objective_config(spec: JobSpec) -> ObjectiveConfig:
    """What the job minimises."""
    return ObjectiveConfig(kind=spec.method, **spec.method_numbers.model_dump(exclude={"neftune_alpha"}))


def warmup_steps(ratio: float, num_steps: int) -> int:
    """⌈ratio · num_steps⌉, but never all: the last step of a warm-up is followed by one at the peak rate."""
    return min(num_steps - 1, math.ceil(ratio * num_steps))
