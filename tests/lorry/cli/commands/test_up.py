"""`lorry up` with the real API server and the real worker."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from lorry import Lorry, connection
from tests.lorry.local.test_local import is_alive, until
from tests.services.running import free_port

pytestmark = pytest.mark.usefixtures("module_database")
UP = [sys.executable, "-P", "-m", "lorry", "up", "--devices", "cpu", "--json"]


@contextmanager
def up(data_dir: Path, *arguments: str, **environ: str) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """A running service and its announcement; killed at the end if it is still running."""
    argv = [*UP, "--data-dir", str(data_dir), *arguments]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environ}
    with (data_dir.parent / "stderr.txt").open("a") as errors:
        process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=errors, text=True, env=env)
    with process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line, (data_dir.parent / "stderr.txt").read_text()
            yield process, json.loads(line)
        finally:
            process.kill()


def children_of(pid: int) -> dict[str, int]:
    """The running children of a process, by the module that they run."""
    found: dict[str, int] = {}
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        with suppress(FileNotFoundError, ProcessLookupError):  # it has ended
            command = Path(f"/proc/{child}/cmdline").read_text().split("\0")
            if "-m" in command:
                found[command[command.index("-m") + 1]] = int(child)
    return found


def started_children(pid: int) -> dict[str, int]:
    until(lambda: children_of(pid).keys() == {"api", "worker.entrypoints.loop"})
    return children_of(pid)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data folder of all tests of this module. They run in the order in which a user would act."""
    return tmp_path_factory.mktemp("up") / "data"


def test_first_start_creates_everything_and_a_client_connects(data_dir: Path) -> None:
    with up(data_dir) as (process, printed):
        children = started_children(process.pid)
        path = data_dir / connection.FILE_NAME

        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(data_dir.stat().st_mode) == 0o700
        database = data_dir / "lorry.db"
        assert not database.exists() or not stat.S_IMODE(database.stat().st_mode) & 0o077
        assert printed["url"] == json.loads(path.read_text())["url"]
        with Lorry(data_dir=data_dir) as lorry:
            until(lambda: list(lorry.workers.list()))
            assert list(lorry.models.list()) == []
        _check_sign_in(printed["sign_in_url"])
        _check_second_is_refused(data_dir, process.pid)

        process.terminate()
        assert process.wait(60) == 0
        assert not any(is_alive(pid) for pid in children.values())


def test_later_start_keeps_the_key_and_stores_the_new_address(data_dir: Path) -> None:
    before = connection.read(data_dir)
    assert before is not None
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]

    with up(data_dir, "--port", str(port)) as (process, printed):
        assert connection.read(data_dir) == replace(before, url=f"http://127.0.0.1:{port}")
        assert printed["url"] == f"http://127.0.0.1:{port}"

        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0


def test_killed_worker_is_restarted_and_children_exit_with_a_killed_parent(data_dir: Path) -> None:
    with up(data_dir) as (process, _):
        first = started_children(process.pid)
        os.kill(first["worker.entrypoints.loop"], signal.SIGKILL)
        until(
            lambda: (
                children_of(process.pid).get("worker.entrypoints.loop", first["worker.entrypoints.loop"])
                != first["worker.entrypoints.loop"]
            )
        )
        now = started_children(process.pid)
        assert now["api"] == first["api"]

        process.kill()
        until(lambda: not any(is_alive(pid) for pid in now.values()))


def test_killed_api_server_stops_the_service_and_its_log_is_printed(data_dir: Path) -> None:
    with up(data_dir) as (process, _):
        children = started_children(process.pid)
        os.kill(children["api"], signal.SIGKILL)

        assert process.wait(60) == 1
        assert not is_alive(children["worker.entrypoints.loop"])
    assert "The API server ended (exit status -9). Its log ends with:" in (data_dir.parent / "stderr.txt").read_text()


@pytest.mark.slow
def test_lost_connection_file_is_replaced_with_a_new_valid_key(data_dir: Path) -> None:
    with up(data_dir) as (process, _):
        process.terminate()
        assert process.wait(60) == 0
    (data_dir / connection.FILE_NAME).unlink()

    with up(data_dir) as (process, printed):
        _check_sign_in(printed["sign_in_url"])
        with Lorry(data_dir=data_dir) as lorry:
            assert list(lorry.jobs.list()) == []
        assert "had no API key. A new key was created" in (data_dir.parent / "stderr.txt").read_text()
        process.terminate()
        assert process.wait(60) == 0


