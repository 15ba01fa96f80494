"""Faults of stored data: damaged checkpoints, an S3 server that fails, full disks, and a lost database."""

from __future__ import annotations

import shutil
import signal
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import psycopg
from sqlalchemy import Select, select

from catalog.states import EndReason, JobState
from catalog.storage.object_storage import CHUNK_BYTES
from catalog.tables.history import Checkpoint
from catalog.tables.storage import Artifact
from qa.chaos.service import NUM_ROWS, PATIENCE_SECONDS, SMALL, FaultSite
from tests.services.fault_proxy import FaultProxy, RequestLine, Verdict, http_answer
from tests.tiny_base import write_chat
from tests.worker_site import is_gone_in_time

LOST_ONCE = [EndReason.INFRA_LOST, EndReason.COMPLETED]
BROKEN = http_answer("500 Internal Server Error", "<Error><Code>InternalError</Code></Error>")
EXPIRED = http_answer("403 Forbidden", "<Error><Code>ExpiredToken</Code></Error>")
SLOW_BYTES_PER_SECOND = 30_000
"""A checkpoint takes longer than a lease."""
PART = "partNumber="
"""Occurs only in the URLs of the parts of a multipart upload."""
ALL = 1000
NUM_LARGE_ROWS = 60_000
"""Number of rows of a file that is larger than one part."""
BLOCK_BYTES = 4096
MAX_ACCEPTED = 500
"""Limit for submissions that still fit into SQLite's log on a full disk."""


def flip_bit_of_checkpoint(site: FaultSite) -> str:
    """Damage the newest checkpoint of a job whose worker was killed."""
    job_id = site.submit_small()
    first = site.start_worker(FAILPOINT="step_25:hang")
    site.wait_until(lambda: site.checkpoint_steps(job_id) == [10, 20])
    trainer = site.trainer_of(first)
    first.kill()
    assert is_gone_in_time(trainer)
    path = _blobs_of(site, job_id, step=20)["row.safetensors"]
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)

    site.finish(job_id)

    assert site.reasons(job_id) == LOST_ONCE, site.attempts_text(job_id)
    assert site.attempts(job_id)[1].resumed_from_step == 10, site.attempts_text(job_id)
    warned = [event.message for event in site.events(job_id) if "can't be used" in event.message]
    assert len(warned) == 1, warned
    return f"reported, and resumed from step 10: {site.attempts_text(job_id)}"


def swap_checkpoint(site: FaultSite) -> str:
    """Make the row of a lost job's newest checkpoint name another job's files, which match their digests."""
    job_id = site.submit_small()
    first = site.start_worker(FAILPOINT=f"step_5:wait={site.gate('second')},step_25:hang")
    site.wait_for_step(5, job_id)
    other = site.submit_small(seed=2)
    site.wait_for_message("admit")
    site.gate("second").touch()
    site.wait_until(lambda: site.checkpoint_steps(job_id) == [10, 20] and 10 in site.checkpoint_steps(other))
    first.kill()
    first.wait()
    site.seconds_until_alone()
    with site.db.write() as session:
        mine, theirs = (session.scalars(_of_step(job, step)).one() for job, step in ((job_id, 20), (other, 10)))
        mine.artifact = theirs.artifact

    site.finish(job_id)
    site.wait_for_success(other, is_small=False)

    assert site.reasons(job_id)[-1] == EndReason.COMPLETED, site.attempts_text(job_id)
    assert site.attempts(job_id)[-1].resumed_from_step == 10, site.attempts_text(job_id)
    assert site.weights_digest(other) != site.weights_digest(job_id), "one job has the other's bytes"
    (warned,) = [event.message for event in site.events(job_id) if "can't be used" in event.message]
    assert "belongs to another job" in warned, warned
    return f"“{warned}” {site.attempts_text(job_id)}"


def _of_step(job_id: str, step: int) -> Select[Checkpoint]:
    return select(Checkpoint).where(Checkpoint.job_id == job_id, Checkpoint.step == step)


def _blobs_of(site: FaultSite, job_id: str, *, step: int) -> dict[str, Path]:
    """Return the paths of a checkpoint's files in the store, by their names."""
    with site.db.read() as session:
        checkpoint = session.scalars(_of_step(job_id, step)).one()
        files = session.get_one(Artifact, checkpoint.artifact).files
    folder = site.settings.data_dir / "store" / "blobs"
    return {file["path"]: folder / file["digest"][:2] / file["digest"] for file in files}


def break_store(
    site: FaultSite, *, fault: Callable[[FaultProxy], None], also: Callable[[FaultSite, FaultProxy], str]
) -> str:
    """Inject a fault between the worker and its store, from the first checkpoint on."""
    assert site.under.store is not None
    job_id = site.submit_small()
    site.start_worker(FAILPOINT=f"uploading:wait={site.gate('store')}")
    site.wait_for_file("jobs/*/checkpoints/step-10-adapter/adapter_model.safetensors")
    fault(site.under.store)
    site.gate("store").touch()

    told = also(site, site.under.store)

    site.wait_for_success(job_id)
    assert site.reasons(job_id) == [EndReason.COMPLETED], site.attempts_text(job_id)
    return f"{told}; {site.attempts_text(job_id)}"


