# pyright: basic
"""AdamW over one flat row: one norm, one clip, one update of each part that has a rate of its own.

The rate is a pure function of the step."""

import math

import torch

from lora_core.adapters import AdapterRow
from lora_core.config import OptimizerConfig, ScheduleConfig


def learning_rate_at(step: int, *, peak: float, schedule: ScheduleConfig) -> float:
    """The rate of optimizer step `step` (from 1); see ScheduleConfig.

    It is what the schedules of transformers give with one step more of warm-up and in all, but for their
    first step, whose rate would be 0.
    """
    done = step - 1
    if done < schedule.warmup_steps:
        return peak * step / (schedule.warmup_steps + 1)
    if schedule.kind == "constant":
        return peak
    progress = min(1.0, (done - schedule.warmup_steps) / max(1, schedule.num_steps - schedule.warmup_steps))
    if schedule.kind == "linear":
        return peak * (1 - progress)
    return peak * 0.5 * (1 + math.cos(math.pi * progress))


def gradient_norm(row: AdapterRow) -> float:
    """Euclidean norm of the whole gradient; not finite if any element isn't."""
    return float(torch.linalg.vector_norm(row.g))


def stays_finite(row: AdapterRow, config: OptimizerConfig, *, learning_rate: float, norm: float) -> bool:
    """Whether the next step can't overflow a weight: |m̂| / √v̂ never exceeds 1 / √(1 - β2)."""
    if not math.isfinite(norm):
        return False
    highest = learning_rate * max(1.0, config.lora_plus_ratio)
    largest = float(row.p.abs().max()) * max(1.0, abs(1 - highest * config.weight_decay))
    return largest + highest / math.sqrt(1 - config.beta2) < torch.finfo(torch.float32).max


def adamw_step(row: AdapterRow, config: OptimizerConfig, *, step: int, learning_rate: float, norm: float) -> None:
    """Clip, apply one step (arXiv 1711.05101, algorithm 2), clear the gradient. `step` counts from 1."""
    p, g, m, v = row.p, row.g, row.m, row.v
    if config.max_grad_norm is not None:
        g.mul_(min(1.0, config.max_grad_norm / (norm + 1e-6)))
    m.lerp_(g, 1 - config.beta1)
    v.mul_(config.beta2).addcmul_(g, g, value=1 - config.beta2)
    denominator = torch.sqrt(v, out=g).div_(math.sqrt(1 - config.beta2**step)).add_(config.eps)
    for part, factor in row.parts(config.lora_plus_ratio):
        rate = learning_rate * factor
        p[part].mul_(1 - rate * config.weight_decay)
        p[part].addcdiv_(m[part], denominator[part], value=-rate / (1 - config.beta1**step))
    g.zero_()
    row.refresh_compute()
