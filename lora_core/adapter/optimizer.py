# pyright: basic
"""Optimizers over one flat adapter: one norm, one clip, and one update for each part with its own learning rate.

Adafactor updates each matrix separately (adafactor.py). The learning rate is a pure function of the step. Every
optimizer keeps its state in the adapter's m and v.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_core.adapter.adafactor import Block, adafactor_bounds, adafactor_step
from lora_core.adapter.flat_adapter import FlatAdapter
from lora_core.config import OptimizerConfig, ScheduleConfig
from lora_core.kernels.gpu.optimizer_table import AdamwStep
from lora_core.kernels.on_device import has_gpu_kernels

FLOAT32 = torch.finfo(torch.float32)


def learning_rate_at(step: int, *, peak: float, schedule: ScheduleConfig) -> float:
    """Return the learning rate of optimizer step `step` (from 1). See ScheduleConfig.

    It equals that of transformers' schedules with one more warm-up step and one more step in total, without their
    first step, whose learning rate is 0.
    """
    done = step - 1
    if done < schedule.warmup_steps:
        return peak * step / (schedule.warmup_steps + 1)
    if schedule.kind == "constant":
        return peak
    decay_from = schedule.num_steps - schedule.decay_steps if schedule.kind == "wsd" else schedule.warmup_steps
    if done < decay_from:
        return peak
    progress = min(1.0, (done - decay_from) / max(1, schedule.num_steps - decay_from))
    if schedule.kind == "cosine":
        return peak * 0.5 * (1 + math.cos(math.pi * progress))
    return peak * (1 - progress)


@dataclass(frozen=True, kw_only=True, slots=True)
class StepSizes:
    """Numbers that decide whether a step is possible, and by how much its gradient is clipped.

    Attributes:
        norm: Euclidean norm of the whole gradient. It is not finite if any element is not finite.
        weight: Largest absolute weight.
        moment: Largest absolute first moment; 0 if the step's bounds don't depend on it.
    """

    norm: float
    weight: float
    moment: float

    @classmethod
    def of(cls, sizes_3: Tensor) -> "StepSizes":
        """Read the result of `step_sizes`, which is on the host now."""
        norm, weight, moment = sizes_3.tolist()
        return cls(norm=norm, weight=weight, moment=moment)


def step_sizes(adapter: FlatAdapter, config: OptimizerConfig, *, learning_rate: float) -> Tensor:
    """Return the sizes of the next step as fp32 [3] on the adapter's device, so that one copy reads those of all jobs.

    Raises torch.OutOfMemoryError.
    """
    weight = torch.linalg.vector_norm(adapter.p, math.inf)
    moment = torch.linalg.vector_norm(adapter.m, math.inf) if _reads_moment(config, learning_rate) else weight * 0
    return torch.stack([torch.linalg.vector_norm(adapter.g), weight, moment])


def has_joint_sizes(adapter: FlatAdapter) -> bool:
    """Return whether `joint_step_sizes` measures the step of this adapter: on a GPU with kernels.

    torch's sum there depends on the number of multiprocessors.
    """
    return has_gpu_kernels(adapter.g)


def joint_step_sizes(adapters: Sequence[FlatAdapter]) -> Tensor:
    """Return the sizes of the next step of each adapter as fp32 [J, 3] on their device.

    Raises torch.OutOfMemoryError.
    """
    from lora_core.kernels.gpu import optimizer

    moments = [adapter.m if len(adapter.m) else adapter.p for adapter in adapters]  # Adafactor has no first moment
    return optimizer.step_sizes([(adapter.g, adapter.p, m) for adapter, m in zip(adapters, moments, strict=True)])


def _reads_moment(config: OptimizerConfig, learning_rate: float) -> bool:
    """Return whether `stays_finite` needs the first moment: always in SGD, and in AdamW if the clipping limit does not
    rule out an overflow."""
    if config.kind == "adafactor":
        return False
    limit = math.inf if config.max_grad_norm is None else config.max_grad_norm
    return config.kind == "sgd" or not _momentum_rate(config, learning_rate) * limit < FLOAT32.max


def _momentum_rate(config: OptimizerConfig, learning_rate: float) -> float:
    return _highest_rate(config, learning_rate) / (1 - config.beta1)


def _highest_rate(config: OptimizerConfig, learning_rate: float) -> float:
    return learning_rate * max(1.0, config.lora_plus_ratio)


def stays_finite(adapter: FlatAdapter, config: OptimizerConfig, *, learning_rate: float, sizes: StepSizes) -> bool:
    """Return whether the next step provably overflows no weight, no intermediate value and no scalar factor in fp32."""
    bounds = {"adamw": _adamw_bounds, "sgd": _sgd_bounds, "adafactor": _adafactor_bounds}[config.kind]
    numbers = (sizes.norm, *bounds(adapter, config, learning_rate, sizes))
    return all(number < FLOAT32.max for number in numbers)  # also False for NaN


def _adamw_bounds(
    _adapter: FlatAdapter, config: OptimizerConfig, learning_rate: float, sizes: StepSizes
) -> tuple[float, ...]:
    """Return bounds of a weight after the step, of the decay factor, and of rate · m̂, which is computed before it is
    divided by √v̂.

    |m̂| / √v̂ never exceeds 1 / √(1 - β2), unless √v̂ is 0 because the squares are below the smallest fp32 number.
    """
    highest, rate = _highest_rate(config, learning_rate), _momentum_rate(config, learning_rate)
    kept = abs(1 - highest * config.weight_decay)
    divided = max(1.0, math.sqrt(FLOAT32.tiny) / config.eps) / math.sqrt(1 - config.beta2)
    momentum = math.inf if config.max_grad_norm is None else config.max_grad_norm
    if _reads_moment(config, learning_rate):
        momentum = max(sizes.norm, sizes.moment)
    return sizes.weight * max(1.0, kept) + highest * divided, kept, rate, rate * momentum


def _sgd_bounds(
    _adapter: FlatAdapter, config: OptimizerConfig, learning_rate: float, sizes: StepSizes
) -> tuple[float, ...]:
    """Return bounds of a velocity and of a weight after the step, and the factors. A norm bounds each element."""
    highest = _highest_rate(config, learning_rate)
    velocity = config.momentum * sizes.moment + sizes.norm + config.weight_decay * sizes.weight
    return velocity, sizes.weight + highest * velocity, highest, config.weight_decay


def _adafactor_bounds(
    adapter: FlatAdapter, config: OptimizerConfig, learning_rate: float, sizes: StepSizes
) -> tuple[float, ...]:
    return adafactor_bounds(
        config,
        largest_block=max(math.prod(block.shape) for block in adapter.blocks),
        largest=sizes.weight,
        highest=_highest_rate(config, learning_rate),
        norm=sizes.norm,
    )


def optimizer_step(
    adapter: FlatAdapter, config: OptimizerConfig, *, step: int, learning_rate: float, norm: float
) -> None:
    """Clip the gradient, apply one step and zero the gradient.

    `step` counts from 1. `norm` is the Euclidean norm of the gradient before clipping.
    """
    if config.max_grad_norm is not None:
        adapter.g.mul_(_clip_factor(config, norm))
    if config.kind == "sgd":
        _sgd_step(adapter, config, learning_rate=learning_rate)
    elif config.kind == "adafactor":
        rated = _rated_blocks(adapter, config, learning_rate=learning_rate)
        adafactor_step(adapter.p, adapter.g, adapter.v, rated, config, step=step)
    else:
        _adamw_step(adapter, config, step=step, learning_rate=learning_rate)
    adapter.g.zero_()
    adapter.refresh_compute()


def has_joint_step(adapter: FlatAdapter, config: OptimizerConfig) -> bool:
    """Return whether `joint_steps` takes the steps of this adapter: AdamW on a GPU with kernels."""
    return config.kind == "adamw" and has_gpu_kernels(adapter.p)


def joint_steps(steps: Sequence[AdamwStep]) -> list[Callable[[], None]]:
    """Upload all steps, and return the launches that take them.

    Call `refresh_derived` of each adapter after the launches. Raises torch.OutOfMemoryError.
    """
    from lora_core.kernels.gpu import optimizer

    return optimizer.adamw_launches(steps)


def joint_step_of(
    adapter: FlatAdapter, config: OptimizerConfig, *, step: int, learning_rate: float, norm: float
) -> AdamwStep:
    """Return the step as the kernel takes it (lora_core/kernels/gpu). Arguments as in `optimizer_step`."""
    has_plus = config.lora_plus_ratio != 1
    return AdamwStep(
        p=adapter.p,
        g=adapter.g,
        m=adapter.m,
        v=adapter.v,
        compute=None if adapter.compute is adapter.p else adapter.compute,
        clip=_clip_factor(config, norm),
        beta1=config.beta1,
        beta2=config.beta2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        step=step,
        rate=learning_rate,
        plus=slice(adapter.num_a, adapter.num_lora) if has_plus else slice(0, 0),
        plus_rate=learning_rate * config.lora_plus_ratio,
    )


def _clip_factor(config: OptimizerConfig, norm: float) -> float:
    return 1.0 if config.max_grad_norm is None else min(1.0, config.max_grad_norm / (norm + 1e-6))


def _adamw_step(adapter: FlatAdapter, config: OptimizerConfig, *, step: int, learning_rate: float) -> None:
    """AdamW (arXiv 1711.05101, algorithm 2)."""
    p, g, m, v = adapter.p, adapter.g, adapter.m, adapter.v
    m.lerp_(g, 1 - config.beta1)
    v.mul_(config.beta2).addcmul_(g, g, value=1 - config.beta2)
    denominator = torch.sqrt(v, out=g).div_(math.sqrt(1 - config.beta2**step)).add_(config.eps)
    for part, factor in adapter.parts(config.lora_plus_ratio):
        rate = learning_rate * factor
        p[part].mul_(1 - rate * config.weight_decay)
        p[part].addcdiv_(m[part], denominator[part], value=-rate / (1 - config.beta1**step))


def _sgd_step(adapter: FlatAdapter, config: OptimizerConfig, *, learning_rate: float) -> None:
    """SGD as in torch: the decay is added to the gradient, and m ← momentum · m + gradient is the update. v stays 0."""
    adapter.m.mul_(config.momentum).add_(adapter.g).add_(adapter.p, alpha=config.weight_decay)
    for part, factor in adapter.parts(config.lora_plus_ratio):
        adapter.p[part].add_(adapter.m[part], alpha=-learning_rate * factor)


def _rated_blocks(
    adapter: FlatAdapter, config: OptimizerConfig, *, learning_rate: float
) -> Iterator[tuple[Block, float]]:
    """Yield each block with its learning rate. A block never spans two parts."""
    for part, factor in adapter.parts(config.lora_plus_ratio):
        for block in adapter.blocks:
            if part.start <= block.numbers.start < part.stop:
                yield block, learning_rate * factor
