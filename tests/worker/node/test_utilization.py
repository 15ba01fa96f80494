"""What is told of a device's use, and that a driver which hangs or fails costs no heartbeat."""

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
    """As NVML's own."""


def nvml(**replaced: Any) -> Any:
    """NVML of a GPU that is half busy."""

    def handle(index: int) -> int:
        assert index == 1
        return index

    def temperature(_handle: int, sensor: int) -> int:
        assert sensor == 0
        return 61

    told: dict[str, Any] = {
        "NVMLError": NVMLError,
        "nvmlDeviceGetHandleByIndex": handle,
        "nvmlDeviceGetUtilizationRates": lambda _: SimpleNamespace(gpu=50, memory=30),
        "nvmlDeviceGetMemoryInfo": lambda _: SimpleNamespace(used=7 * 2**30),
        "nvmlDeviceGetTemperature": temperature,
        "nvmlDeviceGetPowerUsage": lambda _: 312_500,
    }
    return SimpleNamespace(**{**told, **replaced})


def test_a_gpus_use_is_told_in_base_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "open_nvml", nvml)

    assert measure(GPU) == {
        "utilization_ratio": 0.5,
        "memory_used_bytes": 7 * 2**30,
        "temperature_celsius": 61,
        "power_watts": 312.5,
    }


def test_of_a_group_of_gpus_is_told_how_busy_they_are_on_average_the_hottest_and_what_they_take_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    group = devices.Device(kind="cuda", indices=(0, 3), name="2 x GPU", memory_bytes=160 * 2**30)
    of_each = {0: (20, 70, 100_000), 3: (80, 50, 300_000)}
    told = {
        "nvmlDeviceGetHandleByIndex": lambda index: index,
        "nvmlDeviceGetUtilizationRates": lambda index: SimpleNamespace(gpu=of_each[index][0]),
        "nvmlDeviceGetTemperature": lambda index, _sensor: of_each[index][1],
        "nvmlDeviceGetPowerUsage": lambda index: of_each[index][2],
    }
    monkeypatch.setattr(devices, "open_nvml", lambda: nvml(**told))

    assert measure(group) == {
        "utilization_ratio": 0.5,
        "memory_used_bytes": 14 * 2**30,
        "temperature_celsius": 70,
        "power_watts": 400,
    }


def test_what_a_card_does_not_tell_is_left_out_and_the_rest_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(_: Any) -> Any:
        raise NVMLError("Not Supported")

    monkeypatch.setattr(
        devices,
        "open_nvml",
        lambda: nvml(nvmlDeviceGetPowerUsage=unsupported, nvmlDeviceGetUtilizationRates=unsupported),
    )

    assert set(measure(GPU)) == {"memory_used_bytes", "temperature_celsius"}


def test_a_gpu_that_fell_off_the_bus_tells_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(_: int) -> Any:
        raise NVMLError("GPU is lost")

    monkeypatch.setattr(devices, "open_nvml", lambda: nvml(nvmlDeviceGetHandleByIndex=lost))

    assert measure(GPU) == {}


def test_a_cpus_use_is_a_part_of_one() -> None:
    told = measure(devices.cpu())

    assert 0 <= told["utilization_ratio"] <= 1
    assert 0 < told["memory_used_bytes"] < devices.cpu().memory_bytes


def test_a_look_that_hangs_keeps_nobody_waiting_and_one_that_fails_is_told_once_it_succeeds() -> None:
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

    def look() -> dict[str, float]:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    failing = DeviceWatch(look, seconds=60)
    failing.look_once()
    assert failing.latest() is None
    failing.look_once()
    assert failing.latest() == {"utilization_ratio": 0.25}


def test_what_was_seen_long_ago_is_told_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(utilization.time, "monotonic", lambda: now[0])
    watch = DeviceWatch(lambda: {"power_watts": 9.0}, seconds=10)
    watch.look_once()

    now[0] += 29
    assert watch.latest() == {"power_watts": 9.0}
    now[0] += 2
    assert watch.latest() is None


def test_the_use_goes_with_the_heartbeat_beside_what_the_trainer_said(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []

    def beat(_db: Any, _worker_id: str, **status: Any) -> WorkerOrders:
        told.append(status["report"])
        return WorkerOrders(drain=False)

    monkeypatch.setattr(workers, "worker_beat", beat)
    heartbeat = Heartbeat(None, "w1", lease_seconds=60, heartbeat_seconds=60)  # pyright: ignore[reportArgumentType]
    heartbeat.status["report"] = {"tokens_per_second": 5.0}

    heartbeat.beat()
    heartbeat.device_use = lambda: {"power_watts": 9.0}
    heartbeat.beat()

    assert told == [{"tokens_per_second": 5.0}, {"tokens_per_second": 5.0, "device": {"power_watts": 9.0}}]
    assert heartbeat.status["report"] == {"tokens_per_second": 5.0}, "what is told next is made anew"


def test_what_a_pack_is_reckoned_to_take_grows_with_each_job(site: PackSite) -> None:
    for _ in range(3):
        site.queued()
    first, *others = site.claim_all()
    session = site.session(first)
    alone = session.predicted_bytes()

    for claim in others:
        session.admit(claim)

    assert alone > 0
    assert session.predicted_bytes() > alone
    assert session.predicted_bytes() - session.bytes_to_come() == pytest.approx(alone, rel=1e-9)
