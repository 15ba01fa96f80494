"""Imports of base models onto a node by a child process, which is terminated once the base model is not wanted."""

from __future__ import annotations

import errno
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from catalog.db.database import Database
from catalog.errors import OutOfSpace, StaleClaim
from catalog.registry import base_models as record
from catalog.scheduling.snapshot import USUAL
from catalog.settings import Settings
from catalog.tables.storage import BaseModelRow
from catalog.tables.tasks import Task
from catalog.tasks.task_queue import TaskKind
from tests.catalog.world import claim_import_of, try_claim
from worker.background import base_models, child_task
from worker.background.child_task import Abandoned, AttemptFailed
from worker.background.task_runner import TaskDelayed, run_next
from worker.node import devices
from worker.protocol.errors import disk_error
from worker.protocol.mailbox import read_json, write_json


@pytest.fixture
def context(tmp_path: Path) -> Iterator[Any]:
    """Yield the part of a worker's context that the task runner and worker/background/base_models.py use."""
    settings = Settings(data_dir=tmp_path, heartbeat_seconds=1e-6)
    settings.bases_dir().mkdir(parents=True)
    db = Database(settings.resolved_database_url())
    db.migrate()
    yield SimpleNamespace(
        settings=settings, db=db, draining=False, worker_id="w1", policy=USUAL, refused_exports=dict[str, float]()
    )
    db.close()


