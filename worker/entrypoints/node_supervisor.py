"""Runs a node's workers, one process for each device group, until all have exited.

`python -m worker.entrypoints.node_supervisor 0,1 2 3`

It knows nothing of jobs. SIGTERM is passed on, and each worker saves what it holds; at a second one all leave at once.
A worker that dies is started again after a while; one that ends well, as a drained one does, has ended.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from types import FrameType

from catalog import logs
from catalog.process_inspection import deny_inspection
from catalog.settings import Settings
from worker.node import devices
from worker.node.devices import Device
from worker.process.parent_watch import tethered

log = logging.getLogger("worker")
FIRST_RESTART_SECONDS = 1.0
LONGEST_RESTART_SECONDS = 30.0
HEALTHY_SECONDS = 60.0
"""Who lived so long begins anew with the shortest wait."""
AT_ONCE_SECONDS = 5.0
"""After a second signal, until who still lives is killed."""
TICK_SECONDS = 0.1
CELERY = ("celery", "-A", "worker.entrypoints.celery_app", "worker", "-c", "1", "-Q", "lorry", "-l", "INFO")
UNBOUND = ("--without-gossip", "--without-mingle")
"""Workers that neither listen to nor ask each other: what they have in common is in the database."""


@dataclass(kw_only=True, slots=True)
class GroupWorker:
    """The process of one group, and what decides when it is started again."""

    group: str
    start: Callable[[], subprocess.Popen[bytes]]
    process: subprocess.Popen[bytes] | None = None
    """None before it is started, and once its end was seen."""
    started_at: float = 0.0
    num_deaths: int = 0
    restart_at: float | None = field(default=0.0)
    """None: it runs, or has ended for good."""


class NodeSupervisor:
    """`run` returns the exit status: 0 where all ended in good order, else 128 and the second signal's number."""

    def __init__(
        self,
        workers: Sequence[GroupWorker],
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._workers = workers
        self._clock = clock
        self._sleep = sleep
        self._heard: list[int] = []
        self._num_passed_on = 0

    def hear(self, number: int) -> None:
        """A signal has come."""
        self._heard.append(number)

    def run(self) -> int:
        killed_at: float | None = None
        while self._has_work():
            for worker in self._workers:
                self._keep(worker)
            self._pass_on()
            if len(self._heard) > 1 and killed_at is None:
                killed_at = self._clock() + AT_ONCE_SECONDS
            if killed_at is not None and self._clock() >= killed_at:
                self._kill_all()
            self._sleep(TICK_SECONDS)
        return 128 + self._heard[1] if len(self._heard) > 1 else 0

    def _has_work(self) -> bool:
        to_come = not self._heard and any(worker.restart_at is not None for worker in self._workers)
        return to_come or any(worker.process is not None for worker in self._workers)

    def _keep(self, worker: GroupWorker) -> None:
        """See whether it has ended, and start it where that is due."""
        now = self._clock()
        if worker.process is not None and (status := worker.process.poll()) is not None:
            worker.process = None
            self._bury(worker, status, now)
        if worker.process is None and worker.restart_at is not None and now >= worker.restart_at and not self._heard:
            worker.process, worker.started_at, worker.restart_at = worker.start(), now, None

    def _bury(self, worker: GroupWorker, status: int, now: float) -> None:
        if status == 0 or self._heard:
            log.info("The worker of %s has ended (status %d).", worker.group, status)
            return
        worker.num_deaths = 1 if now - worker.started_at >= HEALTHY_SECONDS else worker.num_deaths + 1
        wait = min(LONGEST_RESTART_SECONDS, FIRST_RESTART_SECONDS * 2.0 ** (worker.num_deaths - 1))
        worker.restart_at = now + wait
        log.warning("The worker of %s died (status %d); it is started again in %g s.", worker.group, status, wait)

    def _pass_on(self) -> None:
        """Each signal once, to the workers' own processes: their trainers are their business."""
        while self._num_passed_on < len(self._heard):
            self._num_passed_on += 1
            for worker in self._workers:
                if worker.process is not None and _is_alive(worker):
                    worker.process.send_signal(signal.SIGTERM)

    def _kill_all(self) -> None:
        for worker in self._workers:
            if worker.process is not None and _is_alive(worker):
                worker.process.kill()


def _is_alive(worker: GroupWorker) -> bool:
    return worker.process is not None and worker.process.poll() is None


def main(arguments: Sequence[str] | None = None) -> int:
    logs.configure("info")
    deny_inspection()
    settings = Settings()
    groups = choose(_parse(arguments).groups)
    settings.data_dir.mkdir(parents=True, exist_ok=True)
    supervisor = NodeSupervisor([_worker(group, device, settings) for group, device in groups.items()])

    def on_signal(number: int, _frame: FrameType | None) -> None:
        supervisor.hear(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)
    return supervisor.run()


def choose(named: Sequence[str]) -> dict[str, Device]:
    """Device groups by the text that names them; none named: each GPU, else the CPU. Ends the program where one is
    none, or two share a device."""
    texts = list(named) or [",".join(map(str, found.indices)) or "cpu" for found in devices.find_devices()]
    groups = [(text, devices.choose_device(text)) for text in texts]
    for (text, one), (other_text, other) in combinations(groups, 2):
        shared = _shared(one, other)
        if shared is not None:
            raise SystemExit(f"{shared} in two groups, {text} and {other_text}. Each belongs to one worker.")
    return dict(groups)


def _shared(one: Device, other: Device) -> str | None:
    gpus = sorted(set(one.indices) & set(other.indices))
    if gpus:
        return f"GPU {gpus[0]} is"
    if one.kind == other.kind == "cpu":
        cores = sorted(set(one.cores) & set(other.cores))
        return f"Core {cores[0]} is" if cores else "The CPU is" if not (one.cores and other.cores) else None
    return None


def _worker(group: str, device: Device, settings: Settings) -> GroupWorker:
    environment = group_environment(group, device, os.environ)
    argv = tethered(group_argv(group, has_broker=is_rung_for(settings)))
    folder = Path(settings.data_dir)

    def start() -> subprocess.Popen[bytes]:
        log.info("Starting the worker of %s.", group)
        return subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, env=environment, cwd=folder, start_new_session=True
        )  # Ctrl-C reaches us alone

    return GroupWorker(group=group, start=start)


