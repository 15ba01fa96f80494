"""Measures how busy this worker's device is: utilization, memory, temperature, power. It uses NVML for GPUs, and the
operating system for the CPU.

A separate thread measures, so that a driver that hangs delays no heartbeat.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from statistics import fmean
from typing import Any

import psutil

from worker.node import devices

log = logging.getLogger(__name__)
Use = dict[str, float]
"""utilization_ratio (0 to 1), memory_used_bytes, temperature_celsius, power_watts. Unknown values are omitted."""
JOINED: dict[str, Callable[[list[float]], float]] = {
    "utilization_ratio": fmean,
    "memory_used_bytes": sum,
    "temperature_celsius": max,
    "power_watts": sum,
}
STALE_INTERVALS = 3
"""After this many intervals, a measurement is no longer reported: the driver may hang."""
NVML_TEMPERATURE_GPU = 0


def measure(device: devices.Device) -> Use:
    """Measure the whole device, including its use by other processes. A CPU's utilization is that since the last call.
    Returns {} if nothing is known."""
    if device.kind == "cpu":
        memory = psutil.virtual_memory()
        busy = psutil.cpu_percent() / 100
        return {"utilization_ratio": busy, "memory_used_bytes": float(memory.total - memory.available)}
    try:
        nvml = devices.open_nvml()
    except devices.UnresponsiveGpu:
        return {}
    return {} if nvml is None else _combined([_of_gpu(nvml, index) for index in device.indices])


def _combined(each: list[Use]) -> Use:
    """Combine the values that all GPUs of a group report: mean utilization, highest temperature, sums of the rest."""
    known = [name for name in JOINED if all(name in use for use in each)]
    return {name: JOINED[name]([use[name] for use in each]) for name in known}


def _of_gpu(nvml: Any, index: int) -> Use:
    """Measure one GPU. Each value is queried separately, because consumer and virtual GPUs don't report all of them."""
    try:
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
    except nvml.NVMLError:
        return {}
    queries: dict[str, Callable[[], float]] = {
        "utilization_ratio": lambda: nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100,
        "memory_used_bytes": lambda: float(nvml.nvmlDeviceGetMemoryInfo(handle).used),
        "temperature_celsius": lambda: float(nvml.nvmlDeviceGetTemperature(handle, NVML_TEMPERATURE_GPU)),
        "power_watts": lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1000,
    }
    found: Use = {}
    for name, query in queries.items():
        try:
            found[name] = query()
        except nvml.NVMLError:
            continue
    return found


class DeviceWatch:
    """Measures periodically on its own thread. `latest` never waits."""

    def __init__(self, measure: Callable[[], Use], *, seconds: float) -> None:
        """measure: measures the device. seconds: the interval between two measurements."""
        self._measure = measure
        self._seconds = seconds
        self._last: tuple[float, Use] | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="device-watch", daemon=True)

    def latest(self) -> Use | None:
        """Return the last measurement. None if there is no recent one."""
        last = self._last
        if last is None or time.monotonic() - last[0] > STALE_INTERVALS * self._seconds:
            return None
        return last[1]

    def measure_once(self) -> None:
        """Measure once. Never raises, because a failed measurement must not fail a job."""
        try:
            self._last = (time.monotonic(), self._measure())
        except Exception:  # the next measurement may succeed, whatever the driver's error is
            log.exception("The device can't be measured")

    def _watch(self) -> None:
        self.measure_once()
        while not self._closed.wait(self._seconds):
            self.measure_once()

    @contextmanager
    def watching(self) -> Generator[None]:
        """Measure during the block. A thread that hangs is left behind: it is a daemon, and ends with the process."""
        self._thread.start()
        try:
            yield
        finally:
            self._closed.set()
            self._thread.join(1)
