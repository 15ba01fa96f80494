"""Every `wait` of the client polls until the object is final, and raises after its timeout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from lorry import Lorry, WaitTimeout
from lorry.resources import resource
from tests.lorry.scripted_server import Script

Wait = Callable[..., Any]
UNFINISHED: dict[str, tuple[str, dict[str, str], Callable[[Lorry], Wait]]] = {
    "job": ("fine_tuning/jobs/x", {"status": "running"}, lambda lorry: lorry.jobs.wait),
    "plan": ("plans/x", {"status": "computing"}, lambda lorry: lorry.plans.wait),
    "sweep": ("sweeps/x", {"status": "running"}, lambda lorry: lorry.sweeps.wait),
    "model": ("models/x", {"state": "importing"}, lambda lorry: lorry.models.wait),
    "export": (
        "adapters/a/exports/x",
        {"status": "running"},
        lambda lorry: lambda ident, **given: lorry.adapters.exports.wait("a", ident, **given),
    ),
}


class Clock:
    """A clock that only the client's sleeping advances."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.mark.parametrize("kind", UNFINISHED)
def test_every_wait_raises_after_its_timeout_and_names_the_object(
    service: Script, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    path, response, wait_of = UNFINISHED[kind]
    service.on("GET", f"/v1/{path}", response)
    clock = Clock()
    monkeypatch.setattr(resource, "time", clock)

    with Lorry(service.url, "lorry_key", sleep=clock.sleep) as lorry, pytest.raises(WaitTimeout) as expired:
        wait_of(lorry)("x", timeout_seconds=5, poll_seconds=2)

    assert (clock.now, len(service.seen)) == (106.0, 4)
    assert " x " in expired.value.message
    assert "within 5 s." in expired.value.message
    assert expired.value.remedy.startswith("Wait again")