def test_a_lease_is_renewed_while_files_are_hashed(context: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    record.add(context.db, name="large", kind="folder", source="/source")
    monkeypatch.setattr(base_models, "CHUNK_BYTES", 1)

    def run_child(_context: Any, row: BaseModelRow, _work: Path, arguments: Any, _: Any) -> tuple[Any, None]:
        write_target(arguments)
        with context.db.write() as session:  # the child took nearly as long as a lease
            session.get_one(Task, (TaskKind.IMPORT, row.name)).lease_expires_at = 1.0
        return {}, None

    def rename(target: Path, final: Path) -> None:
        assert try_claim(context.db, TaskKind.IMPORT) is None, "no other worker may import it at the same time"
        target.rename(final)

    monkeypatch.setattr(base_models, "_run_child", run_child)
    monkeypatch.setattr(base_models, "_rename", rename)

    assert run_next(context, [TaskKind.IMPORT])

    assert record.get(context.db, "large").state == "ready"


def test_an_import_claimed_by_another_worker_is_abandoned_during_hashing(
    context: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    record.add(context.db, name="large", kind="folder", source="/source")
    monkeypatch.setattr(base_models, "CHUNK_BYTES", 1)

    def run_child(_context: Any, row: BaseModelRow, _work: Path, arguments: Any, _: Any) -> tuple[Any, None]:
        write_target(arguments)
        with context.db.write() as session:
            session.get_one(Task, (TaskKind.IMPORT, row.name)).claim_id = "claim-of-another"
        return {}, None

    monkeypatch.setattr(base_models, "_run_child", run_child)

    with pytest.raises(StaleClaim):
        run_next(context, [TaskKind.IMPORT])

    with context.db.read() as session:
        assert session.get_one(Task, (TaskKind.IMPORT, "large")).claim_id == "claim-of-another"
    assert list(context.settings.bases_dir().iterdir()) == []


def write_target(arguments: Any) -> None:
    target = Path(arguments["target_dir"])
    target.mkdir()
    (target / "config.json").write_bytes(bytes(100))


def test_an_unwanted_import_is_abandoned(
    context: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sleeper: subprocess.Popen[bytes]
) -> None:
    record.add(context.db, name="slow", kind="folder", source=str(tmp_path))
    monkeypatch.setattr(child_task, "run_child", lambda *_arguments, **_options: sleeper)
    answers = iter([False, True])

    with pytest.raises(Abandoned):
        base_models.ensure(context, "slow", "0" * 64, is_unwanted=lambda: next(answers))

    assert sleeper.returncode is not None
    assert list(context.settings.bases_dir().iterdir()) == []


def test_the_import_of_a_deleted_base_is_abandoned(
    context: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sleeper: subprocess.Popen[bytes]
) -> None:
    record.add(context.db, name="unwanted", kind="folder", source=str(tmp_path))

    def run_child(*_arguments: Any, **_options: Any) -> subprocess.Popen[bytes]:
        record.delete(context.db, "unwanted")
        return sleeper

    monkeypatch.setattr(child_task, "run_child", run_child)

    with pytest.raises(StaleClaim):
        run_next(context, [TaskKind.IMPORT])

    assert sleeper.returncode is not None
    assert record.list_all(context.db) == []
    assert list(context.settings.bases_dir().iterdir()) == []


def test_an_import_for_a_job_or_plan_is_abandoned_if_its_base_is_deleted(
    context: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sleeper: subprocess.Popen[bytes]
) -> None:
    record.add(context.db, name="unwanted", kind="folder", source=str(tmp_path))

    def run_child(*_arguments: Any, **_options: Any) -> subprocess.Popen[bytes]:
        record.delete(context.db, "unwanted")
        return sleeper

    monkeypatch.setattr(child_task, "run_child", run_child)

    with pytest.raises(Abandoned):
        base_models.ensure(context, "unwanted", "0" * 64)

    assert sleeper.returncode is not None


@pytest.mark.parametrize("problem", ["a loop of links", "no permission"])
def test_an_unreadable_source_fails_the_import(
    context: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, problem: str
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    if problem == "a loop of links":
        (source / "config.json").symlink_to("config.json")
    else:
        listed = Path.iterdir

        def iterdir(path: Path) -> Iterator[Path]:
            if path == source:
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return listed(path)

        monkeypatch.setattr(Path, "iterdir", iterdir)
    record.add(context.db, name="closed", kind="folder", source=str(source))

    assert run_next(context, [TaskKind.IMPORT]) is True

    row = record.get(context.db, "closed")
    assert row.state == "failed"
    assert row.error is not None
    assert row.error["code"] == "source_unreachable"
    assert row.error["message"].startswith(f"Worker w1 can't read {source}")
    assert "[Errno" not in row.error["message"]
    assert row.error["remedy"].endswith("Then repeat the request.")


def test_a_hub_cache_that_cannot_be_created_is_named(
    context: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    folder = tmp_path / "file" / "cache"
    monkeypatch.setenv("HF_HOME", str(folder))
    record.add(context.db, name="remote", kind="hub", source="org/remote")

    with pytest.raises(TaskDelayed):
        run_next(context, [TaskKind.IMPORT])

    error = record.get(context.db, "remote").error or {}
    assert error["message"] == (
        f"Worker w1 can't create its Hugging Face cache folder {folder} to import base model 'remote': Not a directory."
    )
    assert "HF_HOME" in error["remedy"]


def test_a_full_disk_under_the_hub_cache_is_reported_as_such(context: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def base_import(*_arguments: Any, **_options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "/cache")

    monkeypatch.setattr(base_models.sandbox, "base_import", base_import)
    record.add(context.db, name="remote", kind="hub", source="org/remote")

    with pytest.raises(TaskDelayed):
        run_next(context, [TaskKind.IMPORT])

    row = record.get(context.db, "remote")
    error = row.error or {}
    assert (row.state, error["code"]) == ("importing", "out_of_space")
    assert "data folder, Hugging Face cache" in error["remedy"]


@pytest.mark.parametrize(
    ("code", "message", "remedy"),
    [
        ("import __main__; raise SystemExit(3)", "w1 failed with exit status 3: no output.", "reinstall Lorry's"),
        (
            "import os; os.kill(os.getpid(), 9)",
            "w1 was killed by signal 9 (SIGKILL), probably because the machine ran out of memory.",
            "Free up memory",
        ),
        ("raise OSError(28, 'full')", "The disk on worker w1 is full.", "that worker's data folder"),
    ],
)
def test_a_failed_import_names_the_worker_and_the_cause(
    context: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, message: str, remedy: str
) -> None:
    def run_child(*_arguments: Any, log_path: Path, **_options: Any) -> subprocess.Popen[bytes]:
        with log_path.open("wb") as log:
            return subprocess.Popen([sys.executable, "-c", code], stderr=log, start_new_session=True)

    monkeypatch.setattr(child_task, "run_child", run_child)
    record.add(context.db, name="broken", kind="folder", source=str(tmp_path))

    with pytest.raises(TaskDelayed):
        run_next(context, [TaskKind.IMPORT])

    error = record.get(context.db, "broken").error or {}
    assert error["message"].endswith(message)
    assert remedy in error["remedy"]
    assert error["remedy"].endswith(("Then repeat the request.", "If all attempts have failed, repeat the request."))


@pytest.mark.parametrize("kill_signal", [0, signal.SIGXCPU])
@pytest.mark.parametrize(
    ("kind", "remedy"),
    [
        ("hub", "Delete {source} from that worker's Hugging Face cache"),
        ("folder", "damaged"),
    ],
)
def test_the_remedy_of_a_failed_import_fits_the_kind_of_source(
    context: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Any, remedy: str, kill_signal: int
) -> None:
    def run_child(*_arguments: Any, log_path: Path, **_options: Any) -> subprocess.Popen[bytes]:
        log_path.touch()
        code = f"import os; os.kill(os.getpid(), {int(kill_signal)}); raise SystemExit(3)"
        return subprocess.Popen([sys.executable, "-c", code], start_new_session=True)

    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setattr(child_task, "run_child", run_child)
    source = "org/name" if kind == "hub" else str(tmp_path)
    record.add(context.db, name="broken", kind=kind, source=source)

    with pytest.raises(TaskDelayed) if kill_signal == 0 else nullcontext():
        run_next(context, [TaskKind.IMPORT])

    error = record.get(context.db, "broken").error or {}
    assert error["code"] == "import_failed"
    assert remedy.format(source=source) in error["remedy"]
    assert source in error["remedy"]


@pytest.mark.parametrize("code", ["out_of_space", "disk_error"])
def test_a_disk_problem_that_the_import_reports_names_the_worker(
    context: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str
) -> None:
    def run_child(_module: str, arguments: str, **_options: Any) -> subprocess.Popen[bytes]:
        number = errno.ENOSPC if code == "out_of_space" else errno.EIO
        write_json(Path(read_json(Path(arguments))["result"]), {"error": disk_error(OSError(number, "Bad disk"))})
        return subprocess.Popen([sys.executable, "-c", ""], start_new_session=True)

    monkeypatch.setattr(child_task, "run_child", run_child)
    record.add(context.db, name="broken", kind="folder", source=str(tmp_path))

    with pytest.raises(TaskDelayed):
        run_next(context, [TaskKind.IMPORT])

    error = record.get(context.db, "broken").error or {}
    assert error["code"] == code
    assert "worker w1" in error["message"]


@pytest.mark.parametrize(
    ("kind", "source", "remedy"),
    [
        ("folder", "/my models/tiny", "Restore the original files at /my models/tiny on that"),
        ("hub", "o/n", "Delete o/n"),
    ],
)
def test_a_changed_base_is_reported_with_the_worker(
    context: Any, monkeypatch: pytest.MonkeyPatch, kind: str, source: str, remedy: str
) -> None:
    record.add(context.db, name="tiny", kind=kind, source=source)
    monkeypatch.setattr(base_models, "_import", lambda *_: ({"files": []}, {}))

    with pytest.raises(AttemptFailed) as caught:
        base_models.ensure(context, "tiny", "0" * 64)

    assert caught.value.message.startswith("On worker w1, the source files for base model 'tiny' differ")
    assert f" instead of {'0' * 64}." in caught.value.message
    assert caught.value.remedy.startswith(remedy)
    assert f"`lorry models add NAME {shlex.quote(source)}`" in caught.value.remedy


def test_a_disk_too_full_for_a_message_is_not_blamed_on_the_model(
    context: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_child(*_arguments: Any, log_path: Path, **_options: Any) -> subprocess.Popen[bytes]:
        log_path.touch()
        return subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"], start_new_session=True)

    monkeypatch.setattr(child_task, "run_child", run_child)
    monkeypatch.setattr(devices, "is_disk_full", lambda _folder: True)
    record.add(context.db, name="sound", kind="folder", source=str(tmp_path))

    with pytest.raises(OutOfSpace):
        base_models.ensure(context, "sound", "0" * 64)
    with pytest.raises(TaskDelayed):
        run_next(context, [TaskKind.IMPORT])

    error = record.get(context.db, "sound").error or {}
    assert (error["code"], error["message"]) == ("out_of_space", "The disk on worker w1 is full.")


def test_an_import_without_progress_names_what_to_check(
    context: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sleeper: subprocess.Popen[bytes]
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setattr(child_task, "STALL_SECONDS", -1.0)
    monkeypatch.setattr(child_task, "run_child", lambda *_arguments, **_options: sleeper)
    record.add(context.db, name="tiny", kind="hub", source="org/tiny")

    with pytest.raises(TaskDelayed):
        run_next(context, [TaskKind.IMPORT])

    error = record.get(context.db, "tiny").error or {}
    assert error["code"] == "no_progress"
    assert error["message"].startswith("The import of base model 'tiny' on worker w1 was stopped because it used")
    assert "Hugging Face Hub" in error["remedy"]
    assert sleeper.returncode is not None


def test_cleanup_removes_only_the_files_of_deleted_bases(context: Any) -> None:
    record.add(context.db, name="old", kind="folder", source="/old")
    imported: dict[str, Any] = {"manifest": {"files": []}, "description": {}}
    record.finish_import(context.db, claim_import_of(context.db, "old"), digest="a" * 64, **imported)
    names = ["a" * 64, "b" * 64, "tmp-1"]
    for name in names:
        (context.settings.bases_dir() / name).mkdir()
    assert base_models.clean(context) == []

    record.delete(context.db, "old")

    assert base_models.clean(context) == ["a" * 64]
    assert sorted(path.name for path in context.settings.bases_dir().iterdir()) == sorted(names[1:])


def test_cleanup_keeps_the_files_of_a_base_that_another_worker_imports_meanwhile(
    context: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    imported: dict[str, Any] = {"digest": "a" * 64, "manifest": {"files": []}, "description": {}}
    record.add(context.db, name="old", kind="folder", source="/old")
    record.finish_import(context.db, claim_import_of(context.db, "old"), **imported)
    record.delete(context.db, "old")
    folder = context.settings.bases_dir() / ("a" * 64)
    folder.mkdir()
    (folder / "config.json").touch()
    deleted, visible = record.deleted, list[bool]()

    def deleted_then_import(*given: Any) -> set[str]:
        visible.append(folder.is_dir())
        found = deleted(*given)
        if len(visible) == 1:
            record.add(context.db, name="old", kind="folder", source="/old")
            record.finish_import(context.db, claim_import_of(context.db, "old"), **imported)
        return found

    monkeypatch.setattr(record, "deleted", deleted_then_import)

    assert base_models.clean(context) == []

    assert visible == [True, False], "an import that begins now must not find the folder"
    assert [path.name for path in folder.iterdir()] == ["config.json"]
    assert [path.name for path in context.settings.bases_dir().iterdir()] == [folder.name]