def is_rung_for(settings: Settings) -> bool:
    """Whether a doorbell tells the workers of all that they are to do: nobody rings where one of a gang is called."""
    return settings.redis_url is not None and settings.gang is None


def group_argv(group: str, *, has_broker: bool) -> list[str]:
    """The command of one group's worker: Celery's where a broker is set, else the embedded loop. -P: a folder of that
    name where somebody stands must not be taken for ours."""
    python = [sys.executable, "-P", "-m"]
    if not has_broker:
        return [*python, "worker.entrypoints.loop", "--device", group]
    name = "".join(letter if letter.isalnum() else "-" for letter in group)
    return [*python, *CELERY, *UNBOUND, "-n", f"group-{name}@%h"]


def group_environment(group: str, device: Device, given: Mapping[str, str]) -> dict[str, str]:
    """A trainer of some cores has as many threads, be more set for the whole node or not."""
    environment = {**given, "LORRY_DEVICE": group}
    environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # waiting threads sleep, or two processes starve each other
    if device.cores:
        environment["OMP_NUM_THREADS"] = str(min(len(device.cores), _threads_given(given) or len(device.cores)))
    return environment


def _threads_given(given: Mapping[str, str]) -> int:
    text = given.get("OMP_NUM_THREADS", "")
    return int(text) if text.isdecimal() else 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m worker.entrypoints.node_supervisor", description=__doc__)
    told = (
        "a device group for each worker: GPUs by number (0,1), cpu, or cores (cpu:0-3); none: every GPU, else the CPU"
    )
    parser.add_argument("groups", nargs="*", help=told)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
