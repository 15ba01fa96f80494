"""An engine on a base model of random weights, without the probe, whose adapters are drawn on the device."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from unittest.mock import patch

import numpy as np
import torch

from benchmarks.gpu.kit.load import Load
from benchmarks.gpu.kit.shapes import block_weights
from benchmarks.gpu.kit.sizes import Budgets
from lora_core.base_model.model import BaseModel
from lora_core.base_model.patching import Attachment
from lora_core.config import JobConfig
from lora_core.data.token_dataset import TokenDataset
from lora_core.engine.engine import Engine
from lora_core.engine_config import EngineConfig
from lora_core.events import Event, JobDiverged, JobStepped
from lora_core.kernels.selection import Kernels


@dataclass(frozen=True, kw_only=True, slots=True)
class Stepped:
    """Tokens and ticks until every job took a step, and the loss of the first job.

    `recomputed` is the number of ticks whose backward recomputed the blocks.
    """

    tokens: int
    ticks: int
    recomputed: int
    loss: float


class Session:
    """An engine with the jobs of a load. Every step of a job has the same rows, so that shapes are warm."""

    def __init__(self, base: BaseModel, load: Load, budgets: Budgets, *, dropouts: Mapping[int, float] | None = None):
        """`dropouts` are those of some jobs, by number."""
        assert budgets.slice_tokens >= load.largest_step, "a step is one slice, so events count what ticks compute"
        self.load = load
        self.configs: list[JobConfig] = []
        config = EngineConfig(token_budget=budgets.tick_tokens, job_tokens=budgets.job_tokens, max_tick_seconds=3600)
        with without_probe():
            self.engine = Engine(base, config)
        for job in range(load.num_jobs):
            settings = replace(load.config(job), slice_tokens=budgets.slice_tokens)
            dropout = (dropouts or {}).get(job, 0.0)
            settings = replace(settings, lora=replace(settings.lora, dropout=dropout))
            self.configs.append(settings)
            self.engine.admit(str(job), settings, rows_of(load, base.vocab_size, job))
            self.engine.adapter(str(job))  # completes the initialization, which would continue in later ticks

    def step(self) -> Stepped:
        """Run ticks until every job has taken a step. The tokens include further steps of some jobs in these ticks.

        Raises RuntimeError if a job diverges.
        """
        stepped: list[JobStepped] = []
        ticks, recomputed = 0, self.engine.activations.num_checkpointed
        while len({event.job for event in stepped}) < self.load.num_jobs:
            events = self.engine.tick()
            _require_progress(self.engine, events)
            stepped += [event for event in events if isinstance(event, JobStepped)]
            ticks += 1
        return Stepped(
            tokens=sum(event.num_tokens for event in stepped),
            ticks=ticks,
            recomputed=self.engine.activations.num_checkpointed - recomputed,
            loss=next(event.loss for event in stepped if event.job == "0"),
        )


def _require_progress(engine: Engine, events: list[Event]) -> None:
    """Raise RuntimeError if a job diverged, or if no job of the engine has work left."""
    for event in events:
        if isinstance(event, JobDiverged):
            raise RuntimeError(f"Job {event.job} diverged after step {event.step}: {event.message}")
    if not events and engine.idle:
        raise RuntimeError("No job has work left, so no tick will complete a step.")


@contextmanager
def session(
    base: BaseModel,
    load: Load,
    kernels: Kernels,
    budgets: Budgets,
    *,
    dropouts: Mapping[int, float] | None = None,
) -> Iterator[Session]:
    """Attach an engine with the jobs of `load` within the block."""
    with attached(base, kernels):
        opened = Session(base, load, budgets, dropouts=dropouts)
        try:
            yield opened
        finally:
            for job in opened.engine.jobs():
                opened.engine.evict(job)
    del opened  # jobs have cycles, so their buffers are only freed by a collection
    gc.collect()
    if base.device.startswith("cuda"):
        torch.cuda.empty_cache()


def rows_of(load: Load, vocab: int, job: int) -> TokenDataset:
    """Return the rows of one batch, which every step of the job repeats. The second half of a row is trained on."""
    numbers = np.random.default_rng(job)
    lengths = numbers.integers(load.shortest, load.longest + 1, load.batch_size)
    masks = [(np.arange(length) >= length // 2).astype(np.uint8) for length in lengths]
    return TokenDataset(
        input_ids=numbers.integers(0, vocab, int(lengths.sum()), dtype=np.int32),
        loss_mask=np.concatenate(masks),
        row_offsets=np.cumsum([0, *lengths]),
    )


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


@contextmanager
def without_probe() -> Iterator[None]:
    """Skip the measurement of batch invariance, which makes dozens of passes."""
    with patch("lora_core.engine.engine.measure_invariance", lambda base, lanes: "allclose"):
        yield


def lora_flops_per_token(base: BaseModel, rank: int) -> int:
    """Return the FLOPs of adapters on all linears per token: of the output, of both gradients, and of the input's."""
    return 6 * rank * sum(sum(weight.shape) for weight in block_weights(base))


def step_flops_per_token(base: BaseModel, rank: int) -> int:
    """Return 4P + LoRA: the frozen linears' forward and input gradient, and the adapters'. Without the output head."""
    return 4 * sum(weight.numel() for weight in block_weights(base)) + lora_flops_per_token(base, rank)
