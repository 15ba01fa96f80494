"""The messages between a worker and its trainer, which are files in one directory. This module contains both ends.

The worker writes trainer.json and inbox/NNNN-verb.json; the trainer writes events.jsonl and safetensors. Inference has
pipes of its own (answer_pipes.py), because each token is an event. A message is written atomically (temporary file,
then rename). An event is one flushed line. An optional field has a question mark. Paths are relative to the directory.
An `error` has code, message and remedy. `rewards` are those of lora_core.events. A span has name, began_at and
ended_at, in seconds since 1970. On a GPU, `checkpointed` may follow events of later steps, but neither `finished` nor
an event after which the job has left.

    To the trainer          Body
    admit                   AdmitBody
    pause, preempt          claim_id: str
    cancel                  claim_id: str
    drain                   -
    unload                  -

    To it, by pipe          Body
    answer                  AnswerBody
    stop_answering          request_id: str

    From the trainer        Body, in addition to type: str and seconds: float (the trainer's monotonic clock)
    ready                   pid: int, device: str, processor: str, dtype: str, quantization: str, invariance: str,
                            num_threads: int, num_processes: int, strategy: str, load_seconds: float,
                            probe_seconds: float, elementwise_kernels: str, versions: dict[str, str],
                            memory: dict[str, int], spans: list[span]
    load_refused            error: error, ranks: list[int]
    memory                  verifying: bool, base_bytes: int, adapter_bytes: int, peak_bytes: int, cached_bytes: int,
                            tokens_per_second: float, tick_speeds: dict[str, list[tuple[int, float]]]
    idle                    -
    unloaded                -
    admitted                claim_id: str, step: int, num_steps: int, num_parameters: int, steps_per_epoch: float
    refused                 claim_id: str, error: error, is_checkpoint: bool
    stepped                 claim_id: str, step: int, loss: float, learning_rate: float, grad_norm: float,
                            num_tokens: int, num_supervised_tokens: int, token_accuracy: float, rewards: rewards | None
    evaluated               claim_id: str, step: int, loss: float, token_accuracy: float, num_supervised_tokens: int,
                            rewards: rewards | None
    sampled                 claim_id: str, step: int, samples: list[dict[str, str | int | bool]]
    unsampled               claim_id: str, step: int, error: error
    checkpointed            claim_id: str, step: int, folder: str, adapter: str | None, num_parameters?: int,
                            spans?: list[span]
    checkpoint_failed       claim_id: str, step: int, error: error
    checkpoint_unexported   claim_id: str, step: int, error: error
    paused                  claim_id: str, step: int, adapter: str | None, num_parameters?: int
    cancelled               claim_id: str
    diverged                claim_id: str, step: int, good_step: int | None, message: str
    finished                claim_id: str, step: int, kept_step: int, stopped_early: str | None
    exported                claim_id: str, step: int, kept_step: int, stopped_early: str | None, folder: str,
                            num_parameters: int, trained_tokens: int, report: dict, memory?: dict[str, int],
                            spans: list[span]

    From it, by pipe        Body, as for events
    answering               request_id: str, prompt_tokens: int, generation: dict (see _generation in
                            children/trainer/inference.py)
    generated               request_id: str, deltas: list[delta], completion_tokens: int (so far); a delta has index,
                            text, num_tokens (so far), logprobs? and finish?
    answered                request_id: str, completion_tokens: int
    unanswered              request_id: str, error: error
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict, cast

from catalog.datasets.messages import ChatMessage
from catalog.disk import full_disk_named
from catalog.errors import LorryError, StaleClaim
from worker.protocol.errors import rank_log
from worker.protocol.event_fields import wrong_field
from worker.protocol.trainer_paths import FolderEntry, UnsafePath, confined, delete, open_file, opened

Json = dict[str, Any]
LONGEST_LINE_BYTES = 2**22
"""Limit for one event, and for what one call reads from a trainer's events."""
ROTATED_BYTES = 2**26
"""Size at which the trainer continues its events in another file."""
CONTINUED = "continued"
"""Type of the last line of such a file, which only EventReader sees."""
LATEST_SECONDS = 1e12
Verb = Literal["admit", "cancel", "pause", "preempt", "drain", "unload"]
"""admit: train a job. cancel: discard it. pause, preempt: save its checkpoint, then discard it. drain: pause all jobs,
then exit. unload: exit if no job is admitted."""


