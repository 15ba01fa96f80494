"""The parts of `lorry up`: the lock, the port, the devices, and children that die with their parent."""

from __future__ import annotations

import errno
import os
import signal
import socket
import sqlite3
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from lorry import __version__
from lorry.errors import LorryError
from lorry.local import child, devices, ports, privacy, service
from lorry.local.child import Child
from lorry.local.lock import DataLock
from tests.next_migration import UNRELEASED
from tests.services.running import free_port


def until(condition: Callable[[], object], seconds: float = 60) -> None:
    """Wait for a condition outside this process."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not become true in time"
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize("content", [None, "lorry.db"])
def test_data_directory_accessible_to_others_is_made_private(tmp_path: Path, content: str | None) -> None:
    tmp_path.chmod(0o755)
    if content is not None:
        (tmp_path / content).touch()

    first, again = privacy.make_private(tmp_path), privacy.make_private(tmp_path)

    assert "mode 755" in str(first)
    assert again is None
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o700


@pytest.mark.parametrize(("mode", "content"), [(0o1777, "lorry.db"), (0o755, "photos")])
def test_shared_directory_is_reported_and_stays_unchanged(tmp_path: Path, mode: int, content: str) -> None:
    tmp_path.chmod(mode)
    (tmp_path / content).touch()

    assert f"chmod go-rwx {tmp_path}" in str(privacy.make_private(tmp_path))

    assert stat.S_IMODE(tmp_path.stat().st_mode) == mode


def test_lock_has_one_holder_which_the_error_names(tmp_path: Path) -> None:
    with (
        DataLock(tmp_path),
        pytest.raises(LorryError, match=rf"already running .*process {os.getpid()}") as refused,
        DataLock(tmp_path),
    ):
        pass
    assert f"`lorry down --data-dir {tmp_path}`" in refused.value.remedy

    with DataLock(tmp_path):
        pass


def test_lock_dies_with_its_holder_and_is_not_inherited(tmp_path: Path) -> None:
    code = (
        "import sys, subprocess; from pathlib import Path; from lorry.local.lock import DataLock\n"
        "with DataLock(Path(sys.argv[1])):\n"
        "    inner = subprocess.Popen(['sleep', '60']); print(inner.pid, flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with holder:
        assert holder.stdout is not None
        inner = int(holder.stdout.readline())
        with pytest.raises(LorryError, match=f"process {holder.pid}"), DataLock(tmp_path):
            pass
        holder.kill()
        holder.wait()

    with DataLock(tmp_path):
        os.kill(inner, signal.SIGKILL)


def test_requested_port_in_use_fails_and_default_uses_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        number = taken.getsockname()[1]
        monkeypatch.setattr(ports, "DEFAULT_PORT", number)

        with pytest.raises(LorryError, match=f"Port {number} on 127.0.0.1 is already in use") as refused:
            ports.listen("127.0.0.1", number)
        assert "--port" in refused.value.remedy
        with ports.listen("127.0.0.1", None) as listener:
            assert number < listener.getsockname()[1] < number + 50


def test_chosen_port_cannot_be_taken_by_another_process() -> None:
    with ports.listen("127.0.0.1", free_port()) as listener, socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)

        with pytest.raises(OSError, match="in use"):
            other.bind(listener.getsockname())


def test_change_of_the_default_port_is_reported() -> None:
    at = cast("Any", lambda port: SimpleNamespace(getsockname=lambda: ("127.0.0.1", port)))

    assert ports.moved(at(8473), None) == (
        "Port 8472 is in use by another program, perhaps another Lorry. Using port 8473 instead."
    )
    assert ports.moved(at(8472), None) is ports.moved(at(9000), 9000) is None


@pytest.mark.parametrize("host", ["192.0.2.1", "no.such.host.invalid"])
def test_host_of_another_machine_is_a_clear_error(host: str) -> None:
    with pytest.raises(LorryError, match="Can't listen") as refused:
        ports.listen(host, None)
    assert "--host" in refused.value.remedy


def test_port_that_needs_root_has_its_own_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(ports.socket.socket, "bind", refuse)

    with pytest.raises(LorryError, match="port 80: Permission denied") as refused:
        ports.listen("127.0.0.1", 80)
    assert refused.value.remedy == "Choose a port above 1023 with --port, or run the command as root."


@pytest.mark.parametrize(
    ("host", "bound", "url"),
    [
        ("127.0.0.1", "127.0.0.1", "http://127.0.0.1:1"),
        ("0.0.0.0", "0.0.0.0", "http://127.0.0.1:1"),
        ("::", "::", "http://[::1]:1"),
        ("localhost", "127.0.0.1", "http://127.0.0.1:1"),
        ("localhost", "::1", "http://[::1]:1"),
        ("lorry.example", "192.0.2.1", "http://lorry.example:1"),
    ],
)
def test_url_reaches_exactly_this_socket_from_the_same_machine(host: str, bound: str, url: str) -> None:
    listener = cast("Any", SimpleNamespace(getsockname=lambda: (bound, 1)))

    assert ports.url(host, listener) == url


@pytest.mark.parametrize("wanted", ["cpu", "CPU", " cpu "])
def test_cpu_is_one_device(wanted: str) -> None:
    assert devices.choose(wanted) == ["cpu"]


def install_nvidia_smi(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    tool = folder / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)


def test_gpus_are_named_by_their_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_nvidia_smi(tmp_path, monkeypatch, r"printf '0\n1\n10\n'")

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    assert devices.choose("0, 01,10") == ["0", "1", "10"]


@pytest.mark.parametrize(
    ("script", "reason", "remedy"),
    [
        (r"printf '0\n1\n'", "This machine has no GPU 2, 3 .available: 0, 1.", "Use numbers of available GPUs"),
        ("exit 9", "This machine has no GPU 1, 2, 3 .available: none.", "Use `--devices cpu`."),
    ],
)
def test_gpus_that_the_machine_lacks_are_refused_before_a_worker_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, reason: str, remedy: str
) -> None:
    install_nvidia_smi(tmp_path, monkeypatch, script)
    monkeypatch.setattr(devices, "DRIVER", tmp_path / "no-driver")
    monkeypatch.setattr(devices, "DEVICE_FILES", ())
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    with pytest.raises(LorryError, match=reason) as refused:
        devices.choose("1,2,03")

    assert remedy in str(refused.value.remedy)


def test_hidden_gpus_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_nvidia_smi(tmp_path, monkeypatch, r"printf '0\n1\n2\n'")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1, 2")

    assert devices.choose("2") == ["2"]
    with pytest.raises(LorryError, match=r"no GPU 0 \(available: 1, 2\)"):
        devices.choose("0")


@pytest.mark.parametrize("has_tool", [True, False])
def test_gpus_that_nvidia_smi_does_not_list_are_left_to_the_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_tool: bool
) -> None:
    """The remedy of the error about the list is to name the GPUs."""
    (tmp_path / "driver").touch()
    monkeypatch.setattr(devices, "DRIVER", tmp_path / "driver")
    monkeypatch.setattr(devices, "DEVICE_FILES", (tmp_path / "driver",))
    if has_tool:
        install_nvidia_smi(tmp_path, monkeypatch, "echo 'GPU 3 is lost'; exit 15")
    else:
        monkeypatch.setenv("PATH", str(tmp_path))

    assert devices.choose("0,1") == ["0", "1"]


@pytest.mark.parametrize(
    ("wanted", "reason"),
    [
        ("", "'' is not a GPU number"),
        ("gpu", "'gpu' is not a GPU number"),
        ("0,cpu", "'cpu' is not a GPU number"),
        ("0,0", "GPU 0 is listed more than once"),
        ("0,00", "GPU 0 is listed more than once"),
        ("\u0660", "'\u0660' is not a GPU number"),
        ("-1", "'-1' is not a GPU number"),
        ("0;1", "'0;1' is not a GPU number"),
        ("0,", "'' is not a GPU number"),
    ],
)
def test_invalid_device_list_is_rejected(wanted: str, reason: str) -> None:
    with pytest.raises(LorryError, match=f"must be 'cpu' or a list of different GPU numbers: {reason}"):
        devices.choose(wanted)


@pytest.mark.parametrize(("visible", "chosen"), [(None, ["0", "1"]), ("1", ["1"]), ("", ["cpu"])])
def test_every_visible_gpu_is_used_by_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, visible: str | None, chosen: list[str]
) -> None:
    install_nvidia_smi(tmp_path, monkeypatch, r"printf '0\n1\n'")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)

    assert devices.choose(None) == chosen


@pytest.mark.parametrize("has_driver", [True, False])
def test_gpus_whose_driver_fails_are_not_replaced_by_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_driver: bool
) -> None:
    driver = tmp_path / "driver"
    install_nvidia_smi(tmp_path, monkeypatch, "echo 'GPU 3 is lost'; exit 15")
    monkeypatch.setattr(devices, "DRIVER", driver)
    if not has_driver:
        assert devices.choose(None) == ["cpu"]
        return
    driver.touch()

    with pytest.raises(LorryError, match="does not list the GPUs of this machine: GPU 3 is lost"):
        devices.choose(None)


def make(tmp_path: Path, code: str, *, kills_group: bool = False) -> Child:
    argv = [sys.executable, "-c", code]
    log = tmp_path / "thing.log"
    return Child("thing", argv, env=dict(os.environ), cwd=tmp_path, log=log, kills_group=kills_group)


def test_child_writes_its_log_and_reports_its_exit_status(tmp_path: Path) -> None:
    thing = make(tmp_path, "import sys; print('out', flush=True); print('err', file=sys.stderr); sys.exit(3)")

    thing.start()
    until(lambda: not thing.is_alive())

    assert thing.exit_status() == 3
    assert thing.log_tail() == "out\nerr"


def test_log_tail_begins_at_the_last_start(tmp_path: Path) -> None:
    (tmp_path / "thing.log").write_text("printed before\n")
    thing = make(tmp_path, "print('now')")

    for _ in range(2):
        thing.start()
        thing.wait()

        assert thing.log_tail() == "now"


def test_child_without_a_log_inherits_the_output_of_its_parent(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code = "import sys; print('out'); print('err', file=sys.stderr)"
    thing = Child("thing", [sys.executable, "-c", code], env=dict(os.environ), cwd=tmp_path)

    thing.start()
    thing.wait()

    assert capfd.readouterr() == ("out\n", "err\n")
    assert thing.log_tail() == ""


def test_killing_a_child_kills_its_descendants(tmp_path: Path) -> None:
    code = "import subprocess; p = subprocess.Popen(['sleep', '60']); print(p.pid, flush=True); p.wait()"
    thing = make(tmp_path, code)
    thing.start()
    until(thing.log_tail)

    thing.kill()
    thing.wait()

    until(lambda: not is_alive(int(thing.log_tail())))
    assert not thing.is_alive()


def test_child_dies_when_its_parent_is_killed(tmp_path: Path) -> None:
    code = (
        "import os, sys, time; from pathlib import Path; from lorry.local.child import Child\n"
        "argv = [sys.executable, '-c', 'import time; time.sleep(60)']\n"
        "c = Child('c', argv, env=dict(os.environ), cwd=Path(sys.argv[1]), log=Path(sys.argv[1]) / 'log')\n"
        "c.start(); print(c.pid, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    with parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert is_alive(pid)
        parent.kill()

    until(lambda: not is_alive(pid))


WITH_HELPER = (
    "import subprocess, sys, time; p = subprocess.Popen(['sleep', '60']); print(p.pid, flush=True); time.sleep({})"
)
"""A program with a child that does not watch it."""


def test_group_ends_with_its_program(tmp_path: Path) -> None:
    thing = make(tmp_path, WITH_HELPER.format(0.1), kills_group=True)

    thing.start()
    thing.wait()

    helper, *_, last = thing.log_tail().splitlines()
    until(lambda: not is_alive(int(helper)))
    assert last == "The process ended with status 0."


def test_sigterm_reaches_the_program_of_a_group(tmp_path: Path) -> None:
    thing = make(tmp_path, WITH_HELPER.format(60), kills_group=True)
    thing.start()
    until(thing.log_tail)

    thing.terminate()
    thing.wait()

    assert thing.log_tail().splitlines()[-1] == "The process ended with status -15."


def test_group_dies_when_its_parent_is_killed(tmp_path: Path) -> None:
    code = (
        "import os, sys, time; from pathlib import Path; from lorry.local.child import Child\n"
        f"argv = [sys.executable, '-c', {WITH_HELPER.format(60)!r}]\n"
        "at = Path(sys.argv[1]); c = Child('c', argv, env=dict(os.environ), cwd=at, log=at / 'log', kills_group=True)\n"
        "c.start(); print(c.pid, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    with parent:
        assert parent.stdout is not None
        pid, log = int(parent.stdout.readline()), tmp_path / "log"
        until(lambda: log.exists() and log.read_text().endswith("\n"))
        parent.kill()

    until(lambda: not is_alive(pid) and not is_alive(int(log.read_text())))


def test_long_log_is_rotated_and_one_old_log_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "_LONGEST_LOG_BYTES", 10)
    log = tmp_path / "x.log"
    log.write_text("more than ten bytes")

    child.keep_short(log)
    child.keep_short(log)

    assert [p.name for p in tmp_path.iterdir()] == ["x.log.1"]


@pytest.mark.parametrize("missing", [["lorry-server", "torch"], ["torch", "peft"]])
def test_environment_without_the_server_or_its_libraries_gets_the_install_command(
    monkeypatch: pytest.MonkeyPatch, missing: list[str]
) -> None:
    def distribution(name: str) -> object:
        if name in missing:
            raise PackageNotFoundError(name)
        return object()

    monkeypatch.setattr(service, "distribution", distribution)

    with pytest.raises(LorryError, match=f"needs: {', '.join(missing)}") as refused:
        service.check_installed()

    assert refused.value.code == "not_installed"
    assert refused.value.remedy is not None
    assert f'`{sys.executable} -m pip install "lorry-server[worker]=={__version__}"`' in refused.value.remedy


def test_ctrl_c_does_not_reach_the_services_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "import json, os; is_alone = os.getsid(0) == os.getpid();"
        "print(json.dumps({'api_key': f'alone: {is_alone}', 'identity_secret': '', 'warnings': ['Beware.']}))"
    )
    monkeypatch.setattr(service, "_python", lambda *_: [sys.executable, "-c", code])

    with socket.socket() as listener:
        made = service.LocalService(tmp_path, host="127.0.0.1", listener=listener).bootstrap()

    assert made.api_key == "alone: True"
    assert made.warnings == ("Beware.",)


@pytest.mark.parametrize("printed", ["{}", '{"api_key": null, "url": null}'])
def test_missing_fields_in_command_output_are_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, printed: str
) -> None:
    monkeypatch.setattr(service, "_python", lambda *_: [sys.executable, "-c", f"print({printed!r})"])
    with socket.socket() as listener:
        made = service.LocalService(tmp_path, host="127.0.0.1", listener=listener)

    with pytest.raises(LorryError, match="new-key` does not contain the field 'api_key'"):
        made.new_key()
    with pytest.raises(LorryError, match="sign-in-link` does not contain the field 'url'"):
        made.sign_in_link()
    with pytest.raises(LorryError, match="bootstrap` does not contain the field 'identity_secret'"):
        made.bootstrap()


def test_command_that_prints_no_json_is_distinguished_from_a_failed_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = iter(("", "raise SystemExit(3)", "raise SystemExit('no space')"))
    monkeypatch.setattr(service, "_python", lambda *_: [sys.executable, "-c", next(code)])
    with socket.socket() as listener:
        made = service.LocalService(tmp_path, host="127.0.0.1", listener=listener)

    with pytest.raises(LorryError, match=r"`python -m api new-key` printed no JSON object\. It printed nothing\."):
        made.new_key()
    with pytest.raises(LorryError, match=r"`python -m api new-key` failed \(exit status 3\)\. ") as silent:
        made.new_key()
    with pytest.raises(LorryError, match="no space") as reported:
        made.new_key()

    assert "runs out of memory" in silent.value.remedy
    assert "Fix the reported problem" in reported.value.remedy


def test_remedy_for_a_database_of_an_unreleased_build_is_shown(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "lorry.db")) as database, database:
        database.execute("create table alembic_version (version_num text)")
        database.execute("insert into alembic_version values (?)", [UNRELEASED])

    with socket.socket() as listener, pytest.raises(LorryError, match="to an empty database") as refused:
        service.LocalService(tmp_path, host="127.0.0.1", listener=listener).bootstrap()

    assert f"(revision {UNRELEASED})" in refused.value.message
    assert "Traceback" not in refused.value.message


def test_child_inherits_only_the_given_sockets(tmp_path: Path) -> None:
    code = (
        "import socket, sys\n"
        "print(socket.socket(fileno=int(sys.argv[1])).getsockname()[1])\n"
        "try: socket.socket(fileno=int(sys.argv[2]))\n"
        "except OSError: print('closed')"
    )
    with ports.listen("127.0.0.1", free_port()) as given, ports.listen("127.0.0.1", free_port()) as kept:
        argv = [sys.executable, "-c", code, str(given.fileno()), str(kept.fileno())]
        thing = Child(
            "thing", argv, env=dict(os.environ), cwd=tmp_path, log=tmp_path / "log", pass_fds=[given.fileno()]
        )
        thing.start()
        until(lambda: not thing.is_alive())

        assert thing.log_tail() == f"{given.getsockname()[1]}\nclosed"
