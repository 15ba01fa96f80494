"""Faults of the store: damaged checkpoints, and an S3 server that fails, loses responses, is slow or denies access."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from hashlib import sha256
from pathlib import Path

import httpx
from sqlalchemy import Select, select

from catalog.states import EndReason
from catalog.storage.object_storage import CHUNK_BYTES
from catalog.tables.history import Checkpoint
from catalog.tables.storage import Artifact
from qa.chaos.scenario import Row
from qa.chaos.service import PATIENCE_SECONDS, FaultSite
from tests.services.fault_proxy import FaultProxy, RequestLine, Verdict, http_answer
from tests.tiny_base import write_chat
from tests.worker_site import is_gone_in_time

BROKEN = http_answer("500 Internal Server Error", "<Error><Code>InternalError</Code></Error>")
EXPIRED = http_answer("403 Forbidden", "<Error><Code>ExpiredToken</Code></Error>")
SLOW_BYTES_PER_SECOND = 30_000
"""A checkpoint takes longer than a lease."""
PART = "partNumber="
"""Occurs only in the URLs of the parts of a multipart upload."""
ALL = 1000
NUM_LARGE_ROWS = 60_000
"""Number of rows of a file that is larger than one part."""


def _damaged(site: FaultSite, *, spoil: Callable[[FaultSite, Path], None]) -> str:
    """Damage the newest checkpoint of a job whose worker was killed."""
    job_id = site.submit_small()
    first = site.start_worker(FAILPOINT="step_25:hang")
    site.wait_until(lambda: site.checkpoint_steps(job_id) == [10, 20])
    trainer = site.trainer_of(first)
    first.kill()
    assert is_gone_in_time(trainer)
    spoil(site, _blobs_of(site, job_id, step=20)["row.safetensors"])

    site.finish(job_id)

    assert site.reasons(job_id) == [EndReason.INFRA_LOST, EndReason.COMPLETED], site.attempts_text(job_id)
    assert site.attempts(job_id)[1].resumed_from_step == 10, site.attempts_text(job_id)
    warned = [event.message for event in site.events(job_id) if "can't be used" in event.message]
    assert len(warned) == 1, warned
    return f"reported, and resumed from step 10: {site.attempts_text(job_id)}"


def _anothers(site: FaultSite, *, put: Callable[[FaultSite, str, str], None], says: str) -> str:
    """Replace the newest checkpoint of a job whose worker was killed with a valid checkpoint of another job."""
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
    put(site, job_id, other)

    site.finish(job_id)
    site.wait_for_success(other, is_small=False)

    assert site.reasons(job_id)[-1] == EndReason.COMPLETED, site.attempts_text(job_id)
    assert site.attempts(job_id)[-1].resumed_from_step == 10, site.attempts_text(job_id)
    assert site.weights_digest(other) != site.weights_digest(job_id), "one job has the other's bytes"
    (warned,) = [event.message for event in site.events(job_id) if "can't be used" in event.message]
    assert says in warned, warned
    return f"“{warned}” {site.attempts_text(job_id)}"


def _put_files(site: FaultSite, job_id: str, other: str) -> None:
    """Store the bytes of the other job's files under the digests of this job's files."""
    theirs = _blobs_of(site, other, step=10)
    for name, path in _blobs_of(site, job_id, step=20).items():
        path.write_bytes(theirs[name].read_bytes())


def _put_row(site: FaultSite, job_id: str, other: str) -> None:
    """Make the row of the checkpoint name the other job's files, which match their digests."""
    steps = {job_id: 20, other: 10}
    with site.db.write() as session:
        mine, theirs = (session.scalars(_of_step(job, step)).one() for job, step in steps.items())
        mine.artifact = theirs.artifact


def _of_step(job_id: str, step: int) -> Select[Checkpoint]:
    return select(Checkpoint).where(Checkpoint.job_id == job_id, Checkpoint.step == step)


