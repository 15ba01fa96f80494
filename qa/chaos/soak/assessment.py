"""Assesses a soak from its observations and the database. Pure, so that it can be tested with planted records."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import quantiles
from typing import Any, get_args

from catalog.states import ENDINGS, MAX_COUNTED_ATTEMPTS, EndReason
from qa.chaos.audit.tables import Tables
from qa.chaos.soak.storm import Away, Window
from qa.chaos.soak.tenants import Sample
from worker.process.exit_status import WAS_KILLED

WEIGHTS_FILE = "adapter_model.safetensors"
UNAVAILABLE = 503
GRACE_SECONDS = 5.0
"""Grace time after an outage, in which connections are reopened."""
MAX_RATIO = 2.0
"""A guarantee: the limit for the latency of each kind of request relative to the usual one: for the median during
faults, and for the p99 next to a noisy neighbor."""
MIN_SAMPLES = {"median": 20, "p99": 100}
"""Minimum number of samples in each stretch, because the figure is unreliable with fewer."""
MAX_RENEWAL = 1 / 3
"""Limit for the time between two heartbeats of a running worker, as a fraction of a lease."""
MIN_SHARE = 0.9
"""Minimum fraction of its fair share of device-seconds that a project must get while its jobs wait."""


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


def ended(tables: Tables, *, project_id: str) -> dict[str, Ended]:
    """Return the results of the project's jobs, by job id."""
    artifacts = {row["digest"]: row for row in tables["artifacts"]}
    found: dict[str, Ended] = {}
    for job in (job for job in tables["jobs"] if job["project_id"] == project_id):
        own = {
            name: [row for row in tables[name] if row["job_id"] == job["id"]]
            for name in ("attempts", "checkpoints", "adapters")
        }
        files = (file for adapter in own["adapters"] for file in artifacts[adapter["artifact"]]["files"])
        # the count of failures restarts with a checkpoint that is further than all earlier ones
        furthest = max(own["checkpoints"], key=lambda row: row["step"], default={"created_at": 0.0})["created_at"]
        ended_since = [row for row in own["attempts"] if (row["ended_at"] or 0.0) > furthest]
        found[job["id"]] = Ended(
            job_id=job["id"],
            state=job["state"],
            error=job["error"],
            reasons=[row["reason"] for row in own["attempts"]],
            crashes=[row["detail"] for row in ended_since if ENDINGS[EndReason(row["reason"])].is_counted],
            digests=[file["digest"] for file in files if file["path"] == WEIGHTS_FILE],
        )
    return found


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
            ends = ", ".join(map(str, job.reasons)) or "no attempt"
            found.append(f"{key}: {job_id} is {job.state}, after {ends}: {(job.error or {}).get('message')}")
        undisturbed = digests[submitted[key]]
        if any(digest != undisturbed for digest in job.digests):
            found.append(f"{key}: {job_id} has the bytes {', '.join(job.digests)}, undisturbed {undisturbed}")
    found += _told_bad(asked, windows, lambda sample: _is_bad(sample, windows) or 400 <= sample.status < 500)
    return [*found, *_told_bad(of_operator, windows, lambda sample: _is_bad(sample, windows))]


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
        return not _is_in(sample, windows, "api")
    if sample.status != UNAVAILABLE or not sample.retry_after:
        return sample.status >= 500
    late = replace(sample, at=sample.at - GRACE_SECONDS, seconds=sample.seconds + GRACE_SECONDS)
    return not _is_in(late, windows, *get_args(Away))


def _is_in(sample: Sample, windows: Sequence[Window], *whats: Away) -> bool:
    return any(window.what in whats and window.overlaps(sample.at, sample.until) for window in windows)


