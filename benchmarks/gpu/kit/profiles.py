"""Where the time and the memory of a tick go: kernels, launches, the host, waits for the device, and bytes kept."""

from __future__ import annotations

import time
import traceback
import warnings
from collections import Counter
from dataclasses import replace
from typing import Any, cast

import torch
from torch.autograd import DeviceType  # pyright: ignore[reportPrivateImportUsage]
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.kit.facts import datasheet_flops
from benchmarks.gpu.kit.kit import Kit
from benchmarks.gpu.kit.load import Load
from benchmarks.gpu.kit.sessions import Session, lora_flops_per_token, session, step_flops_per_token
from benchmarks.gpu.kit.sizes import Budgets
from benchmarks.workload import ROOT
from lora_core.base_model.model import BaseModel
from lora_core.base_model.patching import find_linears
from lora_core.kernels.selection import Kernels, choose_kernels
from lora_core.layers.activation_checkpointing import RECOMPUTED_INPUTS, SHARED_INPUTS

LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx")
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpyAsync")
"""Calls in which the host waits for the device. A copy of pageable memory waits for the work before it."""
TOP = 25


def small(kit: Kit) -> None:
    """Profile many jobs with one row each, and one job."""
    sizes = kit.sizes
    row = Load(
        num_jobs=sizes.many.num_jobs, batch_size=1, shortest=sizes.profiled_rows, longest=sizes.profiled_rows, rank=16
    )
    lone = replace(row, num_jobs=1, batch_size=sizes.lone_rows)
    base = kit.base(sizes.small)
    for load in (row, lone):
        named = f"{base_name(kit, base)}, {told(load)}"
        with kit.attempt(named), session(base, load, chosen(kit), _wide(load.largest_tick)) as opened:
            _profile(kit, opened, base, named)


def large(kit: Kit) -> None:
    """Measure the bytes of ticks that keep all activations and of ticks that recompute, and profile the largest."""
    sizes = kit.sizes
    base = kit.base(sizes.large)
    for tokens in sizes.memory_ticks:
        rows = tokens // sizes.memory_ticks[0] * sizes.many.num_jobs
        length = tokens // rows
        load = Load(
            num_jobs=sizes.many.num_jobs,
            batch_size=rows // sizes.many.num_jobs,
            shortest=length,
            longest=length,
            rank=16,
        )
        named = f"{base_name(kit, base)}, {told(load)}"
        with kit.attempt(named), session(base, load, chosen(kit), _wide(tokens)) as opened:
            for mode in ("never", "always"):
                opened.engine.activations.mode = cast(Any, mode)
                with kit.attempt(f"{named}, recomputed: {mode}"):
                    _memory(kit, opened, base, f"{named}, recomputed: {mode}")
            if tokens == sizes.memory_ticks[-1]:
                opened.engine.activations.mode = "never"
                _profile(kit, opened, base, named)


def chosen(kit: Kit) -> Kernels:
    return choose_kernels(kit.device, torch.bfloat16)


def base_name(kit: Kit, base: BaseModel) -> str:
    return next(name for name, known in kit.bases.items() if known is base)


def told(load: Load) -> str:
    jobs = "1 job" if load.num_jobs == 1 else f"{load.num_jobs} jobs"
    return f"{jobs} x {load.batch_size} rows of {load.longest} tokens"


def tell_rate(kit: Kit, base: BaseModel, name: str, *, rank: int, tokens: int, seconds: float, **details: Any) -> None:
    """Record tokens per second, with the fractions of the measured and the datasheet's matmul rate by 4P + LoRA."""
    flops = step_flops_per_token(base, rank) * tokens / seconds
    details |= {"teraflops_per_second": flops / 1e12}
    if kit.matrix_flops is not None:
        details["fraction_of_measured_matmul"] = flops / kit.matrix_flops
    datasheet = datasheet_flops(torch.cuda.get_device_name(kit.device)) if kit.on_gpu else None
    if datasheet is not None:
        details["MFU"] = flops / datasheet
    kit.tell(name, tokens / seconds, "tokens/s", **details)


def _wide(tokens: int) -> Budgets:
    """Return budgets that let every job compute its whole step in one tick."""
    return Budgets(tick_tokens=tokens, job_tokens=tokens, slice_tokens=tokens)


def kept_bytes_per_token(base: BaseModel) -> int:
    """Return activation_bytes_per_token of catalog/resources/memory.py, whose module a bare machine can't import.

    All bases of the kit have gated MLPs and bf16 weights, of which single operations on a GPU keep some inputs twice.
    """
    copies = dict.fromkeys(SHARED_INPUTS, 0)
    if base.device.startswith("cuda"):
        copies |= dict.fromkeys(RECOMPUTED_INPUTS, 0 if base.kernels.elementwise == "compiled" else 2)
    numbers = 0
    for name, linear in find_linears(base.model).items():
        out_features, in_features = cast(torch.Tensor, linear.weight).shape
        numbers += out_features + copies.get(name.rpartition(".")[2], 1) * in_features
    return numbers * base.dtype.itemsize