def _blobs_of(site: FaultSite, job_id: str, *, step: int) -> dict[str, Path]:
    """Return the paths of a checkpoint's files in the store, by their names."""
    with site.db.read() as session:
        checkpoint = session.scalars(_of_step(job_id, step)).one()
        files = session.get_one(Artifact, checkpoint.artifact).files
    folder = site.settings.data_dir / "store" / "blobs"
    return {file["path"]: folder / file["digest"][:2] / file["digest"] for file in files}


def _truncate(_site: FaultSite, path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _flip_bit(_site: FaultSite, path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _remove(_site: FaultSite, path: Path) -> None:
    path.unlink()


def _failing(
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


def _fail_some(proxy: FaultProxy, *, verdict: Verdict) -> None:
    proxy.judge = Some(verdict, 5)


class Nobody:
    """A judge that denies all requests."""

    def __init__(self) -> None:
        self.num_refused = 0

    def __call__(self, _: RequestLine) -> Verdict:
        self.num_refused += 1
        return EXPIRED


def _expire(proxy: FaultProxy) -> None:
    proxy.judge = Nobody()


def _slow_down(proxy: FaultProxy) -> None:
    proxy.bytes_per_second = SLOW_BYTES_PER_SECOND


def _until_all_failed(site: FaultSite, proxy: FaultProxy) -> str:
    judge = proxy.judge
    assert isinstance(judge, Some)
    site.wait_until(lambda: judge.num_left == 0)
    return "5 writes, retried"


def _for_two_leases(site: FaultSite, proxy: FaultProxy) -> str:
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


def _slowly(site: FaultSite, _proxy: FaultProxy) -> str:
    seconds = site.seconds_until(lambda: _num_checkpoints(site))
    assert seconds > site.settings.lease_seconds, f"a checkpoint took {seconds:.0f} s: that is not slow"
    return f"at {SLOW_BYTES_PER_SECOND // 1000} kB/s the first checkpoint took {seconds:.0f} s"


def _in_parts(site: FaultSite) -> str:
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


ROWS = (
    *(
        Row(
            name=f"checkpoint-{name}",
            fault=f"the newest checkpoint {words}",
            also="detected; the older one is used",
            act=partial(_damaged, spoil=spoil),
        )
        for name, words, spoil in (
            ("truncated", "is truncated by one byte", _truncate),
            ("flipped", "has one bit flipped", _flip_bit),
            ("missing", "lacks a file", _remove),
        )
    ),
    *(
        Row(
            name=f"checkpoint-anothers-{name}",
            fault=f"the newest checkpoint is another job's: {words}",
            also="detected; the older one is used, and both jobs have their own bytes",
            act=partial(_anothers, put=put, says=says),
        )
        for name, words, put, says in (
            ("files", "its files are in the store under this job's digests", _put_files, "has changed"),
            ("record", "this checkpoint's row names its intact files", _put_row, "belongs to another job"),
        )
    ),
    Row(
        name="store-500-in-parts",
        fault="S3: 500 for parts of a multipart upload, until the API server gives up, and then three times",
        also="no partial file visible; retry idempotent",
        act=_in_parts,
        has_s3=True,
    ),
    *(
        Row(
            name=f"store-{name}",
            fault=f"S3: {words}",
            also="no partial artifact visible; retry idempotent",
            act=partial(_failing, fault=fault, also=also),
            has_s3=True,
        )
        for name, words, fault, also in (
            ("500", "500 during a write, five times", partial(_fail_some, verdict=BROKEN), _until_all_failed),
            (
                "answer-lost",
                "the response to a successful write is lost, five times",
                partial(_fail_some, verdict="lose the answer"),
                _until_all_failed,
            ),
            ("slow", "so slow that a checkpoint takes longer than a lease", _slow_down, _slowly),
            ("expired", "credentials expire for two leases", _expire, _for_two_leases),
        )
    ),
)
