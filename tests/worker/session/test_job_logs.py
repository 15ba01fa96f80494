"""What trainers print: bounded, without secrets and others' names, and each job's own."""

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
from catalog.errors import Unavailable
from catalog.history import job_logs as history_job_logs
from catalog.history.job_logs import MAX_BYTES, Line
from catalog.history.queries import attempts
from catalog.queue import claims
from catalog.states import EndReason
from catalog.tables.table import new_id
from tests.worker.pack_site import READY, PackSite, asked, say, tell
from worker import supervisor
from worker.protocol.mailbox import TrainerDirectory
from worker.session import job_logs as session_job_logs
from worker.session.job_logs import LogFile, Output
from worker.session.session_job import End

ROOT = Path(__file__).parents[3]
CRASH = End(reason=EndReason.TRAINER_CRASHED, detail="It ended.")


def told(site: PackSite, job_id: str, **asked: object) -> list[str]:
    return [line.text for line in lines(site, job_id, **asked)]


def lines(site: PackSite, job_id: str, **asked: object) -> list[Line]:
    asked = {"limit": 10**6, **asked}
    page = history_job_logs.lines(site.db, site.store, **site.world.of(job_id), **asked)  # pyright: ignore[reportArgumentType]
    return page.items


def printed(directory: TrainerDirectory, text: str, rank: int = 0) -> None:
    path = directory.log_path if rank == 0 else directory.path / f"log-{rank}.txt"
    with path.open("a") as file:
        file.write(text)


def test_a_job_has_what_was_printed_from_when_it_came_until_it_left(site: PackSite) -> None:
    first, second = site.claim(seed=1), site.claim(seed=2)
    session = site.loading_session(first)
    printed(session.directory, "loading\n")
    say(session, READY)
    session.read_events()
    session.admit(second)
    printed(session.directory, "both\n")

    tell(session, first, "cancelled")
    session.read_events()
    printed(session.directory, "second alone\n")
    session.end_all(CRASH)

    assert told(site, first.job.id) == ["loading", "both"]
    assert told(site, second.job.id) == ["both", "second alone"]


def test_each_process_and_each_attempt_is_told_apart_and_lines_can_be_sought(site: PackSite) -> None:
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
    assert told(site, claim.job.id, rank=1) == ["of the other"]
    assert told(site, claim.job.id, contains="ONE") == ["One"]
    assert told(site, claim.job.id, attempt=2) == []


def test_no_secret_and_no_name_of_anothers_job_is_told(site: PackSite, monkeypatch: pytest.MonkeyPatch) -> None:
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
    printed(session.directory, f"{mine.claim_id} of {mine.job.id} beside {other.claim_id} of {other.job.id}\n")
    printed(session.directory, f"ft:tiny:theirs:secret:01234567 in {site.context.settings.data_dir}/work\n")

    session.end_all(CRASH)

    text = "\n".join(told(site, mine.job.id))
    assert text.count("Error at") == 7
    assert "canary" not in text
    assert f"{mine.claim_id} of {mine.job.id} beside … of …" in text
    assert "ft:… in $LORRY_DATA_DIR/work" in text
    assert str(site.context.settings.data_dir) not in text


def prefixes_of_ids() -> set[str]:
    """The argument of every call of new_id in the source; and of lease.acquire, which passes its own on."""
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


def test_an_id_with_any_prefix_that_the_service_uses_is_redacted(site: PackSite) -> None:
    claim = site.claim()
    session = site.loading_session(claim)
    prefixes = prefixes_of_ids()
    ids = [new_id(prefix) for prefix in sorted(prefixes)]

    printed(session.directory, "".join(f"Error at {one}: stop, in /work/{one}/log-{one}_x\n" for one in ids))
    session.end_all(CRASH)

    text = "\n".join(told(site, claim.job.id))
    assert {
        "ftckpt",
        "trainer",
        "prep",
        "upload",
        "delivery",
        "signin",
        "evt-test",
        "ftjob",
        "claim",
        "planning",
    } <= prefixes
    assert [one for one in ids if one in text or one.rpartition("-")[2] in text] == []


def test_how_a_trainer_ended_names_no_job_of_anothers_and_no_path_in_what_is_recorded(site: PackSite) -> None:
    mine, other = site.claim(seed=1), site.claim(seed=2)
    session = site.loading_session(mine, other)
    said = f"ValueError: {mine.claim_id} beside {other.claim_id} in {site.context.settings.data_dir}/work"

    wire = {"code": "user_error", "message": said, "param": None}
    session.end_all(End(reason=EndReason.USER_ERROR, detail=said, error=wire))

    for claim, told in ((mine, f"{mine.claim_id} beside …"), (other, f"… beside {other.claim_id}")):
        clean = f"ValueError: {told} in $LORRY_DATA_DIR/work"
        (attempt,) = attempts(site.db, **site.world.of(claim.job.id))
        assert attempt.detail == clean
        assert site.world.job(claim.job.id).error == {"code": "user_error", "message": clean, "param": None}