class AdmitBody(TypedDict):
    """The body of `admit`. The worker writes it (staging.py) and the trainer reads it (message_handlers.py)."""

    claim_id: str
    job_id: str
    base_name: str
    base_revision: str | None
    """This and `base_name`: the reference to the base model in adapter_config.json."""
    spec: Json
    num_steps: int
    evaluate_every_steps: int
    checkpoint_every_steps: int
    answered_steps: list[int]
    """Evaluated steps whose answers to the job's prompts are recorded."""
    asks_as_chat: bool
    """The base model's chat template renders each prompt as a user's turn."""
    shortages: int
    """Earlier attempts of the job that ran out of memory."""
    train: str
    valid: str | None
    resume: str | None
    parent: str | None
    trace: str | None
    """The W3C traceparent of the claim."""


class StagedAdapter(TypedDict):
    """An adapter in the trainer's directory. `digest` identifies its files."""

    digest: str
    folder: str


class AnswerBody(TypedDict):
    """The body of `answer`, which answers an inference request: with all defaults, except max_tokens.

    It has either `messages` or `prompts`. There are `n` answers to each prompt; the one with number i in the request
    has the seed `seed` + i.
    """

    request_id: str
    model: str
    adapter: StagedAdapter | None
    messages: NotRequired[list[ChatMessage]]
    tools: NotRequired[list[Json]]
    prompts: NotRequired[list[str]]
    max_tokens: int | None
    """None: up to the maximum length of the base model."""
    n: int
    stop: list[str]
    seed: int
    temperature: float
    top_p: float
    presence_penalty: float
    frequency_penalty: float
    num_logprobs: int | None
    """Number of most likely tokens that are reported with each token. None: no log-probabilities."""
    is_batch: NotRequired[bool]
    """It belongs to a batch, so it waits for the others."""


class MalformedEvent(LorryError):
    """A trainer wrote a line that is not an event."""

    def __init__(self, reason: str, *, writer: str = "The trainer") -> None:
        """reason: a predicate about the line."""
        super().__init__("malformed_event", writer=writer, reason=reason)
        self.reason = reason

    def by(self, writer: str) -> MalformedEvent:
        """Return this error with the name of the trainer."""
        return MalformedEvent(self.reason, writer=writer)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainerMessage:
    verb: str
    body: Json


