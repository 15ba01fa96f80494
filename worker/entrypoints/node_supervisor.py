"""Runs a node's workers, one process for each device group, until all have exited.

`python -m worker.entrypoints.node_supervisor 0,1 2 3`

It knows nothing about jobs. It forwards SIGTERM, so that each worker saves its jobs. At a second SIGTERM, all workers
exit at once. A worker that fails is restarted (`lorry.local.supervisor`). A worker that exits with status 0, for
example after a drain, is not restarted.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations

from catalog import logs
from catalog.processes import deny_inspection
from catalog.settings import Settings
from lorry.local.child import Child
from lorry.local.supervisor import TICK_SECONDS, Process, ProcessSupervisor
from worker.context.context import settings_or_exit
from worker.node import devices
from worker.node.devices import Device

log = logging.getLogger("worker")
AT_ONCE_SECONDS = 5.0
"""After a second signal, the remaining workers are killed after this time."""


class GroupWorker(Child):
    """The worker of one device group, named after the group. It writes to the output of this process."""

    def start(self) -> None:
        log.info("Starting the worker of %s.", self.name)
        super().start()


class NodeSupervisor:
    """Supervises the workers. `run` returns the exit status: 0, or 128 plus the number of a second signal."""

    def __init__(
        self,
        workers: Sequence[Process],
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._workers = ProcessSupervisor(workers, on_exit=_log_exit, restarts_after_success=False, clock=clock)
        self._clock = clock
        self._sleep = sleep
        self._signals: list[int] = []

    def handle_signal(self, number: int) -> None:
        """Handle a signal."""
        self._signals.append(number)
        self._workers.stop_restarts()

    def run(self) -> int:
        num_forwarded = 0
        kill_at: float | None = None
        while self._workers.is_active:
            self._workers.check()
            for _ in self._signals[num_forwarded:]:
                num_forwarded += 1
                for worker in self._workers.running():  # not to its trainers, which the worker itself stops
                    worker.terminate()
            if num_forwarded > 1:
                kill_at = kill_at or self._clock() + AT_ONCE_SECONDS
                if self._clock() >= kill_at:
                    for worker in self._workers.running():
                        worker.kill()
            self._sleep(TICK_SECONDS)
        return 128 + self._signals[1] if len(self._signals) > 1 else 0


def _log_exit(worker: Process, status: int, wait: float | None) -> None:
    if wait is None:
        log.info("The worker of %s exited with status %d.", worker.name, status)
    else:
        log.warning("The worker of %s exited with status %d; restarting it in %g s.", worker.name, status, wait)


def main(arguments: Sequence[str] | None = None) -> int:
    logs.configure("info")
    deny_inspection()
    settings = settings_or_exit()
    groups = choose(_named_groups(arguments, os.environ))
    settings.data_dir.mkdir(parents=True, exist_ok=True)
    supervisor = NodeSupervisor([_worker(group, device, settings) for group, device in groups.items()])
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _frame: supervisor.handle_signal(number))
    return supervisor.run()


def _named_groups(arguments: Sequence[str] | None, given: Mapping[str, str]) -> list[str]:
    """Return the groups of the command line. Raises SystemExit if only LORRY_DEVICE names devices.

    LORRY_DEVICE is a setting of one worker. Without an error, the workers would use other devices than those.
    """
    groups: list[str] = _parse(arguments).groups
    device = given.get("LORRY_DEVICE", "")
    if groups or device in ("", "auto"):
        return groups
    raise SystemExit(
        f"LORRY_DEVICE is {device!r}, but this command reads its device groups from its arguments. Unset LORRY_DEVICE, "
        f"and name the groups: `lorry worker --groups {device}`. With Docker Compose, set LORRY_GROUPS={device} in "
        ".env instead."
    )


def choose(named: Sequence[str]) -> dict[str, Device]:
    """Return the device groups by the text that names them. Default: one for each GPU, else the CPU. Raises SystemExit
    if a group is invalid, or two groups share a device."""
    texts = list(named) or [",".join(map(str, found.indices)) or "cpu" for found in devices.find_devices()]
    groups = [(text, devices.choose_device(text)) for text in texts]
    for (text, one), (other_text, other) in combinations(groups, 2):
        shared = _shared(one, other)
        if shared is not None:
            raise SystemExit(f"{shared} in two groups, {text} and {other_text}. Assign each device to one worker.")
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
    argv = group_argv(group, has_broker=uses_broker(settings))
    return GroupWorker(group, argv, env=group_environment(group, device, os.environ), cwd=settings.data_dir)


def uses_broker(settings: Settings) -> bool:
    """Return whether messages announce all work. They do not in a gang: no message announces a round."""
    return settings.redis_url is not None and settings.gang is None


def group_argv(group: str, *, has_broker: bool) -> list[str]:
    """Return the command of one group's worker: Celery if a broker is set, else the embedded loop. -P prevents Python
    from importing a folder with the same name from the working directory."""
    python = [sys.executable, "-P", "-m"]
    if not has_broker:
        return [*python, "worker.entrypoints.loop", "--device", group]
    name = "".join(letter if letter.isalnum() else "-" for letter in group)
    return [*python, "worker.entrypoints.celery_worker", "-n", f"group-{name}@%h"]


def group_environment(group: str, device: Device, given: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of one group's worker. A trainer on some cores gets at most one thread per core, even if
    more threads are set for the node."""
    environment = {**given, "LORRY_DEVICE": group}
    environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # waiting threads sleep, or two processes starve each other
    if device.cores:
        environment["OMP_NUM_THREADS"] = str(min(len(device.cores), _threads_set(given) or len(device.cores)))
    return environment


def _threads_set(given: Mapping[str, str]) -> int:
    text = given.get("OMP_NUM_THREADS", "")
    return int(text) if text.isdecimal() else 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m worker.entrypoints.node_supervisor", description=__doc__)
    groups_help = (
        "one device group per worker: GPU numbers (0,1), cpu, or cores (cpu:0-3); default: every GPU, else the CPU"
    )
    parser.add_argument("groups", nargs="*", help=groups_help)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
