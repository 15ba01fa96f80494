"""Output of trainers in job logs: limited in size, without secrets and foreign ids, and separate for each job."""

from __future__ import annotations

import ast
import errno
import inspect
import shutil
from importlib import import_module
from pathlib import Path
from typing import BinaryIO

import pytest

from catalog.db import lease
from catalog.error_texts import ErrorText
from catalog.errors import Unavailable
from catalog.history import job_logs as history_job_logs
from catalog.history.job_logs import MAX_BYTES, Line
from catalog.history.queries import attempts
from catalog.queue import claims
from catalog.states import EndReason
from catalog.tables.table import new_id
from tests.worker.pack_site import READY, PackSite, directives_for, emit, emit_for
from worker import supervisor
from worker.protocol.mailbox import TrainerDirectory
from worker.session import job_logs as session_job_logs
from worker.session.job_logs import LogFile, Output
from worker.session.session_job import End

ROOT = Path(__file__).parents[3]
CRASH = End(reason=EndReason.TRAINER_CRASHED, detail="It ended.")


def log_texts(site: PackSite, job_id: str, **filters: object) -> list[str]:
    return [line.text for line in lines(site, job_id, **filters)]


def lines(site: PackSite, job_id: str, **filters: object) -> list[Line]:
    filters = {"limit": 10**6, **filters}
    page = history_job_logs.lines(site.db, site.store, **site.world.of(job_id), **filters)  # pyright: ignore[reportArgumentType]
    return page.items


def printed(directory: TrainerDirectory, text: str, rank: int = 0) -> None:
    path = directory.log_path if rank == 0 else directory.path / f"log-{rank}.txt"
    with path.open("a") as file:
        file.write(text)


def test_a_job_logs_the_output_from_its_admission_to_its_end(site: PackSite) -> None:
    first, second = site.claim(seed=1), site.claim(seed=2)
    session = site.loading_session(first)
    printed(session.directory, "loading\n")
    emit(session, READY)
    session.read_events()
    session.admit(second)
    printed(session.directory, "both\n")

    emit_for(session, first, "cancelled")
    session.read_events()
    printed(session.directory, "second alone\n")
    session.end_all(CRASH)

    assert log_texts(site, first.job.id) == ["loading", "both"]
    assert log_texts(site, second.job.id) == ["both", "second alone"]


def test_log_lines_have_a_rank_and_an_attempt_and_can_be_searched(site: PackSite) -> None:
    claim = site.claim()
    session = site.loading_session(claim)
    printed(session.directory, "One\nTwo\n")
    printed(session.directory, "of the other\n", rank=1)
    session.end_all(CRASH)

    found = lines(site, claim.job.id)
    page = history_job_logs.lines(site.db, site.store, **site.world.of(claim.job.id), limit=2)
    rest = history_job_logs.lines(site.db, site.store, **site.world.of(claim.job.id), after=page.items[-1].id)

    assert [(line.attempt, line.rank, line.number, line.text) for line in found] == [
        (1, 0, 1, "One"),
        (1, 0, 2, "Two"),
        (1, 1, 1, "of the other"),
    ]
    assert (page.has_more, [line.text for line in rest.items]) == (True, ["of the other"])
    assert log_texts(site, claim.job.id, rank=1) == ["of the other"]
    assert log_texts(site, claim.job.id, contains="ONE") == ["One"]
    assert log_texts(site, claim.job.id, attempt=2) == []


def test_logs_contain_no_secrets_and_no_foreign_ids(site: PackSite, monkeypatch: pytest.MonkeyPatch) -> None:
    canaries = {
        "LORRY_PEPPER": "canary-of-the-pepper",
        "AWS_SECRET_ACCESS_KEY": "canary/of+the/store",
        "HF_TOKEN": "hf_canary0of0the0hub",
        "LORRY_DATABASE_URL": "postgresql://lorry:canary-of-the-database@db/lorry",
    }
    for name, value in canaries.items():
        monkeypatch.setenv(name, value)
    mine, other = site.claim(seed=1), site.claim(seed=2)
    session = site.loading_session(mine)
    key = "lorry_key-0123456789abcdef01234567_canary-of-a-key"
    for text in (*canaries.values(), "amqp://user:canary-of-the-broker@host/", key, "api_key=canary-of-somebody"):
        printed(session.directory, f"Error at {text}: stop\n")
    printed(session.directory, f"{mine.claim_id} of {mine.job.id} and {other.claim_id} of {other.job.id}\n")
    printed(session.directory, f"ft:tiny:theirs:secret:01234567 in {site.context.settings.data_dir}/work\n")

    session.end_all(CRASH)

    text = "\n".join(log_texts(site, mine.job.id))
    assert text.count("Error at") == 7
    assert "canary" not in text
    assert f"{mine.claim_id} of {mine.job.id} and … of …" in text
    assert "ft:… in $LORRY_DATA_DIR/work" in text
    assert str(site.context.settings.data_dir) not in text


