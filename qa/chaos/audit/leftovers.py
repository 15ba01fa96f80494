"""Checks I7: no leaked leases, open rows, folders without an owner, or processes.

An object in the store that no row names is not a leak: Lorry deletes it when it is a day old.
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from pathlib import Path

import psutil

from qa.chaos.audit.findings import Finding
from qa.chaos.audit.tables import Tables

OWNED = ("trainers", "scratch", "workers")
"""Folders whose entries are deleted with their owner, which holds a lock next to each entry."""


def rows(found: Tables, *, now: float, lease_seconds: float) -> Iterator[Finding]:
    oldest = now - 2 * lease_seconds
    for job in found["jobs"]:
        is_held = job["claim_id"] is not None
        if is_held and (job["state"] != "running" or job["lease_expires_at"] is None):
            yield _leak(job["id"], f"it is {job['state']}, but the claim {job['claim_id']} holds it")
        if job["lease_expires_at"] is not None and (not is_held or job["lease_expires_at"] < oldest):
            yield _leak(job["id"], "its lease expired two leases ago, or has no claim")
        if (job["queued_at"] is not None) != (job["state"] == "queued" and not job["is_held"]):
            yield _leak(job["id"], f"it is {job['state']}, but queued_at is {job['queued_at']}")
    holder = {job["claim_id"]: job["id"] for job in found["jobs"] if job["claim_id"] is not None}
    for attempt in found["attempts"]:
        if attempt["ended_at"] is None and holder.get(attempt["claim_id"]) != attempt["job_id"]:
            yield _leak(attempt["claim_id"], f"attempt {attempt['number']} of {attempt['job_id']} never ended")
    ended = {worker["id"] for worker in found["workers"] if worker["ended_at"] is not None}
    for trainer in found["trainers"]:
        if trainer["ended_at"] is None and trainer["worker_id"] in ended:
            yield _leak(trainer["id"], f"its worker {trainer['worker_id']} has ended, but it has not")
    for task in found["tasks"]:
        if task["claim_id"] is not None and (task["lease_expires_at"] or 0.0) < oldest:
            yield _leak(f"{task['kind']} {task['subject']}", "the lease of the task expired two leases ago")


def on_machine(work_dir: Path) -> Iterator[Finding]:
    """Yield the leaks in a work folder whose workers have all exited."""
    for name in OWNED:
        for path in sorted((work_dir / name).glob("*")):
            if path.suffix == ".lock" and not _is_locked(path):
                yield _leak(path.name, f"a lock in {name} that no process holds")
            if path.suffix != ".lock" and not _is_locked(path.with_name(f"{path.name}.lock")):
                yield _leak(path.name, f"a folder in {name} without an owner")
    for process in processes(work_dir):
        yield _leak(str(process.pid), f"the process still runs: {' '.join(process.cmdline())[:200]}")


def processes(work_dir: Path) -> list[psutil.Process]:
    """Return the trainers and other children that work in the folder, except zombies."""
    found: list[psutil.Process] = []
    for process in psutil.process_iter():
        try:
            named = any(str(work_dir) in argument for argument in process.cmdline())
            if named and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def _is_locked(path: Path) -> bool:
    """Return whether a process holds the lock. False if the file does not exist."""
    if not path.exists():
        return False
    with path.open("r+b") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False


def _leak(subject: str, sentence: str) -> Finding:
    return Finding(invariant="I7", subject=subject, sentence=sentence)