Span = tuple[float, float]
"""Beginning and end of a stretch, in seconds since 1970."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Latency:
    """Latencies of one kind of request in one stretch, in milliseconds. 0 if there were fewer than two requests."""

    num: int
    median: float = 0.0
    p95: float = 0.0
    p99: float = 0.0
    longest: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Compared:
    """One kind of request in two stretches, while the API server and its database were available."""

    what: str
    usual: Latency
    disturbed: Latency

    def ratio(self, name: str) -> float:
        usual = getattr(self.usual, name)
        return getattr(self.disturbed, name) / usual if usual else 0.0

    def is_enough_for(self, name: str) -> bool:
        return min(self.usual.num, self.disturbed.num) >= MIN_SAMPLES[name]


def compare(samples: Iterable[Sample], windows: Sequence[Window], *, usual: Span, disturbed: Span) -> list[Compared]:
    """Compare the requests of two stretches. Those during an outage do not count."""
    by_what: dict[str, list[Sample]] = defaultdict(list)
    for sample in samples:
        if not _is_in(sample, windows, *get_args(Away)):
            by_what[sample.what].append(sample)
    return [
        Compared(what=what, usual=_latency(by_what[what], usual), disturbed=_latency(by_what[what], disturbed))
        for what in sorted(by_what)
    ]


def _latency(samples: Iterable[Sample], span: Span) -> Latency:
    waits = [sample.seconds * 1000 for sample in samples if span[0] <= sample.at < span[1]]
    if len(waits) < 2:
        return Latency(num=len(waits))
    parts = quantiles(waits, n=100, method="inclusive")
    return Latency(num=len(waits), median=parts[49], p95=parts[94], p99=parts[98], longest=max(waits))


def slow(compared: Iterable[Compared], *, name: str = "median") -> list[str]:
    """Return texts about the kinds of request that are slower than guaranteed, or about a lack of samples."""
    enough = [each for each in compared if each.is_enough_for(name)]
    if not enough:
        return [f"no kind of request was answered {MIN_SAMPLES[name]} times both undisturbed and disturbed"]
    return [
        f"{each.what}: {name} {getattr(each.disturbed, name):.1f} ms disturbed, {getattr(each.usual, name):.1f} ms "
        f"undisturbed: {each.ratio(name):.2f} times as long"
        for each in enough
        if each.ratio(name) > MAX_RATIO
    ]


@dataclass(kw_only=True, slots=True)
class Stretch:
    """A stretch with or without a noisy neighbor. gaps: by worker, the longest time between two heartbeats, in
    seconds. device_seconds: used in the stretch, by project."""

    span: Span = (0.0, 0.0)
    gaps: dict[str, float] = field(default_factory=dict[str, float])
    device_seconds: dict[str, float] = field(default_factory=dict[str, float])
    num_waiting: int = 0
    """Jobs of the ordinary project that waited at the end."""

    @property
    def longest_gap(self) -> float:
        return max(self.gaps.values(), default=0.0)

    def share(self, project_id: str) -> float:
        """Return the project's fraction of all device-seconds."""
        used = sum(self.device_seconds.values())
        return self.device_seconds.get(project_id, 0.0) / used if used else 0.0


@dataclass(kw_only=True, slots=True)
class Isolated:
    """The measurements of both stretches, of which the ordinary project is `project_id`. statuses: of the neighbor's
    requests, by behavior."""

    project_id: str
    lease_seconds: float
    alone: Stretch = field(default_factory=Stretch)
    disturbed: Stretch = field(default_factory=Stretch)
    statuses: defaultdict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))


def effects(isolated: Isolated, compared: Sequence[Compared]) -> Iterator[str]:
    """Yield the effects of the neighbor on an ordinary tenant that exceed the limits. compared: requests of both
    stretches."""
    yield from slow(compared, name="p99")
    near, most = isolated.disturbed, isolated.lease_seconds * MAX_RENEWAL
    for worker_id, seconds in near.gaps.items():
        if seconds > most:
            yield f"{worker_id}: {seconds:.1f} s between two heartbeats, but a third of a lease is {most:.1f} s"
    if not near.gaps:
        yield "no worker sent a heartbeat next to the neighbor"
    if not near.num_waiting:
        yield "the ordinary project's queue was empty at the end, so its share is meaningless"
    num_projects = len(near.device_seconds)
    share, fair = near.share(isolated.project_id), 1 / max(1, num_projects)
    if num_projects < 2:
        yield "the neighbor used no device"
    if share < fair * MIN_SHARE:
        yield f"the ordinary project got {share:.1%} of the device-seconds, but its fair share is {fair:.1%}"