def prefixes_of_ids() -> set[str]:
    """Return the prefix in every call of new_id in the source, and of lease.acquire, which passes its own on."""
    found: set[str] = {inspect.signature(lease.acquire).parameters["prefix"].default}
    for path in [path for package in ("catalog", "api", "worker") for path in (ROOT / package).rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            given: list[ast.expr] = []
            if isinstance(node.func, ast.Name) and node.func.id == "new_id" and path.name != "lease.py":
                given = node.args
            elif ast.unparse(node.func) == "lease.acquire":
                given = [keyword.value for keyword in node.keywords if keyword.arg == "prefix"]
            module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            for prefix in given:
                named = isinstance(prefix, ast.Constant)
                found.add(str(prefix.value if named else getattr(import_module(module), ast.unparse(prefix))))
    return found


def test_an_id_with_any_prefix_of_the_service_is_redacted(site: PackSite) -> None:
    claim = site.claim()
    session = site.loading_session(claim)
    prefixes = prefixes_of_ids()
    ids = [new_id(prefix) for prefix in sorted(prefixes)]

    printed(session.directory, "".join(f"Error at {one}: stop, in /work/{one}/log-{one}_x\n" for one in ids))
    session.end_all(CRASH)

    text = "\n".join(log_texts(site, claim.job.id))
    assert {
        "ftckpt",
        "trainer",
        "upload",
        "delivery",
        "signin",
        "evt-test",
        "ftjob",
        "claim",
    } <= prefixes
    assert [one for one in ids if one in text or one.rpartition("-")[2] in text] == []


def test_recorded_end_details_contain_no_foreign_ids_and_no_paths(site: PackSite) -> None:
    mine, other = site.claim(seed=1), site.claim(seed=2)
    session = site.loading_session(mine, other)
    message = f"ValueError: {mine.claim_id} and {other.claim_id} in {site.context.settings.data_dir}/work"

    wire = {"code": "user_error", "message": message, "param": None}
    session.end_all(End(reason=EndReason.USER_ERROR, detail=message, error=wire))

    for claim, visible in ((mine, f"{mine.claim_id} and …"), (other, f"… and {other.claim_id}")):
        clean = f"ValueError: {visible} in $LORRY_DATA_DIR/work"
        (attempt,) = attempts(site.db, **site.world.of(claim.job.id))
        assert attempt.detail == clean
        assert site.world.job(claim.job.id).error == {"code": "user_error", "message": clean, "param": None}


def test_a_claim_that_no_trainer_received_is_released_without_a_path(site: PackSite) -> None:
    claim = site.claim()
    detail = f"The worker could not start a trainer: {site.context.settings.data_dir}/work is full."

    supervisor._release(site.context, [claim], End(reason=EndReason.NODE_FAILED, detail=detail))  # pyright: ignore[reportPrivateUsage]

    (attempt,) = attempts(site.db, **site.world.of(claim.job.id))
    assert attempt.detail == "The worker could not start a trainer: $LORRY_DATA_DIR/work is full."


def test_a_long_log_keeps_its_first_and_its_last_lines(site: PackSite) -> None:
    claim = site.claim()
    session = site.loading_session(claim)
    printed(session.directory, "".join(f"line {number:07d}\n" for number in range(100_000)))

    session.end_all(CRASH)

    text = log_texts(site, claim.job.id)
    (omitted,) = [line for line in text if "are omitted" in line]
    assert (text[0], text[-1]) == ("line 0000000", "line 0099999")
    assert sum(len(line) + 1 for line in text) <= MAX_BYTES
    kept = [line for line in text if line != omitted]
    assert int(omitted.split()[0].lstrip("[")) == pytest.approx((100_000 - len(kept)) * 13, abs=30)


@pytest.mark.parametrize("after", ["", "accelerate: exit status 1\n"])
def test_the_last_lines_are_found_after_the_log_was_truncated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: str
) -> None:
    monkeypatch.setattr(session_job_logs, "LONGEST_FILE_BYTES", 1000)
    directory = TrainerDirectory.create(tmp_path / "trainer")
    printed(directory, "not started\n")
    directory.begin({})
    printed(directory, "step\n" * 300 + "torch.OutOfMemoryError: CUDA out of memory.\n")
    LogFile(directory.log_path).keep_short()
    printed(directory, after)

    tail = directory.log_tail(max_bytes=100)

    assert tail.endswith(f"torch.OutOfMemoryError: CUDA out of memory.\n{after}")
    assert len(tail) == 100
    assert "not started" not in tail


