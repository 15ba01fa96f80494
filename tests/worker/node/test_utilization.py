"""Reports of device utilization. A driver that hangs or fails delays no heartbeat."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest

from catalog.fleet import workers
from catalog.fleet.workers import WorkerOrders
from tests.worker.pack_site import PackSite
from worker.context.heartbeat import Heartbeat
from worker.node import devices, utilization
from worker.node.utilization import DeviceWatch, measure

GPU = devices.Device(kind="cuda", indices=(1,), name="GPU", memory_bytes=80 * 2**30)


class NVMLError(Exception):
    """Replaces NVML's own error."""


def nvml(**replaced: Any) -> Any:
    """Return NVML of a GPU with a utilization of one half."""

    def handle(index: int) -> int:
        assert index == 1
        return index

    def temperature(_handle: int, sensor: int) -> int:
        assert sensor == 0
        return 61

    functions: dict[str, Any] = {
        "NVMLError": NVMLError,
        "nvmlDeviceGetHandleByIndex": handle,
        "nvmlDeviceGetUtilizationRates": lambda _: SimpleNamespace(gpu=50, memory=30),
        "nvmlDeviceGetMemoryInfo": lambda _: SimpleNamespace(used=7 * 2**30),
        "nvmlDeviceGetTemperature": temperature,
        "nvmlDeviceGetPowerUsage": lambda _: 312_500,
    }
    return SimpleNamespace(**{**functions, **replaced})


def test_gpu_utilization_is_reported_in_base_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "open_nvml", nvml)

    assert measure(GPU) == {
        "utilization_ratio": 0.5,
        "memory_used_bytes": 7 * 2**30,
        "temperature_celsius": 61,
        "power_watts": 312.5,
    }


def test_a_gpu_group_reports_mean_utilization_top_temperature_and_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    group = devices.Device(kind="cuda", indices=(0, 3), name="2 x GPU", memory_bytes=160 * 2**30)
    of_each = {0: (20, 70, 100_000), 3: (80, 50, 300_000)}
    functions = {
        "nvmlDeviceGetHandleByIndex": lambda index: index,
        "nvmlDeviceGetUtilizationRates": lambda index: SimpleNamespace(gpu=of_each[index][0]),
        "nvmlDeviceGetTemperature": lambda index, _sensor: of_each[index][1],
        "nvmlDeviceGetPowerUsage": lambda index: of_each[index][2],
    }
    monkeypatch.setattr(devices, "open_nvml", lambda: nvml(**functions))

    assert measure(group) == {
        "utilization_ratio": 0.5,
        "memory_used_bytes": 14 * 2**30,
        "temperature_celsius": 70,
        "power_watts": 400,
    }


def test_values_that_a_gpu_does_not_support_are_omitted(monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(_: Any) -> Any:
        raise NVMLError("Not Supported")

    monkeypatch.setattr(
        devices,
        "open_nvml",
        lambda: nvml(nvmlDeviceGetPowerUsage=unsupported, nvmlDeviceGetUtilizationRates=unsupported),
    )

    assert set(measure(GPU)) == {"memory_used_bytes", "temperature_celsius"}


def test_a_lost_gpu_reports_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(_: int) -> Any:
        raise NVMLError("GPU is lost")

    monkeypatch.setattr(devices, "open_nvml", lambda: nvml(nvmlDeviceGetHandleByIndex=lost))

    assert measure(GPU) == {}


def test_cpu_utilization_is_a_ratio() -> None:
    reported = measure(devices.cpu())

    assert 0 <= reported["utilization_ratio"] <= 1
    assert 0 < reported["memory_used_bytes"] < devices.cpu().memory_bytes


def test_a_hanging_measurement_does_not_block_and_a_failed_one_is_repeated() -> None:
    hung, seen = threading.Event(), threading.Event()

    def hang() -> dict[str, float]:
        seen.set()
        hung.wait(30)
        return {}

    hanging = DeviceWatch(hang, seconds=60)
    with hanging.watching():
        assert seen.wait(20)
        assert hanging.latest() is None
        hung.set()

    answers: list[Any] = [RuntimeError("odd"), {"utilization_ratio": 0.25}]

    def sample() -> dict[str, float]:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    failing = DeviceWatch(sample, seconds=60)
    failing.measure_once()
    assert failing.latest() is None
    failing.measure_once()
    assert failing.latest() == {"utilization_ratio": 0.25}


def test_an_outdated_measurement_is_not_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(utilization.time, "monotonic", lambda: now[0])
    watch = DeviceWatch(lambda: {"power_watts": 9.0}, seconds=10)
    watch.measure_once()

    now[0] += 29
    assert watch.latest() == {"power_watts": 9.0}
    now[0] += 2
    assert watch.latest() is None


def test_utilization_is_added_to_the_heartbeats_report(monkeypatch: pytest.MonkeyPatch) -> None:
    reported: list[Any] = []

    def beat(_db: Any, _worker_id: str, **status: Any) -> WorkerOrders:
        reported.append(status["report"])
        return WorkerOrders(drain=False)

    monkeypatch.setattr(workers, "worker_beat", beat)
    heartbeat = Heartbeat(None, "w1", lease_seconds=60, heartbeat_seconds=60)  # pyright: ignore[reportArgumentType]
    heartbeat.status["report"] = {"tokens_per_second": 5.0}

    heartbeat.beat()
    heartbeat.device_use = lambda: {"power_watts": 9.0}
    heartbeat.beat()

    assert reported == [{"tokens_per_second": 5.0}, {"tokens_per_second": 5.0, "device": {"power_watts": 9.0}}]
    assert heartbeat.status["report"] == {"tokens_per_second": 5.0}, "each report is built from scratch"


def test_the_predicted_memory_of_a_pack_grows_with_each_job(site: PackSite) -> None:
    for _ in range(3):
        site.queued()
    first, *others = site.claim_all()
    session = site.session(first)
    alone = session.memory.predicted()

    for claim in others:
        session.admit(claim)

    assert alone > 0
    assert session.memory.predicted() > alone
    assert session.memory.predicted() - session.memory.to_come() == pytest.approx(alone, rel=1e-9)
