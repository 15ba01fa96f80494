"""Contenders on one base model: the engine with many jobs, PEFT with one, and the frozen matmuls alone.

One process and one copy of the base model serve all of them, so that they can alternate without storing anything twice.
A turn reports the host's seconds, measured when the device is idle.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch

from benchmarks.contenders.baselines import pad
from benchmarks.gpu.load import LEARNING_RATE, Load
from benchmarks.gpu.shapes import block_weights
from benchmarks.workload import batches
from lora_core.base_model.model import BaseModel
from lora_core.base_model.patching import Attachment
from lora_core.engine.engine import Engine
from lora_core.engine_config import EngineConfig
from lora_core.events import JobStepped
from lora_core.kernels.selection import Kernels
from lora_core.layers.activation_checkpointing import ActivationMemory, CheckpointBlocks

Report = dict[str, Any]


class Clock:
    """Measures seconds between `start` and `stop`, and on a GPU the bytes in use at the start and at the peak.

    `memory` is that of an engine, which resets the device's peak in each tick to measure the bytes per token.
    """

    def __init__(self, device: str, memory: ActivationMemory | None = None) -> None:
        self._gpu = device if device.startswith("cuda") else None
        self._memory = memory

    def start(self) -> None:
        self._report: Report = {}
        if self._gpu:
            torch.cuda.synchronize(self._gpu)
        if self._memory is not None:
            self._memory.restart_peak()
        elif self._gpu:
            torch.cuda.reset_peak_memory_stats(self._gpu)
        if self._gpu:
            self._report["resident_bytes"] = torch.cuda.memory_allocated(self._gpu)
        self._started = time.perf_counter()

    def stop(self) -> Report:
        if self._gpu:
            torch.cuda.synchronize(self._gpu)
            told = torch.cuda.max_memory_allocated(self._gpu) if self._memory is None else self._memory.peak_bytes()
            self._report["peak_bytes"] = told
        return self._report | {"seconds": time.perf_counter() - self._started}


@contextmanager
def attached(base: BaseModel, kernels: Kernels) -> Iterator[None]:
    """Attach the engine's forward within the block. Outside of it the model is as transformers built it."""
    assert base.attachment is None
    base.attachment = Attachment(base.model, kernels)
    try:
        yield
    finally:
        base.attachment.detach()
        base.attachment = None


class Lorry:
    """The engine with the jobs of a load."""

    def __init__(self, base: BaseModel, load: Load, kernels: Kernels) -> None:
        self.base, self.load, self.kernels = base, load, kernels
        config = EngineConfig(token_budget=load.largest_tick, max_tick_seconds=3600, job_tokens=load.largest_step)
        with attached(base, kernels):
            self.engine = Engine(base, config)
            self._clock = Clock(base.device, self.engine.activations)
            rows = load.rows(base.vocab_size)
            for job in range(load.num_jobs):
                self.engine.admit(str(job), load.config(job), rows)

    def turn(self, *, kernels: Kernels | None = None, checkpoint: CheckpointBlocks = "auto") -> Report:
        """Run a step of every job, in one tick if memory allows."""
        self.engine.activations.mode = checkpoint
        stepped: list[JobStepped] = []
        num_ticks = 0
        with attached(self.base, kernels or self.kernels):
            self._clock.start()
            while len({event.job for event in stepped}) < self.load.num_jobs:
                stepped += [event for event in self.engine.tick() if isinstance(event, JobStepped)]
                num_ticks += 1
            report = self._clock.stop()
        memory = self.engine.memory()
        parts = {name: memory[name] for name in ("base_bytes", "adapter_bytes")}
        tokens = sum(event.num_tokens for event in stepped)
        return report | parts | {"tokens": tokens, "ticks": num_ticks, "loss": stepped[0].loss}

    def close(self) -> None:
        with attached(self.base, self.kernels):
            for job in self.engine.jobs():
                self.engine.evict(job)


class Peft:
    """PEFT in a plain loop with one job of the load: adapters in the base model's dtype, torch's attention, padding.

    Its tokens per second also hold for jobs one after another.
    """

    def __init__(self, base: BaseModel, load: Load) -> None:
        self.base, self.load, self._clock = base, load, Clock(base.device)
        rows = batches(load.rows(base.vocab_size), batch_size=load.batch_size, num_steps=64)
        self._batches = [{name: part.to(base.device) for name, part in pad(batch).items()} for batch in rows]
        self._step = 0

    def turn(self) -> Report:
        """Run two steps with a new adapter, and measure the second one."""
        with adapted(self.base, self.load.rank) as model:
            trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
            optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, fused=True)
            self._train(model, trained, optimizer)
            self._clock.start()
            loss, tokens = self._train(model, trained, optimizer)
            return self._clock.stop() | {"tokens": tokens, "loss": loss}

    def _train(self, model: Any, trained: list[Any], optimizer: torch.optim.Optimizer) -> tuple[float, int]:
        batch = self._batches[self._step % len(self._batches)]
        self._step += 1
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach()), int(batch["attention_mask"].sum())

    def close(self) -> None:
        self._batches.clear()


@contextmanager
def adapted(base: BaseModel, rank: int, *, in_float32: bool = False) -> Iterator[Any]:
    """Wrap the base model by PEFT within the block, and restore it afterwards.

    Adapters have the base model's dtype, or with `in_float32` PEFT's default.
    """
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    with base.untouched() as untouched:
        model = get_peft_model(cast(Any, untouched), settings, autocast_adapter_dtype=in_float32)
        model.train()
        try:
            yield model
        finally:
            cast(Any, model).unload()
            untouched.requires_grad_(False).eval()
            if hasattr(untouched, "peft_config"):
                del untouched.peft_config


class Matrix:
    """The matmuls of the blocks' weights in forward and input gradient: the upper limit of the device."""

    def __init__(self, base: BaseModel, num_tokens: int) -> None:
        self._clock = Clock(base.device)
        self._weights = block_weights(base)
        self._flops = 4 * num_tokens * sum(weight.numel() for weight in self._weights)
        sizes = {size for weight in self._weights for size in weight.shape}
        self._inputs = {size: torch.randn(num_tokens, size, device=base.device).to(base.dtype) for size in sizes}

    def turn(self) -> Report:
        self._clock.start()
        for weight in self._weights:
            torch.matmul(self._inputs[weight.shape[1]], weight.T)
            torch.matmul(self._inputs[weight.shape[0]], weight)
        return self._clock.stop() | {"flops": self._flops}

    def close(self) -> None:
        self._inputs.clear()