class TrainerDirectory:
    """The paths in one trainer's directory, which holds the two message queues and the two pipes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.settings_path = path / "trainer.json"
        self.inbox = path / "inbox"
        self.events_path = path / "events.jsonl"
        self.requests_path = path / "requests.pipe"
        self.tokens_path = path / "tokens.pipe"
        self.log_path = rank_log(path, 0)
        self.log_starts: dict[int, int] = {}
        """Byte offset, by rank, at which the log for the current base model begins. Missing ranks begin at 0."""

    @classmethod
    def create(cls, path: Path, settings: Json | None = None) -> TrainerDirectory:
        """Create the directory. Without settings, its trainer is a warm standby until `begin`."""
        directory = cls(path)
        directory.inbox.mkdir(parents=True)
        os.mkfifo(directory.requests_path, 0o600)
        os.mkfifo(directory.tokens_path, 0o600)
        if settings is not None:
            directory.begin(settings)
        return directory

    def begin(self, settings: Json) -> None:
        """Send the trainer its settings: which base model to load, and how. Its logs count from here. Raises
        OutOfSpace."""
        self.log_starts = {rank: _size(log) for rank, log in self.logs().items()}
        with full_disk_named():
            write_json(self.settings_path, settings)

    def has_begun(self) -> bool:
        return self.settings_path.exists()

    def settings(self) -> Json:
        return read_json(self.settings_path)

    def device(self) -> str:
        """Return the device of this process. With several GPUs, each process on this machine has the GPU with its own
        local rank."""
        named = str(self.settings()["device"])
        return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if named.startswith("cuda") else named

    def job_path(self, claim_id: str) -> Path:
        return self.path / "jobs" / claim_id

    def checkpoint_path(self, claim_id: str, step: int) -> Path:
        return self.job_path(claim_id) / "checkpoints" / f"step-{step}"

    def checkpoint_adapter_path(self, claim_id: str, step: int) -> Path:
        """Return the folder for the weights of that checkpoint in PEFT's layout."""
        return self.job_path(claim_id) / "checkpoints" / f"step-{step}-adapter"

    def inside(self, relative: str | None) -> Path | None:
        """Return the path that a message names. Raises UnsafePath."""
        return None if relative is None else confined(self.path, relative)

    def opened(self, claim_id: str, name: object) -> AbstractContextManager[FolderEntry]:
        """Open the parent folder of a path that the trainer reported for a job. Raises FileNotFoundError, and
        UnsafePath if the path is not in that job's folder."""
        return opened(self.path, self._of_job(claim_id, name))

    def delete(self, claim_id: str, name: object) -> None:
        """Delete a folder that the trainer reported for a job. Raises UnsafePath if it is not in that job's folder."""
        delete(self.path, self._of_job(claim_id, name))

    def delete_job(self, claim_id: str) -> None:
        """Delete all files of a job, as far as that is possible."""
        with suppress(UnsafePath, OSError):
            delete(self.path, self.named(self.job_path(claim_id)))

    def _of_job(self, claim_id: str, name: object) -> str:
        if not str(name).startswith(f"{self.named(self.job_path(claim_id))}/"):
            raise UnsafePath(name, "is outside the job's folder")
        return str(name)

    def named(self, path: Path) -> str:
        """Return the name of a path in messages, which is relative to the directory."""
        return str(path.relative_to(self.path))

    def logs(self) -> dict[int, Path]:
        """Return the log of each process, by its rank."""
        others = {int(path.stem.partition("-")[2]): path for path in self.path.glob("log-[0-9]*.txt")}
        return {0: self.log_path, **dict(sorted(others.items()))}

    def log_tail(self, max_bytes: int = 4000) -> str:
        """Return the last output of each process since `begin`. The log of the first process, which includes the
        launcher's output, comes last."""
        first, *others = self.log_tails(max_bytes)
        return "".join((*others, first))

    def log_tails(self, max_bytes: int) -> list[str]:
        """Return the last output of each process since `begin`, by rank. The first includes the launcher's output."""
        return [self._tail(rank, log, max_bytes) for rank, log in self.logs().items()]

    def _tail(self, rank: int, log: Path, max_bytes: int) -> str:
        """Return the end of one log. If the log was truncated after `begin`, its end may be in the file `cut_from`."""
        before = cut_from(log)
        is_cut = before.exists()
        last = _end_of(log, max_bytes, begin=0 if is_cut else self.log_starts.get(rank, 0))
        if is_cut and len(last) < max_bytes:
            last = _end_of(before, max_bytes - len(last)) + last
        return last.decode(errors="replace")


def cut_from(log: Path) -> Path:
    """Return the file for the newest part of what was removed from a process's log."""
    return log.with_name(f"{log.name}.1")


def _end_of(path: Path, max_bytes: int, *, begin: int = 0) -> bytes:
    try:
        with os.fdopen(open_file(path), "rb") as file:
            file.seek(max(begin, os.fstat(file.fileno()).st_size - max_bytes))
            return file.read(max_bytes)
    except OSError:
        return b""


class InboxWriter:
    """The worker's end of the inbox."""

    def __init__(self, directory: TrainerDirectory) -> None:
        self._directory = directory
        self._number = 0

    def send(self, verb: Verb, **body: Any) -> None:
        """Send a message. Raises OutOfSpace."""
        self._number += 1
        with full_disk_named():
            write_json(self._directory.inbox / f"{self._number:04d}-{verb}.json", body)


class InboxReader:
    """The trainer's end of the inbox. Each message is taken once, in the order of the numbers."""

    def __init__(self, directory: TrainerDirectory) -> None:
        self._inbox = directory.inbox

    def take(self) -> list[TrainerMessage]:
        """Return the new messages, and delete their files."""
        paths = sorted(self._inbox.glob("[0-9]*-*.json"), key=lambda path: int(path.name.partition("-")[0]))
        return [_take(path) for path in paths]


class EventWriter:
    """The trainer's end of events.jsonl. `seconds` is the trainer's monotonic clock."""

    def __init__(self, directory: TrainerDirectory) -> None:
        self._directory = directory
        self._number = 0
        self._file = directory.events_path.open("a", encoding="utf-8")

    def write(self, *events: Json) -> None:
        """Append events and flush once. A large file is continued in another one, so that the reader can delete it."""
        stamp = {"seconds": round(time.monotonic(), 4)}
        self._file.write("".join(json.dumps(event | stamp) + "\n" for event in events))
        self._file.flush()
        if self._file.tell() >= ROTATED_BYTES:
            self._number += 1
            with self._file:
                self._file.write(json.dumps({"type": CONTINUED} | stamp) + "\n")
            self._file = continued(self._directory.events_path, self._number).open("a", encoding="utf-8")

    def close(self) -> None:
        self._file.close()


