"""Assesses a soak from its observations and the database. Pure, so that it can be tested with planted records."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, get_args

from catalog.states import ENDINGS, MAX_COUNTED_ATTEMPTS, EndReason
from qa.chaos.audit.tables import Record
from qa.chaos.soak.process_keeper import Away, Window
from qa.chaos.soak.tenants import Sample
from worker.process.exit_status import WAS_KILLED

WEIGHTS_FILE = "adapter_model.safetensors"
UNAVAILABLE = 503
GRACE_SECONDS = 5.0
"""Grace time after an outage, in which connections are reopened."""
MAX_RATIO = 2.0
"""A guarantee: the limit for the median latency of each kind of request during faults, relative to the usual one."""
MIN_SAMPLES = 20
"""Minimum number of samples in each stretch, because the median of fewer samples is unreliable."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ended:
    """The result of one job."""

    job_id: str
    state: str
    error: Mapping[str, Any] | None = None
    reasons: Sequence[str | None] = ()
    """The reasons for which its attempts ended, in their order."""
    crashes: Sequence[str] = ()
    """The details of the attempts since its furthest checkpoint that count as failures."""
    digests: Sequence[str] = ()
    """Digests of its adapters' weights."""


def ended(found: Record, *, project_id: str) -> dict[str, Ended]:
    """Return the results of the project's jobs, by job id."""
    artifacts = {row["digest"]: row for row in found.artifacts}
    digests: dict[str, list[str]] = defaultdict(list)
    for adapter in found.adapters:
        files = artifacts[adapter["artifact"]]["files"]
        digests[adapter["job_id"]] += [file["digest"] for file in files if file["path"] == WEIGHTS_FILE]
    return {
        job["id"]: Ended(
            job_id=job["id"],
            state=job["state"],
            error=job["error"],
            reasons=[attempt["reason"] for attempt in found.attempts.get(job["id"], ())],
            crashes=_crashes(found, job["id"]),
            digests=digests[job["id"]],
        )
        for job in found.jobs
        if job["project_id"] == project_id
    }


def _crashes(found: Record, job_id: str) -> list[str]:
    """Return the details of the counted failures. The count restarts with a checkpoint that is further than all earlier
    ones."""
    own = [row for row in found.checkpoints if row["job_id"] == job_id]
    furthest = max(own, key=lambda row: row["step"], default={"created_at": 0.0})["created_at"]
    ended_since = [one for one in found.attempts.get(job_id, ()) if (one["ended_at"] or 0.0) > furthest]
    return [one["detail"] for one in ended_since if ENDINGS[EndReason(one["reason"])].is_counted]


def is_put_aside_by_kills(job: Ended) -> bool:
    """Return whether the failure of a job is expected: its trainer was killed too often without a new checkpoint in
    between, and only the soak sends SIGKILL."""
    is_quarantined = job.state == "failed" and (job.error or {}).get("code") == "quarantined"
    is_by_the_last = list(job.reasons[-1:]) == [EndReason.TRAINER_CRASHED]  # else too many of its workers were lost
    are_kills = len(job.crashes) >= MAX_COUNTED_ATTEMPTS and set(job.crashes) == {WAS_KILLED}
    return is_quarantined and is_by_the_last and are_kills


def problems(
    submitted: Mapping[str, str],
    samples: Iterable[Sample],
    jobs: Mapping[str, Ended],
    digests: Mapping[str, str],
    windows: Sequence[Window],
    *,
    of_operator: Iterable[Sample] = (),
) -> list[str]:
    """Return the problems of a soak that the auditor can't know: wrong bytes, lost jobs, and wrong answers.

    submitted: by key, the name of the submitted work. digests: by work, the digest of its result without any fault.
    of_operator: responses to requests that may be refused, for example a pause of a job that has just finished.
    """
    asked = list(samples)
    named = {sample.job_id: sample.key for sample in asked if sample.key is not None and sample.job_id is not None}
    found = [f"{key}: no response named a job" for key in submitted if key not in named.values()]
    for job_id, job in jobs.items():
        key = named.get(job_id)
        if key is None:
            found.append(f"{job_id}: it exists, but no response named it")
            continue
        if job.state != "succeeded" and not is_put_aside_by_kills(job):
            found.append(
                f"{key}: {job_id} is {job.state}, after {_told(job.reasons)}: {(job.error or {}).get('message')}"
            )
        undisturbed = digests[submitted[key]]
        if any(digest != undisturbed for digest in job.digests):
            found.append(f"{key}: {job_id} has the bytes {', '.join(job.digests)}, undisturbed {undisturbed}")
    found += _told_bad(asked, windows, lambda sample: _is_bad(sample, windows) or 400 <= sample.status < 500)
    return [*found, *_told_bad(of_operator, windows, lambda sample: _is_bad(sample, windows))]