def test_output_with_invalid_bytes_stays_within_the_limit(tmp_path: Path, site: PackSite) -> None:
    claim = site.claim()
    file = LogFile(tmp_path / "log.txt")
    file.path.write_bytes(b"\xff" * (MAX_BYTES - 10) + b"\n")

    kept = session_job_logs.publishable(file, 0, claim, tmp_path)

    assert len(kept) <= MAX_BYTES


def test_a_long_file_is_truncated_and_its_previous_content_is_kept_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_job_logs, "LONGEST_FILE_BYTES", 10)
    file = LogFile(tmp_path / "log.txt")
    with file.path.open("ab", buffering=0) as printing:
        printing.write(b"0123456789ab")
        file.keep_short()
        printing.write(b"cd")

        assert (file.path.stat().st_size, file.end()) == (2, 14)
        assert file.read(0, 14) == b"0123456789abcd"
        assert file.read(10, 13) == b"abc"
        printing.write(b"efghijklmnop")
        file.keep_short()
        printing.write(b"q")

        assert file.end() == 27
        assert file.read(0, 27) == b"cdefghijklmnopq"


def test_the_log_of_a_running_job_is_published_periodically(site: PackSite, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_job_logs, "PUSH_SECONDS", 0.0)
    claim = site.claim()
    session = site.loading_session(claim)
    printed(session.directory, "one\n")
    session.read_events()
    assert log_texts(site, claim.job.id) == ["one"]

    printed(session.directory, "two\n")
    session.read_events()

    assert log_texts(site, claim.job.id) == ["one", "two"]


def test_a_store_outage_does_not_keep_an_attempt_from_ending(site: PackSite, monkeypatch: pytest.MonkeyPatch) -> None:
    claim = site.claim()
    session = site.loading_session(claim)
    printed(session.directory, "one\n")

    def away(_: bytes) -> None:
        raise Unavailable(ErrorText(code="store_unavailable", message="The store does not answer.", remedy=""))

    monkeypatch.setattr(site.store, "put_bytes", away)
    session.end_all(CRASH)

    assert site.reason(claim) == EndReason.TRAINER_CRASHED
    assert log_texts(site, claim.job.id) == []


def test_nothing_is_written_for_a_stale_claim(site: PackSite) -> None:
    claim = site.claim()
    session = site.loading_session(claim)
    printed(session.directory, "one\n")
    claims.end(site.db, claim.claim_id, reason=EndReason.INFRA_LOST, detail="")

    session.apply_directives(directives_for(claim, stale=True))

    assert len(session) == 0
    assert log_texts(site, claim.job.id) == []


def test_nothing_is_written_to_an_attempt_of_another_worker(site: PackSite, tmp_path: Path) -> None:
    claim = site.claim()
    site.context.worker_id = "another"
    directory = TrainerDirectory.create(tmp_path / "trainer")
    printed(directory, "of a stranger\n")
    kept = Output(site.context, directory)

    kept.begin(claim, is_loading=True)
    kept.end(claim.claim_id)

    assert log_texts(site, claim.job.id) == []


def test_a_full_disk_during_truncation_stops_nothing_and_is_logged_once(
    site: PackSite, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(session_job_logs, "LONGEST_FILE_BYTES", 10)
    monkeypatch.setattr(session_job_logs, "PUSH_SECONDS", 0.0)
    session = site.loading_session(site.claim())
    printed(session.directory, "0123456789ab")
    copy = shutil.copyfileobj

    def half_of_it(source: BinaryIO, target: BinaryIO) -> None:
        target.write(source.read(5))
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copyfileobj", half_of_it)
    for _ in range(2):
        session.read_events()
    warnings = [record for record in caplog.records if "can't be truncated" in record.getMessage()]
    monkeypatch.setattr(shutil, "copyfileobj", copy)
    printed(session.directory, "cd")
    assert session.directory.log_tail() == "0123456789abcd"
    session.read_events()

    assert len(warnings) == 1
    assert session.directory.log_path.stat().st_size == 0
    assert session.directory.log_tail() == "0123456789abcd"


def test_an_unreadable_folder_stops_nothing(site: PackSite, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_job_logs, "PUSH_SECONDS", 0.0)
    first, second = site.claim(seed=1), site.claim(seed=2)
    session = site.loading_session(first)
    printed(session.directory, "one\n")

    def unreadable(_: TrainerDirectory) -> dict[int, Path]:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as broken:
        broken.setattr(TrainerDirectory, "logs", unreadable)
        session.admit(second)
        session.read_events()
    session.end_all(CRASH)

    assert log_texts(site, first.job.id) == ["one"]
    assert len(session) == 0
