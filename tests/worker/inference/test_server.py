"""The HTTP server of a worker accepts only requests of API servers, which know its trainer's secret."""

from __future__ import annotations

import socket
from contextlib import suppress
from pathlib import Path

import pytest

from catalog.settings import Settings
from tests.worker.inference_requests import Asked
from tests.worker.pack_site import PackSite
from worker.inference import server
from worker.inference.server import InferenceServer
from worker.session.trainer_session import TrainerSession


def test_request_with_another_secret_is_refused(site: PackSite, session: TrainerSession) -> None:
    assert Asked(site, session.inference, secret="wrong").wait_until_accepted().status == 401
    assert session.inference.is_idle


def test_other_routes_do_not_exist(site: PackSite, session: TrainerSession) -> None:
    assert Asked(site, session.inference, "/v1/models").wait_until_accepted().status == 404


def two_ports() -> tuple[socket.socket, int]:
    """Return a socket that listens at a port whose successor is free."""
    while True:
        taken = socket.create_server(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        with suppress(OSError), socket.create_server(("127.0.0.1", port + 1)):
            return taken, port
        taken.close()


def test_workers_of_one_machine_use_consecutive_ports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "MAX_PORTS", 2)
    taken, port = two_ports()
    with taken:
        settings = Settings(data_dir=tmp_path, inference_address=f":{port}")
        worker = InferenceServer(settings)
        worker.start()
        with pytest.raises(SystemExit, match="LORRY_INFERENCE_ADDRESS"):
            InferenceServer(settings).start()
    worker.close()
    assert worker.address == f"127.0.0.1:{port + 1}"


def test_given_host_is_announced(tmp_path: Path) -> None:
    worker = InferenceServer(Settings(data_dir=tmp_path, inference_address="gpu-1.internal:0"))
    worker.start()
    worker.close()
    host, _, port = worker.address.rpartition(":")

    assert host == "gpu-1.internal"
    assert int(port) > 0
