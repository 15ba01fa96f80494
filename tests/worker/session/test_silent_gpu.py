"""A node of whose GPU the driver tells nothing takes no job, so none fails there: its worker cordons it."""

from __future__ import annotations

import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from catalog.fleet import cordons
from catalog.states import JobState
from tests.worker.pack_site import PackSite
from tests.worker.session.test_blame import cordon_of
from worker import supervisor
from worker.gang.gang import gang_of
from worker.node import devices
from worker.session import watchdog

REASON = "For 5 minutes the driver has not reported the free memory of GPU 7 (GPU is lost)."


class DriverError(Exception):
    """As NVML's own."""


class Node:
    """A worker on GPU 7, which looks for jobs whenever the test says, by the test's clock."""

    def __init__(self, site: PackSite, monkeypatch: pytest.MonkeyPatch) -> None:
        self.site = site
        self.is_lost = True
        self._now = 1000.0
        site.context.scratch_dir().mkdir(parents=True, exist_ok=True)
        site.context.device = replace(devices.cpu(), kind="cuda", indices=(7,))
        told = {"nvmlDeviceGetHandleByIndex": lambda index: index, "nvmlDeviceGetMemoryInfo": self._memory_info}  # pyright: ignore[reportUnknownLambdaType]
        monkeypatch.setattr(devices, "open_nvml", lambda: SimpleNamespace(NVMLError=DriverError, **told))
        monkeypatch.setattr(time, "monotonic", lambda: self._now)

    def look(self, *, after: float = 0.0) -> dict[str, Any] | None:
        """How it is cordoned after a look for jobs."""
        self._now += after
        context = self.site.context
        capacity = supervisor.free_capacity(context)
        supervisor._claim(context, gang_of(context), "trainer-1", capacity=capacity)  # pyright: ignore[reportPrivateUsage]
        return cordon_of(self.site)

    def _memory_info(self, _: int) -> Any:
        if self.is_lost:
            raise DriverError("GPU is lost")
        return SimpleNamespace(free=0)


@pytest.fixture
def lost(site: PackSite, monkeypatch: pytest.MonkeyPatch) -> Node:
    return Node(site, monkeypatch)


def test_after_some_minutes_it_is_cordoned_with_what_the_driver_says(lost: Node) -> None:
    job = lost.site.queued()

    assert lost.look() is None
    assert lost.look(after=watchdog.SILENT_GPU_SECONDS - 1) is None
    cordon = lost.look(after=1)

    assert cordon is not None
    assert (cordon["by"], cordon["reason"]) == ("service", REASON)
    assert lost.site.world.job(job.id).state == JobState.QUEUED


def test_a_driver_that_tells_again_in_between_has_begun_anew(lost: Node) -> None:
    lost.look()
    lost.is_lost = False
    lost.look(after=watchdog.SILENT_GPU_SECONDS - 1)
    lost.is_lost = True

    assert lost.look(after=1) is None
    assert lost.look(after=watchdog.SILENT_GPU_SECONDS - 1) is None
    assert lost.look(after=1) is not None


def test_a_gpu_that_is_full_is_no_silent_one(lost: Node) -> None:
    lost.is_lost = False

    assert lost.look() is None
    assert lost.look(after=2 * watchdog.SILENT_GPU_SECONDS) is None


def test_who_uncordons_it_as_it_is_finds_it_cordoned_again_and_has_time_to_mend_it(lost: Node) -> None:
    lost.look()
    assert lost.look(after=watchdog.SILENT_GPU_SECONDS) is not None
    cordons.uncordon(lost.site.db, "w1")

    assert lost.look(after=1) is None
    assert lost.look(after=watchdog.SILENT_GPU_SECONDS) is not None


def test_where_nvml_is_gone_altogether_that_is_the_reason(lost: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "open_nvml", lambda: None)
    lost.look()

    cordon = lost.look(after=watchdog.SILENT_GPU_SECONDS)

    assert cordon is not None
    assert "GPU 7 (NVML can't be opened)" in cordon["reason"]
