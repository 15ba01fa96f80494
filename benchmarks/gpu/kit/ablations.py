"""Contribution of each part to the rate of the small base model: kernels, dropout, chunks, and sizes of a tick."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from statistics import median
from time import perf_counter
from unittest.mock import patch

from benchmarks.gpu.kit.kit import Kit
from benchmarks.gpu.kit.load import Load
from benchmarks.gpu.kit.profiles import chosen, tell_rate
from benchmarks.gpu.kit.sessions import session
from benchmarks.gpu.kit.sizes import Budgets
from lora_core.kernels.selection import Kernels
from lora_core.layers.activation_checkpointing import CheckpointBlocks

DROPOUT = 0.05
MOST_REPEATS = 3
"""Measured steps of a variant. All variants have to fit into one stage."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """One way to compute the same load. `chunk` is the number of labels whose logits exist at one time."""

    load: Load
    kernels: Kernels
    budgets: Budgets
    dropouts: Mapping[int, float] = field(default_factory=dict)
    mode: CheckpointBlocks = "auto"
    chunk: int | None = None


def ablations(kit: Kit) -> None:
    for name, variant in variants(kit).items():
        with kit.attempt(name):
            _measure(kit, name, variant)


def variants(kit: Kit) -> dict[str, Variant]:
    """Return the variants in the order of their runs: the slow ones, with many launches, are last."""
    kernels, sizes = chosen(kit), kit.sizes
    usual = Variant(load=sizes.many, kernels=kernels, budgets=_whole(sizes.many))
    plain, jobs = Kernels(), range(sizes.many.num_jobs)
    slower = {
        f"{part}: {getattr(plain, part)}": replace(usual, kernels=replace(kernels, **{part: getattr(plain, part)}))
        for part in ("elementwise", "attention", "lora")
        if not kit.on_gpu or getattr(plain, part) != getattr(kernels, part)
    }
    ticks = {
        f"ticks of at most {tokens} tokens": replace(usual, budgets=Budgets(tick_tokens=tokens))
        for tokens in sorted(sizes.ablated_ticks, reverse=True)
    }
    return {
        "as chosen": usual,
        "the service's constants": replace(usual, budgets=sizes.budgets),
        f"dropout {DROPOUT} in one job": replace(usual, dropouts={0: DROPOUT}),
        f"dropout {DROPOUT} in every job": replace(usual, dropouts=dict.fromkeys(jobs, DROPOUT)),
        "recomputed blocks": replace(usual, mode="always"),
        "rank 64": replace(usual, load=replace(sizes.many, rank=64)),
        **{f"chunks of {chunk} labels": replace(usual, chunk=chunk) for chunk in sizes.chunks},
        **ticks,
        **slower,
        "plain kernels": replace(usual, kernels=plain),
    }


def _whole(load: Load) -> Budgets:
    """Return budgets that let all jobs compute their whole step in one tick."""
    return Budgets(tick_tokens=load.largest_tick, job_tokens=load.largest_step, slice_tokens=load.largest_step)


def _measure(kit: Kit, name: str, variant: Variant) -> None:
    base = kit.base(kit.sizes.small)
    with (
        _chunked(variant.chunk),
        session(base, variant.load, variant.kernels, variant.budgets, dropouts=variant.dropouts) as opened,
    ):
        opened.engine.activations.mode = variant.mode
        for _ in range(1 if kit.on_gpu else 0):
            opened.step()
        stepped = opened.step()
        times: list[float] = []
        for _ in range(min(MOST_REPEATS, kit.sizes.repeats)):
            kit.synchronize()
            started = perf_counter()
            stepped = opened.step()
            kit.synchronize()
            times.append(perf_counter() - started)
        details = {"ticks": stepped.ticks, "recomputed_ticks": stepped.recomputed}
        details |= {"fastest_seconds": min(times), "slowest_seconds": max(times)}
        rank = variant.load.rank
        tell_rate(kit, base, name, rank=rank, tokens=stepped.tokens, seconds=median(times), **details)


@contextmanager
def _chunked(labels: int | None) -> Iterator[None]:
    with ExitStack() as patches:
        for constant in ("CHUNK_LABELS", "GPU_CHUNK_LABELS") if labels else ():
            patches.enter_context(patch(f"lora_core.losses.chunked_cross_entropy.{constant}", labels))
        yield