class Some:
    """A judge that gives its verdict on the first few writes, or the first few writes of parts. All others pass."""

    def __init__(self, verdict: Verdict, number: int, *, of: str = "") -> None:
        """of: a text in the URL of each affected write."""
        self.num_left = number
        self._verdict: Verdict = verdict
        self._of = of

    def __call__(self, request: RequestLine) -> Verdict:
        if request.method != "PUT" or self._of not in request.path or not self.num_left:
            return "pass"
        self.num_left -= 1
        return self._verdict


def lose_answers(proxy: FaultProxy) -> None:
    proxy.judge = Some("lose the answer", 5)


class Nobody:
    """A judge that denies all requests."""

    def __init__(self) -> None:
        self.num_refused = 0

    def __call__(self, _: RequestLine) -> Verdict:
        self.num_refused += 1
        return EXPIRED


def expire_credentials(proxy: FaultProxy) -> None:
    proxy.judge = Nobody()


def slow_down(proxy: FaultProxy) -> None:
    proxy.bytes_per_second = SLOW_BYTES_PER_SECOND


def until_all_failed(site: FaultSite, proxy: FaultProxy) -> str:
    judge = proxy.judge
    assert isinstance(judge, Some)
    site.wait_until(lambda: judge.num_left == 0)
    return "5 writes, retried"


def for_two_leases(site: FaultSite, proxy: FaultProxy) -> str:
    judge = proxy.judge
    assert isinstance(judge, Nobody)
    site.wait_until(lambda: judge.num_refused)
    site.wait_seconds(2 * site.settings.lease_seconds)
    assert _num_checkpoints(site) == 0, "a checkpoint is visible that was not stored"
    proxy.heal()
    return f"{judge.num_refused} requests refused, nothing visible for two leases"


def _num_checkpoints(site: FaultSite) -> int:
    with site.db.read() as session:
        return session.query(Checkpoint).count()


def until_one_is_stored(site: FaultSite, _proxy: FaultProxy) -> str:
    seconds = site.seconds_until(lambda: _num_checkpoints(site))
    assert seconds > site.settings.lease_seconds, f"a checkpoint took {seconds:.0f} s: that is not slow"
    return f"at {SLOW_BYTES_PER_SECOND // 1000} kB/s the first checkpoint took {seconds:.0f} s"