@pytest.mark.slow
@pytest.mark.usefixtures("service_database")
def test_first_start_interrupted_before_storing_its_key_is_repaired(tmp_path: Path) -> None:
    data_dir = tmp_path / "data"
    data_dir.mkdir()
    env = {**os.environ, "LORRY_DATA_DIR": str(data_dir)}
    subprocess.run([sys.executable, "-P", "-m", "api", "bootstrap"], env=env, check=True, capture_output=True)

    with up(data_dir) as (process, _), Lorry(data_dir=data_dir) as lorry:
        assert list(lorry.jobs.list()) == []
        process.terminate()
        assert process.wait(60) == 0


def test_detached_service_runs_until_lorry_down(data_dir: Path) -> None:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "LORRY_DATA_DIR": str(data_dir)}

    def lorry(*arguments: str) -> subprocess.CompletedProcess[str]:
        argv = [sys.executable, "-P", "-m", "lorry", *arguments]
        return subprocess.run(argv, capture_output=True, text=True, check=False, timeout=200, env=env)

    started = lorry("up", "--detach", "--devices", "cpu")
    try:
        status = json.loads(lorry("status", "--json").stdout)
        refused = lorry("up", "--detach", "--devices", "cpu")
    finally:
        stopped = lorry("down", "--json")

    assert started.returncode == 0, started.stderr
    assert "Next: lorry models add smollm2" in started.stdout
    assert started.stdout.endswith("Stop the service with: lorry down\n")
    assert (refused.returncode, "Lorry is already running in the data folder" in refused.stderr) == (1, True)
    assert json.loads(stopped.stdout)["stopped_pid"] == status["data_dir_pid"]
    until(lambda: not is_alive(status["data_dir_pid"]))
    log = (data_dir / "logs" / "up.log").read_text()
    assert "Stopping" in log
    assert "sign-in" not in log


def test_port_in_use_has_a_clear_error(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        argv = [*UP, "--data-dir", str(tmp_path / "d"), "--port", str(taken.getsockname()[1])]
        done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=250)

    assert done.returncode == 1
    assert "is already in use" in done.stderr
    assert "Traceback" not in done.stderr


WITH_PORT_CONFLICT = """
import socket, sys, threading
from lorry.cli.main import main
from lorry.local import service

request_log, port = sys.argv.pop(1), int(sys.argv.pop(1))

def take_port():
    listening = socket.create_server(("127.0.0.1", port))
    def answer():
        while True:
            client, _ = listening.accept()
            with client:
                open(request_log, "ab").write(client.recv(65536))
                client.sendall(b"HTTP/1.1 200 OK\\r\\ncontent-length: 2\\r\\nconnection: close\\r\\n\\r\\n{}")
    threading.Thread(target=answer, daemon=True).start()

def bootstrap(self, real=service.LocalService.bootstrap):
    try:
        take_port()
    except OSError as error:
        open(request_log, "ab").write(f"not taken: {error.strerror}".encode())
    return real(self)

service.LocalService.bootstrap = bootstrap
main()
"""
"""Runs `lorry up`, and tries to listen on the same port before the service is bootstrapped."""


@pytest.mark.usefixtures("service_database")
def test_no_other_process_can_take_the_port_while_the_service_starts(tmp_path: Path) -> None:
    port, requests, data_dir = free_port(), tmp_path / "requests", tmp_path / "data"
    up_arguments = [*UP[4:], "--data-dir", str(data_dir), "--port", str(port)]
    argv = [sys.executable, "-P", "-c", WITH_PORT_CONFLICT, str(requests), str(port), *up_arguments]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}

    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        process.terminate()
        _, errors = process.communicate(timeout=250)

    assert "authorization" not in requests.read_text().lower()
    assert requests.read_text().startswith("not taken: Address already in use")
    assert line, errors
    assert json.loads(line)["url"] == f"http://127.0.0.1:{port}"


def test_impossible_data_folder_has_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    done = subprocess.run(
        [*UP, "--data-dir", str(tmp_path / "file" / "d")], capture_output=True, text=True, check=False
    )

    assert done.returncode == 1
    assert done.stderr.startswith("Error: Not a directory")


def _check_sign_in(url: str) -> None:
    """Check that the sign-in page exists and that its link signs in only once."""
    address, _, token = url.partition("/dashboard/#/sign-in/")
    headers = {"x-lorry-csrf": "1", "origin": address}
    assert httpx.get(url, trust_env=False).status_code == 200

    first, second = (
        httpx.post(f"{address}/v1/sign_in_links/open", json={"token": token}, headers=headers, trust_env=False)
        for _ in range(2)
    )

    assert first.status_code == 200
    assert "lorry_session" in first.headers["set-cookie"]
    assert second.status_code == 401
    assert "set-cookie" not in second.headers


def _check_second_is_refused(data_dir: Path, holder: int) -> None:
    done = subprocess.run([*UP, "--data-dir", str(data_dir)], capture_output=True, text=True, check=False, timeout=250)

    assert done.returncode == 1
    assert f"Lorry is already running in the data folder {data_dir} (process {holder})." in done.stderr