class SilentWriter(EventWriter):
    """The writer of a rank that is not the leader. It discards all events, because the leader writes them."""

    def __init__(self) -> None:
        """Open no file."""

    def write(self, *events: Json) -> None:
        """Discard the events."""

    def close(self) -> None:
        """Do nothing."""


class EventReader:
    """The worker's end of events.jsonl. Each complete line is read once."""

    def __init__(self, directory: TrainerDirectory) -> None:
        self._first = self._path = directory.events_path
        self._number = 0
        self._offset = 0
        self.has_more = False
        """Whether the last `read` left whole lines unread."""

    def read(self) -> list[Json]:
        """Return the next events, at most LONGEST_LINE_BYTES of them. Raises MalformedEvent.

        If the file can't be read now, it returns no events, as if the trainer had written none.
        """
        self.has_more = False
        try:
            with os.fdopen(open_file(self._path), "rb") as file:
                file.seek(self._offset)
                content = file.read(LONGEST_LINE_BYTES)
        except OSError:
            return []
        whole = content[: content.rfind(b"\n") + 1]
        self.has_more = bool(whole) and len(content) == LONGEST_LINE_BYTES
        if not whole and len(content) == LONGEST_LINE_BYTES:
            raise MalformedEvent(f"is longer than {LONGEST_LINE_BYTES:,} bytes")
        self._offset += len(whole)
        events = [parse_event(line) for line in whole.removesuffix(b"\n").split(b"\n")] if whole else []
        if events and events[-1]["type"] == CONTINUED:
            del events[-1]
            self._path.unlink(missing_ok=True)
            self._number += 1
            self._path, self._offset, self.has_more = continued(self._first, self._number), 0, True
        return events


def continued(path: Path, number: int) -> Path:
    """Return the file that continues events.jsonl after `number` rotations."""
    return path.with_name(f"{path.stem}-{number}{path.suffix}")


def write_json(path: Path, content: Json) -> None:
    """Write a file atomically, by a temporary file and a rename."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def read_json(path: Path) -> Json:
    return cast(Json, json.loads(path.read_text(encoding="utf-8")))


def timed(name: str, began_at: float) -> Json:
    """Return a span that ends now, for the `spans` of an event. Times are in seconds since 1970."""
    return {"name": name, "began_at": began_at, "ended_at": time.time()}


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _take(path: Path) -> TrainerMessage:
    body = read_json(path)
    path.unlink()
    return TrainerMessage(verb=path.stem.partition("-")[2], body=body)


def parse_event(line: bytes) -> Json:
    """Parse an event. Raises MalformedEvent unless it is an object with a type and a time, which all events have, and
    each field has its type. A missing field is found when the event is applied."""
    try:
        parsed: object = json.loads(line)
    except json.JSONDecodeError as error:
        raise MalformedEvent(f"is not valid JSON at column {error.colno}") from error
    except (ValueError, RecursionError) as error:
        raise MalformedEvent("is not valid JSON") from error
    if not isinstance(parsed, dict):
        raise MalformedEvent("is not a JSON object")
    event = cast(Json, parsed)
    kind, seconds = event.get("type"), event.get("seconds")
    is_moment = isinstance(seconds, int | float) and abs(seconds) < LATEST_SECONDS  # not NaN either
    if not isinstance(kind, str):
        raise MalformedEvent("has no 'type', or one that is not a string")
    if not is_moment:
        raise MalformedEvent("has no valid time in 'seconds'")
    if (name := wrong_field(event)) is not None:
        raise MalformedEvent(f"is an event whose field {name!r} has a wrong type")
    return event


@contextmanager
def applying(event_type: str) -> Generator[None]:
    """Convert any crash while an event is applied to MalformedEvent. Otherwise one event of a compromised trainer, such
    as one without an expected field, would end the worker, with the background tasks of other projects.

    Errors that the caller handles are raised unchanged.
    """
    try:
        yield
    except (LorryError, StaleClaim, OSError):
        raise
    except Exception as error:
        named = f"{type(error).__name__}; see the worker's log"
        raise MalformedEvent(f"is an event of the type {event_type[:40]!r} that can't be applied ({named})") from error