def fail_parts_of_upload(site: FaultSite) -> str:
    """Upload a file of several parts three times: the store fails until the API server gives up, then a few times, then
    never."""
    assert site.under.store is not None
    path = write_chat(site.folder / "large.jsonl", NUM_LARGE_ROWS)
    digest = sha256(path.read_bytes()).hexdigest()
    num_parts = -(-path.stat().st_size // CHUNK_BYTES)
    assert num_parts > 1
    site.start_api()

    never = site.under.store.judge = Some(BROKEN, ALL, of=PART)
    refused = _send(site, path)
    assert (refused.status_code, "retry-after" in refused.headers) == (503, True), refused.text
    assert site.ask("GET", "/v1/files").json()["data"] == [], "a file is visible that was not stored"
    assert digest not in {entry.key.rpartition("/")[2] for entry in site.store.objects.list_all("blobs")}
    at_first = site.under.store.judge = Some(BROKEN, 3, of=PART)
    sent = [_send(site, path) for _ in range(2)]

    assert [answer.status_code for answer in sent] == [200, 200], [answer.text for answer in sent]
    assert at_first.num_left == 0
    for answer in sent:
        content = site.ask("GET", f"/v1/files/{answer.json()['id']}/content").content
        assert sha256(content).hexdigest() == digest
    failed = f"503 with Retry-After and nothing visible after {ALL - never.num_left} failed parts"
    return f"{num_parts} parts: {failed}; then 3 failed parts, 200; sent again, 200, the same bytes"


def _send(site: FaultSite, path: Path) -> httpx.Response:
    with path.open("rb") as file:
        given = {"data": {"purpose": "fine-tune"}, "files": {"file": (path.name, file)}}
        return site.ask("POST", "/v1/files", timeout=PATIENCE_SECONDS, **given)


@contextmanager
def _full(disk: Path) -> Generator[None]:
    """Fill the disk to the last byte during the block."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file:
        size = BLOCK_BYTES
        while size:
            try:
                file.write(b"\0" * size)
            except OSError:
                size //= 2
    try:
        yield
    finally:
        ballast.unlink()


def _at_step_15(site: FaultSite) -> str:
    job_id = site.submit_small()
    site.start_worker(FAILPOINT=f"step_15:wait={site.gate('go')}")
    site.wait_until(lambda: site.checkpoint_steps(job_id) == [10])
    site.wait_for_step(15, job_id)
    return job_id


def fill_disk_of_trainers(site: FaultSite) -> str:
    """Fill the disk of the trainers' checkpoints, adapters, events and logs."""
    job_id = _at_step_15(site)
    with _full(site.settings.work_dir()):
        site.gate("go").touch()
        site.wait_until(lambda: _warnings(site, job_id))

    site.wait_for_success(job_id)

    attempts = site.attempts(job_id)
    assert set(site.reasons(job_id)) <= {EndReason.NODE_FAILED, EndReason.COMPLETED}, site.attempts_text(job_id)
    assert all((attempt.resumed_from_step or 0) >= 10 for attempt in attempts[1:]), site.attempts_text(job_id)
    return f"“{_warnings(site, job_id)[0]}” {site.attempts_text(job_id)}"


def fill_disk_of_store(site: FaultSite) -> str:
    """Fill the disk of the store. A checkpoint is lost, but an adapter waits for free space."""
    job_id = _at_step_15(site)
    with _full(site.settings.data_dir / "store"):
        site.gate("go").touch()
        site.wait_until(lambda: _warnings(site, job_id))
        site.wait_for_file("jobs/*/adapter/adapter_model.safetensors")
        site.wait_seconds(2)
        assert site.job(job_id).state == JobState.RUNNING
        assert site.checkpoint_steps(job_id) == [10]

    site.wait_for_success(job_id)

    assert site.reasons(job_id) == [EndReason.COMPLETED], site.attempts_text(job_id)
    return f"“{_warnings(site, job_id)[0]}” The adapter waited for free space; {site.attempts_text(job_id)}"


def fill_disk_of_database(site: FaultSite) -> str:
    """Fill the disk of SQLite. Its log may have space for a few more submissions."""
    file_id = site.upload(NUM_ROWS)
    site.start_api()
    job_id = _at_step_15(site)
    with _full(site.folder / "database"):
        site.gate("go").touch()
        number, answer = 0, _submit(site, file_id, 0)
        while answer.status_code == 200 and number < MAX_ACCEPTED:
            number += 1
            answer = _submit(site, file_id, number)
        site.wait_seconds(2)
    assert answer.status_code == 507, f"{answer.status_code} {answer.text}"
    again = _submit(site, file_id, number)
    assert again.status_code == 200, again.text
    later = [accepted for ids in site.submissions.values() for accepted in ids]
    site.cancel(*later)

    site.wait_for_success(job_id)
    site.wait_for_end(*later)

    assert site.reasons(job_id) == [EndReason.COMPLETED], site.attempts_text(job_id)
    refusal = f"507 {answer.json()['error']['code']}"
    told = f"{number} submissions fitted, then {refusal}; accepted once there was free space again"
    return f"{told}. The running job: {site.attempts_text(job_id)}"


def _submit(site: FaultSite, file_id: str, number: int) -> httpx.Response:
    return site.post_job(file_id, idempotency_key=f"full-{number}", **SMALL)


def _warnings(site: FaultSite, job_id: str) -> list[str]:
    return [event.message for event in site.events(job_id) if event.level == "warn"]


def lose_all_and_restore(site: FaultSite) -> str:
    """Lose everything after a backup. The job continues from the checkpoint in the backup."""
    job_id, place = _train_past_a_backup(site)

    _lose_all(site)
    _command(site, "restore", place)
    site.finish(job_id)

    (first, second) = site.attempts(job_id)
    assert [first.reason, second.reason] == [EndReason.INFRA_LOST, EndReason.COMPLETED], site.attempts_text(job_id)
    assert second.resumed_from_step == 10, "the checkpoint of step 20 was made after the backup"
    _command(site, "verify")
    return site.attempts_text(job_id)


def _train_past_a_backup(site: FaultSite) -> tuple[str, str]:
    """Train a job with a checkpoint at step 10 in the backup, and one at step 20 after it. Its worker is killed."""
    place = str(site.folder / "backups")
    job_id = site.submit_small()
    worker = site.start_worker(FAILPOINT=f"step_15:wait={site.gate('go')}")
    site.wait_until(lambda: site.checkpoint_steps(job_id) == [10])
    _command(site, "backup", place)
    site.gate("go").touch()
    site.wait_until(lambda: site.checkpoint_steps(job_id)[-1:] == [20])
    worker.send_signal(signal.SIGKILL)
    worker.wait()
    return job_id, place


def _command(site: FaultSite, *arguments: str) -> None:
    command = site.start([sys.executable, "-m", "api", *arguments])
    assert command.wait(site.patience_seconds) == 0, site.log()


def _lose_all(site: FaultSite) -> None:
    """Delete the data folder, with the store, SQLite's file, base models and files of workers, and the content of
    PostgreSQL's database."""
    url = site.settings.resolved_database_url()
    site.db.close()
    shutil.rmtree(site.settings.data_dir)
    if not urlsplit(url).scheme.startswith("postgresql"):
        return
    with psycopg.connect(url.replace("+psycopg", ""), autocommit=True) as connection:
        connection.execute("drop schema public cascade")
        connection.execute("create schema public")