def refusals(samples: Iterable[Sample]) -> Counter[str]:
    """Return texts about the responses with other statuses than 200, and how often each occurred."""
    found: Counter[str] = Counter()
    for sample in samples:
        if sample.status != 200:
            advice = " with Retry-After" if sample.retry_after else ""
            found[f"{sample.what}: {sample.status} {sample.told}{advice}"] += 1
    return found


def _told(reasons: Sequence[str | None]) -> str:
    return ", ".join(str(reason) for reason in reasons) or "no attempt"


def _told_bad(samples: Iterable[Sample], windows: Sequence[Window], is_bad: Callable[[Sample], bool]) -> Iterator[str]:
    for sample in samples:
        if is_bad(sample):
            away = " and ".join(sorted({window.what for window in windows if window.overlaps(sample.at, sample.until)}))
            told = f"{sample.what} at {sample.at:.1f}: {sample.status} {sample.told} after {sample.seconds:.2f} s"
            yield f"{told}, Retry-After {sample.retry_after}, away: {away or 'nothing'}"


def _is_bad(sample: Sample, windows: Sequence[Window]) -> bool:
    """Return whether a response is a problem. 503 with Retry-After is right while the service or its database is
    unavailable. Any other status of 500 or more is a problem, and so is no response while the API server runs."""
    if sample.status == 0:
        return not _is_in(sample, "api", windows)
    if sample.status != UNAVAILABLE or not sample.retry_after:
        return sample.status >= 500
    late = replace(sample, at=sample.at - GRACE_SECONDS, seconds=sample.seconds + GRACE_SECONDS)
    return not any(_is_in(late, what, windows) for what in get_args(Away))


def _is_in(sample: Sample, what: str, windows: Sequence[Window]) -> bool:
    return any(window.what == what and window.overlaps(sample.at, sample.until) for window in windows)


@dataclass(frozen=True, kw_only=True, slots=True)
class Latency:
    """Latencies of one kind of request in one stretch, in milliseconds. 0 if there was no request."""

    num: int
    median: float
    p95: float
    p99: float
    longest: float


@dataclass(kw_only=True, slots=True)
class Compared:
    """One kind of request: undisturbed, and during faults while the API server and its database were available."""

    what: str
    calm: Latency
    storm: Latency
    away: dict[str, Counter[str]] = field(default_factory=dict[str, Counter[str]])
    """How often each status was returned while the database or the API server was unavailable."""

    def ratio(self, name: str) -> float:
        calm = getattr(self.calm, name)
        return getattr(self.storm, name) / calm if calm else 0.0


def compare(
    samples: Iterable[Sample],
    windows: Sequence[Window],
    *,
    calm: tuple[float, float],
    storm: tuple[float, float],
) -> list[Compared]:
    """Compare the requests of both stretches. calm, storm: beginning and end, in seconds since 1970."""
    by_what: dict[str, list[Sample]] = defaultdict(list)
    for sample in samples:
        by_what[sample.what].append(sample)
    return [_compared(what, by_what[what], windows, calm, storm) for what in sorted(by_what)]


def slow(compared: Iterable[Compared]) -> list[str]:
    """Return texts about the kinds of request that are slower than guaranteed, or about a lack of samples."""
    enough = [each for each in compared if min(each.calm.num, each.storm.num) >= MIN_SAMPLES]
    if not enough:
        return [f"no kind of request was answered {MIN_SAMPLES} times both undisturbed and during faults"]
    return [
        f"{each.what}: median {each.storm.median:.1f} ms during faults, {each.calm.median:.1f} ms undisturbed: "
        f"{each.ratio('median'):.2f} times as long"
        for each in enough
        if each.ratio("median") > MAX_RATIO
    ]


def _compared(
    what: str,
    samples: list[Sample],
    windows: Sequence[Window],
    calm: tuple[float, float],
    storm: tuple[float, float],
) -> Compared:
    away: dict[str, Counter[str]] = {"database": Counter(), "api": Counter()}
    stormy: list[Sample] = []
    for sample in samples:
        if not storm[0] <= sample.at < storm[1]:
            continue
        if _is_in(sample, "api", windows):
            away["api"][_status(sample)] += 1
        elif _is_in(sample, "database", windows):
            away["database"][_status(sample)] += 1
        else:
            stormy.append(sample)
    quiet = [sample for sample in samples if calm[0] <= sample.at < calm[1]]
    return Compared(what=what, calm=_latency(quiet), storm=_latency(stormy), away=away)


def _status(sample: Sample) -> str:
    if sample.status == 0:
        return f"none ({sample.told})"
    return f"{sample.status}{' with Retry-After' if sample.retry_after else ''}"


def _latency(samples: Iterable[Sample]) -> Latency:
    waits = sorted(sample.seconds * 1000 for sample in samples)
    if not waits:
        return Latency(num=0, median=0.0, p95=0.0, p99=0.0, longest=0.0)
    return Latency(
        num=len(waits), median=_part(waits, 50), p95=_part(waits, 95), p99=_part(waits, 99), longest=waits[-1]
    )


def _part(waits: list[float], percent: int) -> float:
    return waits[min(len(waits) - 1, len(waits) * percent // 100)]
