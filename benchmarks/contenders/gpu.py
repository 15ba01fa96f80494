"""Measurements of the GPU kit, each in a process of its own: ceilings of the device, profile of a step, stalls.

Each answers one request with `results`: dictionaries with name, value and unit.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.autograd import DeviceType  # pyright: ignore[reportPrivateImportUsage]
from torch.profiler import ProfilerActivity
from torch.profiler import profile as profiler

from benchmarks.contenders.engine import engine_with_jobs, job_config, rows, step_of_all
from benchmarks.gate import Gate, Json, synchronize
from lora_core.engine.engine import Engine

LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx")
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpyAsync")
"""Calls in which the host waits for the device. A copy of pageable memory waits for the work before it."""
TOP = 25
"""Number of the longest kernels that a profile lists."""


def ceilings(gate: Gate, options: Json) -> None:
    """Rates of the device that nothing can exceed, and the time of a launch."""
    gate.wait()
    device, size, num_bytes = options["device"], options["matrix"], options["copy_bytes"]
    left, right = (torch.randn(size, size, device=device).to(torch.bfloat16) for _ in range(2))
    source, one = torch.zeros(num_bytes, dtype=torch.uint8, device=device), torch.zeros(1, device=device)
    target, on_host = torch.empty_like(source), torch.zeros(num_bytes, dtype=torch.uint8)
    flops = 2 * size**3 / _seconds(lambda: torch.matmul(left, right))
    results = [
        _result(f"bfloat16 matmul {size}³", flops / 1e12, "TFLOP/s"),
        _result("copy on the device", 2 * num_bytes / _seconds(lambda: target.copy_(source)) / 1e9, "GB/s"),
        _result("upload of pageable memory", num_bytes / _seconds(lambda: target.copy_(on_host)) / 1e9, "GB/s"),
        _result("launch of add_ on one element", 1e6 * _seconds(lambda: one.add_(1), calls=1000), "µs"),
        _result("read of one number by the host", 1e6 * _seconds(lambda: one.add_(1).item(), calls=100), "µs"),
    ]
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(device)
        free = torch.cuda.mem_get_info(device)[0]
        results.insert(0, _result("GPU", card.name, "text", memory_bytes=card.total_memory, free_bytes=free))
    gate.report(results=results, flops=flops)


def _seconds(call: Callable[[], object], *, calls: int = 20) -> float:
    """Return the median seconds of a call, in three series of calls that the device computes one after another."""
    series: list[float] = []
    for _ in range(4):  # the first is a warm-up
        synchronize()
        started = time.perf_counter()
        for _ in range(calls):
            call()
        synchronize()
        series.append((time.perf_counter() - started) / calls)
    return median(series[1:])


def profile(gate: Gate, options: Json) -> None:
    """Kernels, launches and waits of a step of all jobs, and the memory of its activations, kept or recomputed."""
    gate.wait()
    engine = engine_with_jobs(options)
    for _ in range(2):
        step_of_all(engine)
    started = time.perf_counter()
    step_of_all(engine)
    synchronize()
    seconds = time.perf_counter() - started
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    with profiler(activities=activities, acc_events=True) as recorded:
        step_of_all(engine)
        synchronize()
    results = _results_of_profile(recorded.key_averages(), seconds)
    if torch.cuda.is_available():
        for mode in ("never", "always"):
            engine.activations.mode = mode
            results.append(_memory(engine, f"activations, blocks recomputed: {mode}"))
    gate.report(results=results)


def _results_of_profile(events: Any, seconds: float) -> list[Json]:
    on_gpu = torch.cuda.is_available()
    field = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    on_device = [event for event in events if not on_gpu or event.device_type == DeviceType.CUDA]
    busy = sum(getattr(event, field) for event in on_device) / 1e6
    waiting = sum(event.self_cpu_time_total for event in events if event.key in WAITS) / 1e6
    launches = sum(event.count for event in events if event.key in LAUNCHES)
    kernels = sorted(on_device, key=lambda event: -getattr(event, field))[:TOP]
    return [
        _result("step", 1e3 * seconds, "ms", device_busy=busy / seconds, waiting_ms=1e3 * waiting, launches=launches),
        *(_result(event.key[:120], getattr(event, field) / 1e3, "ms", calls=event.count) for event in kernels),
    ]


def _memory(engine: Engine, name: str) -> Json:
    step_of_all(engine)
    synchronize()
    engine.activations.restart_peak()
    before = torch.cuda.memory_allocated()
    tokens = step_of_all(engine)["tokens"]
    synchronize()
    peak = engine.activations.peak_bytes()
    return _result(name, (peak - before) / tokens, "bytes/token", peak_bytes=peak, resident_bytes=before)


def stalls(gate: Gate, options: Json) -> None:
    """Operations between two ticks, which every job of an engine waits for. The second time of each is reported."""
    gate.wait()
    engine = engine_with_jobs(options)
    step_of_all(engine)
    with TemporaryDirectory() as name:
        for turn in (1, 2):
            results = [
                _result(what, 1e3 * _seconds_once(operation), "ms")
                for what, operation in _operations(engine, options, Path(name) / str(turn)).items()
            ]
    gate.report(results=results)


def _operations(engine: Engine, options: Json, folder: Path) -> dict[str, Callable[[], object]]:
    folder.mkdir()
    config = job_config(options)
    return {
        "admission": lambda: engine.admit("new", replace(config, seed=9), rows(options)),
        "checkpoint": lambda: engine.save_checkpoint("0", folder / "checkpoint"),
        "copies for a checkpoint": lambda: (
            engine.checkpoint_snapshot("0"),
            engine.adapter_snapshot("0", base_name="b"),
        ),
        "export": lambda: engine.export("0", folder / "export", base_name="b"),
        "departure": lambda: engine.evict("new"),
        "resumption": lambda: engine.admit("new", config, rows(options), resume_from=folder / "checkpoint"),
        "second departure": lambda: engine.evict("new"),
    }


def _seconds_once(operation: Callable[[], object]) -> float:
    synchronize()
    started = time.perf_counter()
    operation()
    synchronize()
    return time.perf_counter() - started


def _result(name: str, value: float | str, unit: str, **details: float) -> Json:
    return {"name": name, "value": value, "unit": unit, **details}
