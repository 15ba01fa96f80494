"""Faults of the store: damaged checkpoints, and an S3 server that fails, loses answers, is slow or lets nobody in."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from sqlalchemy import select

from catalog.states import EndReason
from catalog.tables import Artifact, Checkpoint
from tests.faults.row import Row
from tests.faults.site import FaultSite
from tests.services.fault_proxy import Asked, FaultProxy, Verdict, http_answer
from tests.worker_site import is_gone_in_time

BROKEN = http_answer("500 Internal Server Error", "<Error><Code>InternalError</Code></Error>")
EXPIRED = http_answer("403 Forbidden", "<Error><Code>ExpiredToken</Code></Error>")
SLOW_BYTES_PER_SECOND = 80_000
"""A checkpoint takes longer than a lease."""


def _damaged(site: FaultSite, *, spoil: Callable[[FaultSite, Path], None]) -> str:
    """The newest checkpoint of a job whose worker was killed."""
    job_id = site.submit_small()
    first = site.start_worker(FAILPOINT="step_25:hang")
    site.wait_until(lambda: site.checkpoint_steps(job_id) == [10, 20])
    trainer = site.trainer_of(first)
    first.kill()
    assert is_gone_in_time(trainer)
    spoil(site, _blob_of(site, job_id, step=20))

    site.finish(job_id)

    assert site.reasons(job_id) == [EndReason.INFRA_LOST, EndReason.COMPLETED], site.told(job_id)
    assert site.attempts(job_id)[1].resumed_from_step == 10, site.told(job_id)
    warned = [event.message for event in site.events(job_id) if "can't be used" in event.message]
    assert len(warned) == 1, warned
    return f"told, and resumed from step 10: {site.told(job_id)}"


def _blob_of(site: FaultSite, job_id: str, *, step: int) -> Path:
    """The largest file of a checkpoint, as it lies in the store's folder."""
    wanted = select(Artifact).join(Checkpoint, Checkpoint.artifact == Artifact.digest)
    with site.db.read() as session:
        artifact = session.scalars(wanted.where(Checkpoint.job_id == job_id, Checkpoint.step == step)).one()
    digest = max(artifact.files, key=lambda file: file["num_bytes"])["digest"]
    return site.settings.data_dir / "store" / "blobs" / digest[:2] / digest


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
    """Between the worker and its store, from the first checkpoint on."""
    assert site.under.store is not None
    job_id = site.submit_small()
    site.start_worker(FAILPOINT=f"uploading:wait={site.gate('store')}")
    site.wait_for_file("jobs/*/checkpoints/step-10-adapter/adapter_model.safetensors")
    fault(site.under.store)
    site.gate("store").touch()

    told = also(site, site.under.store)

    site.wait_for_success(job_id)
    assert site.reasons(job_id) == [EndReason.COMPLETED], site.told(job_id)
    return f"{told}; {site.told(job_id)}"


class Some:
    """A judge of the first few writes; the others pass."""

    def __init__(self, verdict: Verdict, number: int) -> None:
        self.num_left = number
        self._verdict: Verdict = verdict

    def __call__(self, asked: Asked) -> Verdict:
        if asked.method != "PUT" or not self.num_left:
            return "pass"
        self.num_left -= 1
        return self._verdict


def _fail_some(proxy: FaultProxy, *, verdict: Verdict) -> None:
    proxy.judge = Some(verdict, 5)


class Nobody:
    """A judge who lets nobody in."""

    def __init__(self) -> None:
        self.num_refused = 0

    def __call__(self, _: Asked) -> Verdict:
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


ROWS = (
    *(
        Row(
            name=f"checkpoint-{name}",
            fault=f"the newest checkpoint {words}",
            also="detected; the older one is used",
            act=partial(_damaged, spoil=spoil),
        )
        for name, words, spoil in (
            ("truncated", "is a byte short", _truncate),
            ("flipped", "has one bit flipped", _flip_bit),
            ("missing", "lacks a file", _remove),
        )
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
            ("500", "500 amid a write, five times", partial(_fail_some, verdict=BROKEN), _until_all_failed),
            (
                "answer-lost",
                "the answer of a write that succeeded is lost, five times",
                partial(_fail_some, verdict="lose the answer"),
                _until_all_failed,
            ),
            ("slow", "so slow that a checkpoint takes longer than a lease", _slow_down, _slowly),
            ("expired", "credentials expire for two leases", _expire, _for_two_leases),
        )
    ),
)