def test_what_no_trainer_has_seen_is_given_back_without_a_path(site: PackSite) -> None:
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

    text = told(site, claim.job.id)
    (left_out,) = [line for line in text if "are omitted" in line]
    assert (text[0], text[-1]) == ("line 0000000", "line 0099999")
    assert sum(len(line) + 1 for line in text) <= MAX_BYTES
    kept = [line for line in text if line != left_out]
    assert int(left_out.split()[0].lstrip("[")) == pytest.approx((100_000 - len(kept)) * 13, abs=30)


@pytest.mark.parametrize("after", ["", "accelerate: exit status 1\n"])
def test_the_last_words_are_found_though_the_log_was_cut_right_after_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: str
) -> None:
    monkeypatch.setattr(session_job_logs, "LONGEST_FILE_BYTES", 1000)
    directory = TrainerDirectory.create(tmp_path / "trainer")
    printed(directory, "standing by\n")
    directory.begin({})
    printed(directory, "step\n" * 300 + "torch.OutOfMemoryError: CUDA out of memory.\n")
    LogFile(directory.log_path).keep_short()
    printed(directory, after)

    tail = directory.log_tail(max_bytes=100)

    assert tail.endswith(f"torch.OutOfMemoryError: CUDA out of memory.\n{after}")
    assert len(tail) == 100
    assert "standing by" not in tail


def test_what_cleaning_makes_longer_stays_within_the_bound(tmp_path: Path, site: PackSite) -> None:
    claim = site.claim()
    file = LogFile(tmp_path / "log.txt")
    file.path.write_bytes(b"\xff" * (MAX_BYTES - 10) + b"\n")

    kept = session_job_logs.publishable(file, 0, claim, tmp_path)

    assert len(kept) <= MAX_BYTES


def test_a_file_that_grows_long_is_cut_and_what_was_before_is_kept_once(
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


def test_a_job_that_goes_on_is_told_of_now_and_then(site: PackSite, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_job_logs, "PUSH_SECONDS", 0.0)
    claim = site.claim()
    session = site.loading_session(claim)
    printed(session.directory, "one\n")
    session.read_events()
    assert told(site, claim.job.id) == ["one"]

    printed(session.directory, "two\n")
    session.read_events()

    assert told(site, claim.job.id) == ["one", "two"]


def test_a_store_that_does_not_answer_keeps_no_attempt_from_ending(
    site: PackSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim = site.claim()
    session = site.loading_session(claim)
    printed(session.directory, "one\n")

    def away(_: bytes) -> None:
        raise Unavailable("The store does not answer.", code="store_unavailable", remedy="")

    monkeypatch.setattr(site.store, "put_bytes", away)
    session.end_all(CRASH)

    assert site.reason(claim) == EndReason.TRAINER_CRASHED
    assert told(site, claim.job.id) == []


def test_nothing_is_written_of_a_job_that_is_anothers_now(site: PackSite) -> None:
    claim = site.claim()
    session = site.loading_session(claim)
    printed(session.directory, "one\n")
    claims.end(site.db, claim.claim_id, reason=EndReason.INFRA_LOST, detail="")

    session.apply_directives(asked(claim, stale=True))

    assert len(session) == 0
    assert told(site, claim.job.id) == []


def test_another_workers_attempt_is_not_written_to(site: PackSite, tmp_path: Path) -> None:
    claim = site.claim()
    site.context.worker_id = "another"
    directory = TrainerDirectory.create(tmp_path / "trainer")
    printed(directory, "of a stranger\n")
    kept = Output(site.context, directory)

    kept.begin(claim, is_loading=True)
    kept.end(claim.claim_id)

    assert told(site, claim.job.id) == []


def test_a_disk_without_room_for_what_is_cut_ends_nothing_and_is_told_once(
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
    told_of_it = [record for record in caplog.records if "can't be truncated" in record.getMessage()]
    monkeypatch.setattr(shutil, "copyfileobj", copy)
    printed(session.directory, "cd")
    assert session.directory.log_tail() == "0123456789abcd"
    session.read_events()

    assert len(told_of_it) == 1
    assert session.directory.log_path.stat().st_size == 0
    assert session.directory.log_tail() == "0123456789abcd"


def test_a_folder_that_can_not_be_read_ends_nothing(site: PackSite, monkeypatch: pytest.MonkeyPatch) -> None:
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

    assert told(site, first.job.id) == ["one"]
    assert len(session) == 0
