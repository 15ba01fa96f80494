"""Faults of stored data: damaged checkpoints, an S3 server that fails, full disks, and a lost database."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Generator
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
from qa.chaos.environment import DATABASES, fault
from qa.chaos.service import NUM_ROWS, PATIENCE_SECONDS, SMALL, FaultSite
from tests.services.fault_proxy import FaultProxy, RequestLine, Verdict, http_answer
from tests.tiny_base import write_chat

BROKEN = http_answer("500 Internal Server Error", "<Error><Code>InternalError</Code></Error>")
EXPIRED = http_answer("403 Forbidden", "<Error><Code>ExpiredToken</Code></Error>")
SLOW_BYTES_PER_SECOND = 30_000
"""A checkpoint takes longer than a lease."""
NOTHING_PARTIAL = "no partial artifact visible; retry idempotent"
PART = "partNumber="
"""Occurs only in the URLs of the parts of a multipart upload."""
ALL = 1000
NUM_LARGE_ROWS = 60_000
"""Number of rows of a file that is larger than one part."""
REPORTED = "reported by name; the last good checkpoint is kept"
BLOCK_BYTES = 4096
MAX_ACCEPTED = 500
"""Limit for submissions that still fit into SQLite's log on a full disk."""


@fault(
    "checkpoint-damaged",
    "the newest checkpoint has one bit flipped",
    promise="detected; the older one is used",
)
def flip_bit_of_checkpoint(site: FaultSite) -> str:
    job_id = site.submit_small()
    worker = site.start_worker(FAILPOINT="step_25:hang")
    site.wait_until(lambda: site.checkpoint_steps(job_id) == [10, 20])
    worker.kill()
    worker.wait()
    site.seconds_until_alone()
    path = _blobs_of(site, job_id, step=20)["row.safetensors"]
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)

    site.finish(job_id)

    site.assert_attempts(job_id, EndReason.INFRA_LOST, EndReason.COMPLETED, resumed_from=10)
    warned = [event.message for event in site.events(job_id) if "can't be used" in event.message]
    assert len(warned) == 1, warned
    return f"reported, and resumed from step 10: {site.attempts_text(job_id)}"


@fault(
    "checkpoint-anothers",
    "the row of the newest checkpoint names the intact files of another job",
    promise="detected; the older one is used, and both jobs have their own bytes",
)
def swap_checkpoint(site: FaultSite) -> str:
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


class Some:
    """A judge of a proxy that gives its verdict on the first few writes, or writes of parts. All others pass."""

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


def _store_first_checkpoint(site: FaultSite) -> tuple[str, FaultProxy]:
    """Train a job up to its first checkpoint, which the worker stores when the gate `store` opens. Returns its id and
    the proxy in front of the store."""
    assert site.under.store is not None
    job_id = site.submit_small()
    site.start_worker(FAILPOINT=f"uploading:wait={site.gate('store')}")
    site.wait_for_file("jobs/*/checkpoints/step-10-adapter/adapter_model.safetensors")
    return job_id, site.under.store


def _finish_stored(site: FaultSite, job_id: str) -> str:
    site.wait_for_success(job_id)
    site.assert_attempts(job_id, EndReason.COMPLETED)
    return site.attempts_text(job_id)


@fault(
    "store-answer-lost",
    "S3: the response to a successful write is lost, five times",
    promise=NOTHING_PARTIAL,
    has_s3=True,
)
def lose_answers_of_store(site: FaultSite) -> str:
    job_id, proxy = _store_first_checkpoint(site)
    judge = proxy.judge = Some("lose the answer", 5)
    site.gate("store").touch()
    site.wait_until(lambda: judge.num_left == 0)
    return f"5 writes, retried; {_finish_stored(site, job_id)}"


@fault("store-slow", "S3: a checkpoint takes longer than a lease", promise=NOTHING_PARTIAL, has_s3=True)
def slow_store_down(site: FaultSite) -> str:
    job_id, proxy = _store_first_checkpoint(site)
    proxy.bytes_per_second = SLOW_BYTES_PER_SECOND
    site.gate("store").touch()
    seconds = site.seconds_until(lambda: site.checkpoint_steps(job_id))
    assert seconds > site.settings.lease_seconds, f"a checkpoint took {seconds:.0f} s: that is not slow"
    took = f"at {SLOW_BYTES_PER_SECOND // 1000} kB/s the first checkpoint took {seconds:.0f} s"
    return f"{took}; {_finish_stored(site, job_id)}"


