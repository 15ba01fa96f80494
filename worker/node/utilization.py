"""How busy this worker's device is: utilization, memory, temperature, power. By NVML for a GPU, by the operating system
for the CPU.

It is looked at on a thread of its own, for a driver that hangs must cost no heartbeat.
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
"""utilization_ratio (0 to 1), memory_used_bytes, temperature_celsius, power_watts; what isn't known is left out."""
JOINED: dict[str, Callable[[list[float]], float]] = {
    "utilization_ratio": fmean,
    "memory_used_bytes": sum,
    "temperature_celsius": max,
    "power_watts": sum,
}
STALE_LOOKS = 3
"""What was seen so many looks ago is told no more: the driver may hang."""
NVML_TEMPERATURE_GPU = 0


def measure(device: devices.Device) -> Use:
    """Of the whole device, whoever uses it; of a CPU since the last look. {} where nothing can be told."""
    if device.kind == "cpu":
        memory = psutil.virtual_memory()
        busy = psutil.cpu_percent() / 100
        return {"utilization_ratio": busy, "memory_used_bytes": float(memory.total - memory.available)}
    nvml = devices.open_nvml()
    return {} if nvml is None else _together([_of_gpu(nvml, index) for index in device.indices])


def _together(each: list[Use]) -> Use:
    """Of a group of GPUs what all of them tell: how busy they are on average, the hottest, and sums of the rest."""
    known = [name for name in JOINED if all(name in use for use in each)]
    return {name: JOINED[name]([use[name] for use in each]) for name in known}


def _of_gpu(nvml: Any, index: int) -> Use:
    """Each by itself: consumer cards and virtual ones don't tell everything."""
    try:
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
    except nvml.NVMLError:
        return {}
    asked: dict[str, Callable[[], float]] = {
        "utilization_ratio": lambda: nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100,
        "memory_used_bytes": lambda: float(nvml.nvmlDeviceGetMemoryInfo(handle).used),
        "temperature_celsius": lambda: float(nvml.nvmlDeviceGetTemperature(handle, NVML_TEMPERATURE_GPU)),
        "power_watts": lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1000,
    }
    found: Use = {}
    for name, ask in asked.items():
        try:
            found[name] = ask()
        except nvml.NVMLError:
            continue
    return found


class DeviceWatch:
    """Looks again and again; `latest` never waits."""

    def __init__(self, look: Callable[[], Use], *, seconds: float) -> None:
        """seconds: between two looks."""
        self._look = look
        self._seconds = seconds
        self._seen: tuple[float, Use] | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="device-watch", daemon=True)

    def latest(self) -> Use | None:
        """None where there was no look lately."""
        seen = self._seen
        if seen is None or time.monotonic() - seen[0] > STALE_LOOKS * self._seconds:
            return None
        return seen[1]

    def look_once(self) -> None:
        """It never raises: how busy a device is is worth nobody's job."""
        try:
            self._seen = (time.monotonic(), self._look())
        except Exception:  # whatever a driver meets, the next look may succeed
            log.exception("The device can't be looked at")

    def _watch(self) -> None:
        self.look_once()
        while not self._closed.wait(self._seconds):
            self.look_once()

    @contextmanager
    def watching(self) -> Generator[None]:
        """One that hangs is left behind: the thread doesn't outlive its process."""
        self._thread.start()
        try:
            yield
        finally:
            self._closed.set()
            self._thread.join(1)