def _memory(kit: Kit, opened: Session, base: BaseModel, named: str) -> None:
    stepped = opened.step()
    estimate, layers = kept_bytes_per_token(base), cast(Any, base.model.config).num_hidden_layers
    if not kit.on_gpu:
        kit.tell_missing_gpu(f"peak, {named}", "the peak of a CPU's process can't be reset")
        kit.tell(f"estimate of bytes kept, {named}", estimate, "bytes/token")
        return
    torch.cuda.synchronize(kit.device)
    opened.engine.activations.restart_peak()
    before = torch.cuda.memory_allocated(kit.device)
    started = time.perf_counter()
    stepped = opened.step()
    kit.synchronize()
    seconds = time.perf_counter() - started
    peak = opened.engine.activations.peak_bytes()
    per_token = (peak - before) / stepped.tokens
    kit.tell(f"peak, {named}", peak / 1e9, "GB", resident=before / 1e9, ticks=stepped.ticks)
    details = {"per_layer": per_token / layers, "estimate": estimate, "over_estimate": per_token / estimate}
    kit.tell(f"bytes between forward and backward, {named}", per_token, "bytes/token", **details)
    tell_rate(kit, base, f"rate, {named}", rank=opened.load.rank, tokens=stepped.tokens, seconds=seconds)


def _profile(kit: Kit, opened: Session, base: BaseModel, named: str) -> None:
    for _ in range(2):
        stepped = opened.step()
    kit.synchronize()
    started = time.perf_counter()
    stepped = opened.step()
    kit.synchronize()
    wall = time.perf_counter() - started
    details = {"ticks": stepped.ticks, "recomputed_ticks": stepped.recomputed}
    tell_rate(kit, base, f"rate, {named}", rank=opened.load.rank, tokens=stepped.tokens, seconds=wall, **details)
    kit.tell(f"FLOPs of adapters per token, {named}", lora_flops_per_token(base, opened.load.rank), "FLOP")
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if kit.on_gpu else [])]
    with profile(activities=activities, acc_events=True) as recorded:
        opened.step()
        kit.synchronize()
    _tell_profile(kit, recorded.key_averages(), base, named, wall)
    _tell_waits(kit, opened, named)


def _tell_profile(kit: Kit, events: Any, base: BaseModel, named: str, wall: float) -> None:
    layers = cast(Any, base.model.config).num_hidden_layers
    field = "self_device_time_total" if kit.on_gpu else "self_cpu_time_total"
    on_device = [event for event in events if not kit.on_gpu or event.device_type == DeviceType.CUDA]
    ranked = sorted(on_device, key=lambda event: -getattr(event, field))
    busy = sum(getattr(event, field) for event in on_device) / 1e6
    host = sum(event.self_cpu_time_total for event in events if event.key not in WAITS) / 1e6
    waits = sum(event.self_cpu_time_total for event in events if event.key in WAITS) / 1e6
    kit.tell(f"host's own time under the profiler, {named}", 1e3 * host, "ms", waiting_ms=1e3 * waits)
    for event in ranked[:TOP]:
        microseconds = getattr(event, field)
        share = microseconds / 1e6 / busy if busy else 0.0
        kit.tell(f"{event.key[:120]}, {named}", microseconds / 1e3, "ms", calls=event.count, share=share)
    if not kit.on_gpu:
        kit.tell_missing_gpu(f"launches and busy time of the device, {named}", "a CPU launches nothing")
        return
    launches = sum(event.count for event in events if event.key in LAUNCHES)
    kit.tell(f"launches, {named}", launches, "count", per_layer=launches / layers)
    kit.tell(f"device is busy, {named}", busy / wall, "fraction of the step", busy_ms=1e3 * busy, wall_ms=1e3 * wall)


def _tell_waits(kit: Kit, opened: Session, named: str) -> None:
    """Record where the host waits for the device in a step: the calls in this repository that cause it."""
    if not kit.on_gpu:
        kit.tell_missing_gpu(f"waits for the device, {named}", "a CPU waits for nothing")
        return
    places: Counter[str] = Counter()

    def count(message: Warning | str, *_: Any, **__: Any) -> None:
        if "synchroniz" not in str(message):
            return
        ours = [frame for frame in traceback.extract_stack() if str(ROOT / "lora_core") in str(frame.filename)]
        shown = (f"{frame.filename.removeprefix(str(ROOT) + '/')}:{frame.lineno}" for frame in ours[-3:])
        places[" > ".join(shown) or "outside lora_core"] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")  # which warns that it is a prototype
        warnings.showwarning = count
        try:
            stepped = opened.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    kit.tell(f"waits for the device, {named}", sum(places.values()), "count", ticks=stepped.ticks)
    for place, times in places.most_common():
        kit.tell(f"wait at {place}, {named}", times, "count")