@fault("store-expired", "S3: credentials expire for two leases", promise=NOTHING_PARTIAL, has_s3=True)
def expire_credentials_of_store(site: FaultSite) -> str:
    job_id, proxy = _store_first_checkpoint(site)
    refused: list[RequestLine] = []

    def refuse(request: RequestLine) -> Verdict:
        refused.append(request)
        return EXPIRED

    proxy.judge = refuse
    site.gate("store").touch()
    site.wait_until(lambda: refused)
    site.wait_seconds(2 * site.settings.lease_seconds)
    assert site.checkpoint_steps(job_id) == [], "a checkpoint is visible that was not stored"
    proxy.heal()
    return f"{len(refused)} requests refused, nothing visible for two leases; {_finish_stored(site, job_id)}"


@fault(
    "store-500-in-parts",
    "S3: 500 for parts of a multipart upload, until the API server gives up, and then three times",
    promise="no partial file visible; retry idempotent",
    has_s3=True,
)
def fail_parts_of_upload(site: FaultSite) -> str:
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


@fault(
    "disk-full-trainers",
    "disk full for trainers' checkpoints, adapters, events and logs",
    promise=REPORTED,
    small_disk="data/work",
    environment={"LORRY_LEASE_SECONDS": "30"},
)
def fill_disk_of_trainers(site: FaultSite) -> str:
    job_id, _ = site.train_to_step_15()
    with _full(site.settings.work_dir()):
        site.gate("go").touch()
        site.wait_until(lambda: _warnings(site, job_id))

    site.wait_for_success(job_id)

    attempts = site.attempts(job_id)
    assert set(site.reasons(job_id)) <= {EndReason.NODE_FAILED, EndReason.COMPLETED}, site.attempts_text(job_id)
    assert all((attempt.resumed_from_step or 0) >= 10 for attempt in attempts[1:]), site.attempts_text(job_id)
    return f"“{_warnings(site, job_id)[0]}” {site.attempts_text(job_id)}"


@fault(
    "disk-full-store",
    "disk full for the store",
    promise=REPORTED,
    small_disk="data/store",
    environment={"LORRY_LEASE_SECONDS": "30"},
)
def fill_disk_of_store(site: FaultSite) -> str:
    """A checkpoint is lost, but an adapter waits for free space."""
    job_id, _ = site.train_to_step_15()
    with _full(site.settings.data_dir / "store"):
        site.gate("go").touch()
        site.wait_until(lambda: _warnings(site, job_id))
        site.wait_for_file("jobs/*/adapter/adapter_model.safetensors")
        site.wait_seconds(2)
        assert site.job(job_id).state == JobState.RUNNING
        assert site.checkpoint_steps(job_id) == [10]

    told = _finish_stored(site, job_id)
    return f"“{_warnings(site, job_id)[0]}” The adapter waited for free space; {told}"


@fault(
    "disk-full-database",
    "disk full for SQLite",
    promise="reported by name; nothing is lost",
    small_disk="database",
    environment={"LORRY_LEASE_SECONDS": "30"},
)
def fill_disk_of_database(site: FaultSite) -> str:
    """SQLite's log may have space for a few more submissions."""
    file_id = site.upload(NUM_ROWS)
    site.start_api()
    job_id, _ = site.train_to_step_15()
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

    ends = _finish_stored(site, job_id)
    site.wait_for_end(*later)

    refusal = f"507 {answer.json()['error']['code']}"
    told = f"{number} submissions fitted, then {refusal}; accepted once there was free space again"
    return f"{told}. The running job: {ends}"


def _submit(site: FaultSite, file_id: str, number: int) -> httpx.Response:
    return site.post_job(file_id, idempotency_key=f"full-{number}", **SMALL)


def _warnings(site: FaultSite, job_id: str) -> list[str]:
    return [event.message for event in site.events(job_id) if event.level == "warn"]


@fault(
    "lost-and-restored",
    "database, store and all nodes are lost; a backup taken while the job trained is restored",
    promise="the job continues from the backup's checkpoint",
    databases=DATABASES,
)
def lose_all_and_restore(site: FaultSite) -> str:
    """The backup has the checkpoint of step 10. That of step 20 is made after it."""
    place = str(site.folder / "backups")
    job_id, worker = site.train_to_step_15()
    _command(site, "backup", place)
    site.gate("go").touch()
    site.wait_until(lambda: site.checkpoint_steps(job_id)[-1:] == [20])
    worker.kill()
    worker.wait()

    _lose_all(site)
    _command(site, "restore", place)
    site.finish(job_id)

    site.assert_attempts(job_id, EndReason.INFRA_LOST, EndReason.COMPLETED, resumed_from=10)
    _command(site, "verify")
    return site.attempts_text(job_id)


def _command(site: FaultSite, *arguments: str) -> None:
    site.assert_exits(site.start([sys.executable, "-m", "api", *arguments]))


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
