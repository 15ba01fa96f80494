"""A trainer that is a script. Each wait of its worker advances the script by one step."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any

from catalog.history import queries
from tests.worker.pack_site import READY, PackSite
from worker.protocol.mailbox import EventWriter, InboxReader, TrainerDirectory, TrainerMessage

Script = Callable[["FakeTrainer"], Generator[None]]


class FakeTrainer:
    """Exits when its script ends."""

    started_at = float("inf")
    oom_kills_before = 0

    def __init__(self, directory: TrainerDirectory, script: Script) -> None:
        self.returncode: int | None = None
        self.is_killed = False
        self.is_left_behind = False
        """If the script sets this, no signal stops the trainer."""
        self.received: list[TrainerMessage] = []
        self.directory = directory
        self._events = EventWriter(directory)
        self._inbox = InboxReader(directory)
        self._script = script(self)

    def emit(self, kind: str, **body: Any) -> None:
        self._events.write({"type": kind, **body})

    def listen(self, verb: str) -> Generator[None, None, TrainerMessage]:
        """Wait until the worker has sent this verb."""
        while True:
            self.received += self._inbox.take()
            for message in self.received:
                if message.verb == verb:
                    self.received.remove(message)
                    return message
            yield

    def send_heartbeat(self, began_at: float | None = None) -> None:
        pass

    def begin(self, settings: dict[str, Any]) -> None:
        self.directory.begin(settings)

    def wait(self, seconds: float) -> bool:
        if self.returncode is None and next(self._script, "over") == "over":
            self.returncode = 0
        return self.returncode is not None

    @property
    def is_awaited(self) -> bool:
        return self.returncode is None and not (self.is_killed and self.is_left_behind)

    def pids(self) -> list[int]:
        return []

    def kill(self) -> None:
        if self.returncode is None:
            self.is_killed = True
            if not self.is_left_behind:
                self.returncode = -9

    def close(self) -> None:
        self.kill()
        self._events.close()


def cancel_first_job(trainer: FakeTrainer) -> Generator[None]:
    """Load the base, admit a job, report that it was cancelled, and exit."""
    trainer.emit("ready", **{name: value for name, value in READY.items() if name != "type"})
    admit = yield from trainer.listen("admit")
    trainer.emit("cancelled", claim_id=admit.body["claim_id"])
    yield


def load_forever(trainer: FakeTrainer) -> Generator[None]:
    while True:
        yield


def reasons(site: PackSite, job_id: str) -> list[str | None]:
    return [attempt.reason for attempt in queries.attempts(site.db, **site.world.of(job_id))]


def raising(error: Exception) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail
