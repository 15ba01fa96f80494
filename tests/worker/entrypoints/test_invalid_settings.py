"""The processes of workers print an invalid setting in one sentence."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from worker.context.context import UNFIT
from worker.entrypoints import loop, node_supervisor


@pytest.mark.parametrize("main", [lambda: loop.main(["--device", "cpu"]), lambda: node_supervisor.main([])])
def test_worker_with_an_invalid_setting_is_not_restarted(
    main: Callable[[], int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LORRY_LEASE_SECONDS", "soon")
    monkeypatch.setattr("worker.entrypoints.loop.deny_inspection", lambda: None)
    monkeypatch.setattr("worker.entrypoints.node_supervisor.deny_inspection", lambda: None)
    monkeypatch.setattr("worker.node.devices.pin_to", lambda _: None)

    with pytest.raises(SystemExit) as exited:
        main()

    assert exited.value.code == UNFIT
    assert "LORRY_LEASE_SECONDS is invalid. Input should be a valid number" in capsys.readouterr().err
