"""The trainer: a child process that loads one base model and trains the jobs that its inbox admits.

`python -m worker.children.trainer.main DIR` can also be run manually on a trainer directory. This module starts the
process, loads the base model, waits and exits; message_handlers.py handles the messages. The process has no access to
the database, the store or the internet. Only it, worker.children.base_importer and worker.children.exporter import
lora_core.
"""

from __future__ import annotations

import gc
import sys
import time

from worker.node import devices
from worker.process import confined_child
from worker.protocol import errors

if __name__ == "__main__":  # before torch, whose import takes seconds
    confined_child.exit_without_parent(sys.argv)
    errors.begin_rank_log(sys.argv[1])
    gc.disable()  # the imports allocate much and free nothing: collections take a quarter of their time

import os
from contextlib import closing, suppress
from pathlib import Path
from typing import Literal, cast

from catalog import failpoints, logs
from catalog.spec.job import Quantization
from lora_core.base_model.model import load_base
from lora_core.base_model.sharding import Strategy
from lora_core.distributed.ranks import ALONE, Ranks
from lora_core.engine.engine import Engine
from lora_core.engine.warm_up import warm_up
from lora_core.errors import LoraCoreError
from worker.children.trainer.file_broadcast import rendezvous_of
from worker.children.trainer.job_config import engine_config
from worker.children.trainer.message_handlers import MessageHandlers
from worker.children.trainer.process_exit import joined
from worker.process.standby import stand_by
from worker.protocol.errors import described
from worker.protocol.mailbox import EventWriter, SilentWriter, TrainerDirectory, timed
from worker.protocol.rendezvous import ranks_file

POLL_SECONDS = 0.03
"""Interval at which an idle trainer polls its inbox; a request wakes it at once. Polling every 0.02 seconds took up to
2.3% of a slow core."""


def main(arguments: list[str]) -> int:
    logs.configure("info")  # including that of libraries
    directory = TrainerDirectory(Path(arguments[0]).absolute())
    if not directory.has_begun():
        stand_by(directory, warm_up)
    with joined(directory.device(), rendezvous=rendezvous_of(directory), file=ranks_file()) as ranks:
        run(directory, ranks)
    return 0


def run(directory: TrainerDirectory, ranks: Ranks = ALONE) -> None:
    """Load the base model, then train until a message ends the trainer, or until it has been idle for `idle_seconds` of
    trainer.json (null: without limit). Several processes (ranks) do the same; the leader alone writes events."""
    busy_at = time.monotonic()
    with closing(EventWriter(directory) if ranks.leads else SilentWriter()) as events:
        try:
            engine = load_engine(directory, events, ranks)
        except LoraCoreError as error:
            events.write({"type": "load_refused", "error": described(error), "ranks": error.ranks})
            return
        handlers = MessageHandlers(directory, engine, events)
        try:
            train(handlers, busy_at=busy_at, idle_seconds=directory.settings()["idle_seconds"])
        except Exception:
            with suppress(Exception):  # the worker reads what was written and reported before the trainer's end
                handlers.close()
            raise
        handlers.close()
        events.write({"type": "unloaded"})


def load_engine(directory: TrainerDirectory, events: EventWriter, ranks: Ranks = ALONE) -> Engine:
    """Load the base model that trainer.json names, and report `ready`. Raises LoraCoreError, on all ranks."""
    settings, device = directory.settings(), directory.device()
    started, began_at = time.monotonic(), time.time()
    failpoints.pass_by("loading")
    quantization = cast(Quantization, settings["quantization"])
    strategy = cast(Strategy, settings["strategy"])
    with ranks.sharing_errors():
        base = load_base(
            Path(settings["base_dir"]),
            dtype=cast(Literal["bfloat16", "float32"], settings["dtype"]),
            device=device,
            quantization=quantization,
            strategy=strategy,
            ranks=ranks,
        )
    loaded = time.monotonic()
    engine = Engine(base, engine_config(settings, num_threads=devices.num_threads()), ranks)
    events.write(
        {
            "type": "ready",
            "pid": os.getpid(),
            "device": device,
            "processor": base.gpu_name or devices.processor(),
            "dtype": settings["dtype"],
            "quantization": quantization,
            "invariance": engine.invariance,
            "elementwise_kernels": engine.elementwise_kernels,
            "num_threads": devices.num_threads(),
            "num_processes": ranks.size,
            "strategy": strategy,
            "load_seconds": round(loaded - started, 3),
            "probe_seconds": round(time.monotonic() - loaded, 3),
            "versions": devices.versions(),
            "memory": engine.memory(),
            "spans": [timed("load", began_at)],
        }
    )
    return engine


def train(handlers: MessageHandlers, *, busy_at: float, idle_seconds: float | None) -> None:
    """Train jobs and answer inference requests. `busy_at`: when the trainer last had something to do, on its monotonic
    clock."""
    engine, is_idle, share = handlers.engine, False, handlers.share
    while not handlers.is_exiting:
        handlers.read_inbox(begins_answers=True)
        has_requests = engine.ranks.broadcast(not handlers.inference.is_idle)
        if has_requests and (engine.idle or not engine.ranks.broadcast(share.is_training_next())):
            busy_at, is_idle = time.monotonic(), False
            share.measure(handlers.answer, "inference")
        elif not engine.idle:
            busy_at, is_idle = time.monotonic(), False
            share.measure(handlers.tick, "training")
        else:
            if not is_idle:
                handlers.release_memory()
                handlers.events.write({"type": "idle"})
                is_idle = True
            if idle_seconds is not None and engine.ranks.broadcast(time.monotonic() - busy_at >= idle_seconds):
                handlers.is_exiting = True
            else:
                handlers.wait(POLL_SECONDS)
        handlers.report()


if __name__ == "__main__":
    gc.freeze()
    gc.enable()
    sys.exit(main(sys.argv[1:]))
