"""A worker whose driver does not report the GPU's memory takes no job. It cordons itself."""

from __future__ import annotations

import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from catalog.fleet import cordons
from catalog.states import JobState
from tests.worker.pack_site import PackSite
from tests.worker.session.test_failure_attribution import cordon_of
from worker import next_work
from worker.gang.gang import gang_of
from worker.node import devices
from worker.session import watchdog

REASON = "For 5 minutes the driver has not reported the free memory of GPU 7 (GPU is lost)."


class DriverError(Exception):
    """Replaces NVML's own error."""


class Node:
    """A worker on GPU 7 with the clock of the test. It polls when the test calls `poll`."""

    def __init__(self, site: PackSite, monkeypatch: pytest.MonkeyPatch) -> None:
        self.site = site
        self.is_lost = True
        self._now = 1000.0
        site.context.scratch_dir().mkdir(parents=True, exist_ok=True)
        site.context.device = replace(devices.cpu(), kind="cuda", indices=(7,))
        functions = {"nvmlDeviceGetHandleByIndex": lambda index: index, "nvmlDeviceGetMemoryInfo": self._memory_info}  # pyright: ignore[reportUnknownLambdaType]
        monkeypatch.setattr(devices, "open_nvml", lambda: SimpleNamespace(NVMLError=DriverError, **functions))
        monkeypatch.setattr(time, "monotonic", lambda: self._now)

    def poll(self, *, after: float = 0.0) -> dict[str, Any] | None:
        """Poll for jobs, and return the cordon of the worker."""
        self._now += after
        context = self.site.context
        capacity = next_work.free_capacity(context)
        next_work._claim(context, gang_of(context), "trainer-1", capacity=capacity)  # pyright: ignore[reportPrivateUsage]
        return cordon_of(self.site)

    def _memory_info(self, _: int) -> Any:
        if self.is_lost:
            raise DriverError("GPU is lost")
        return SimpleNamespace(free=0)


@pytest.fixture
def lost(site: PackSite, monkeypatch: pytest.MonkeyPatch) -> Node:
    return Node(site, monkeypatch)


def test_after_some_minutes_the_worker_is_cordoned_with_the_drivers_error(lost: Node) -> None:
    job = lost.site.queued()

    assert lost.poll() is None
    assert lost.poll(after=watchdog.SILENT_GPU_SECONDS - 1) is None
    cordon = lost.poll(after=1)

    assert cordon is not None
    assert (cordon["by"], cordon["reason"]) == ("service", REASON)
    assert lost.site.world.job(job.id).state == JobState.QUEUED


def test_a_report_of_the_driver_in_between_restarts_the_period(lost: Node) -> None:
    lost.poll()
    lost.is_lost = False
    lost.poll(after=watchdog.SILENT_GPU_SECONDS - 1)
    lost.is_lost = True

    assert lost.poll(after=1) is None
    assert lost.poll(after=watchdog.SILENT_GPU_SECONDS - 1) is None
    assert lost.poll(after=1) is not None


def test_a_full_gpu_is_not_a_silent_one(lost: Node) -> None:
    lost.is_lost = False

    assert lost.poll() is None
    assert lost.poll(after=2 * watchdog.SILENT_GPU_SECONDS) is None


def test_an_uncordoned_worker_is_cordoned_again_after_the_same_period(lost: Node) -> None:
    lost.poll()
    assert lost.poll(after=watchdog.SILENT_GPU_SECONDS) is not None
    cordons.uncordon(lost.site.db, "w1")

    assert lost.poll(after=1) is None
    assert lost.poll(after=watchdog.SILENT_GPU_SECONDS) is not None


def test_a_missing_nvml_is_named_as_the_reason(lost: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "open_nvml", lambda: None)
    lost.poll()

    cordon = lost.poll(after=watchdog.SILENT_GPU_SECONDS)

    assert cordon is not None
    assert "GPU 7 (NVML can't be opened)" in cordon["reason"]
