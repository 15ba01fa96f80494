"""The trainer: a child process that holds one base model and trains whatever its inbox admits.

`python -m worker.children.trainer.main DIR` runs by hand on a trainer directory. It has no database, no store and no
network. Only this child and worker.children.base_importer import lora_core.
"""

from __future__ import annotations

import gc
import sys
import time

from worker.node import devices
from worker.process import parent_watch
from worker.protocol import errors

if __name__ == "__main__":  # before torch, whose import takes seconds
    parent_watch.hold_on(sys.argv)
    errors.begin_rank_log(sys.argv[1])
    gc.disable()  # a quarter of the time that the imports take is a search among things that stay

import os
from collections.abc import Iterable
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, cast

from catalog import failpoints
from catalog.spec.job import JobSpec, Quantization
from lora_core.base_model.model import BaseModel, load_base
from lora_core.base_model.sharding import Strategy
from lora_core.distributed.ranks import ALONE, Ranks
from lora_core.engine.engine import Engine
from lora_core.engine.warm_up import warm_up
from lora_core.errors import BadCheckpoint, LoraCoreError, OutOfMemory
from lora_core.events import Event, JobDiverged, JobFinished, JobStepped
from lora_core.forward.generation import Generation, check_prompts
from worker.children.tokenizer.chat_template import Refused
from worker.children.tokenizer.text_encoder import BaseText
from worker.children.trainer.file_broadcast import brought, forget, meeting_of
from worker.children.trainer.job_config import engine_config, job_config
from worker.children.trainer.outputs import (
    AdmittedJob,
    TrainerLog,
    as_json,
    datasets_of,
    exported,
    open_log,
    prompts_of,
    sample_records,
    sample_request,
    steps_to_sample,
    taken,
)
from worker.children.trainer.process_exit import joined
from worker.process.standby import stand_by
from worker.protocol.errors import described
from worker.protocol.errors import told as told_error
from worker.protocol.mailbox import (
    EventWriter,
    InboxReader,
    Json,
    SilentWriter,
    TrainerDirectory,
    TrainerMessage,
    timed,
)
from worker.protocol.rendezvous import ranks_file

IDLE_LOOK_SECONDS = 0.03
"""Of an idle trainer at its inbox: waking up is what it costs, at 50 times a second up to 2.3% of a slow core."""
REPORT_SECONDS = 5.0
LEAVING = ("pause", "preempt", "drain")
NO_MODEL: Json = {"adapter": None}


class TrainerLoop:
    """Reads the inbox at every tick boundary, ticks, and writes events.

    Several processes (ranks) do all the same: the leader reads the inbox, and alone writes events and files.
    """

    def __init__(self, directory: TrainerDirectory, ranks: Ranks = ALONE) -> None:
        self._directory = directory
        self._ranks = ranks
        self._settings = directory.settings()
        self._inbox = InboxReader(directory)
        self._events = EventWriter(directory) if ranks.leads else SilentWriter()
        self._residents: dict[str, AdmittedJob] = {}
        self._log = TrainerLog(self._settings, speaks=ranks.leads)
        self._text: BaseText | None = None
        self._leaving = False
        self._busy_at = self._reported_at = time.monotonic()
        self._told_idle = self._told_verifying = False

    def run(self) -> None:
        """Until told to leave, or idle for `idle_seconds` of trainer.json (null: for ever)."""
        try:
            self._load()
        except LoraCoreError as error:
            self._events.write({"type": "load_refused", "error": described(error), "ranks": error.ranks})
        else:
            self._train()
            self._events.write({"type": "unloaded"})
        self._events.close()

    def _train(self) -> None:
        while not self._leaving:
            self._listen()
            if self._engine.idle:
                self._rest()
            else:
                self._busy_at, self._told_idle = time.monotonic(), False
                self._tick()
            self._report()

    def _load(self) -> None:
        started, began_at = time.monotonic(), time.time()
        failpoints.pass_by("loading")
        dtype = cast(Literal["bfloat16", "float32"], self._settings["dtype"])
        device = self._directory.device()
        quantization = cast(Quantization, self._settings["quantization"])
        strategy = cast(Strategy, self._settings.get("strategy", "replicated"))
        with self._ranks.together():
            self._base: BaseModel = load_base(
                Path(self._settings["base_dir"]),
                dtype=dtype,
                device=device,
                quantization=quantization,
                strategy=strategy,
                ranks=self._ranks,
            )
        loaded = time.monotonic()
        config = engine_config(self._settings, num_threads=devices.num_threads(), folder=self._directory.path)
        self._engine = Engine(self._base, config, self._ranks)
        ready = {
            "type": "ready",
            "pid": os.getpid(),
            "device": device,
            "dtype": dtype,
            "quantization": quantization,
            "invariance": self._engine.invariance,
            "num_threads": devices.num_threads(),
            "num_processes": self._ranks.size,
            "strategy": strategy,
            "load_seconds": round(loaded - started, 3),
            "probe_seconds": round(time.monotonic() - loaded, 3),
            "versions": devices.versions(),
            "memory": self._engine.memory(),
            "spans": [timed("load", began_at)],
        }
        self._events.write(ready)

    # What the parent says

    def _listen(self) -> None:
        """Obey what has come, in its order; jobs that are told one after the other to leave do so together."""
        for are_to_leave, messages in groupby(taken(self._inbox, self._ranks), lambda message: message.verb in LEAVING):
            if are_to_leave:
                self._leave(messages)
            else:
                for message in messages:
                    self._obey(message)

    def _leave(self, messages: Iterable[TrainerMessage]) -> None:
        """All checkpoints are written and told of before any of them is made a model, which takes its time."""
        told = list(messages)
        self._leaving |= any(message.verb == "drain" for message in told)
        named = {message.body.get("claim_id") for message in told}
        jobs = [claim_id for claim_id in self._residents if self._leaving or claim_id in named]
        new: set[str] = set()
        for claim_id in jobs:
            if (saved := self._save(claim_id)) is not None:
                self._write(claim_id, "checkpointed", **saved, **NO_MODEL)
                new.add(claim_id)
        for claim_id in jobs:
            step, _ = self._engine.progress(claim_id)
            model = self._model(claim_id) if claim_id in new else NO_MODEL
            self._evict(claim_id)
            self._write(claim_id, "paused", step=step, **model)

    def _obey(self, message: TrainerMessage) -> None:
        if message.verb == "unload":
            self._leaving = not self._residents
        elif message.verb == "admit":
            self._admit(message.body)
        elif message.verb == "cancel":
            self._evict(message.body["claim_id"])
            self._events.write({"type": "cancelled", "claim_id": message.body["claim_id"]})

    def _admit(self, body: Json) -> None:
        claim_id = self._log.knows(body)
        try:
            config = job_config(
                JobSpec.model_validate(body["spec"]),
                num_steps=body["num_steps"],
                evaluate_every_steps=body["evaluate_every_steps"],
            )
            train_path, valid_path, resume, parent = brought(self._directory, body, self._ranks)
            train, valid = datasets_of(claim_id, train_path, valid_path, self._ranks)
            short = body.get("shortages", 0)
            self._engine.admit(claim_id, config, train, valid, resume_from=resume, parent=parent, shortages=short)
        except LoraCoreError as error:
            self._refuse(claim_id, error, is_checkpoint=error.code == BadCheckpoint.code)
            return
        except OSError as error:
            self._refuse(claim_id, error)
            return
        step, num_steps = self._engine.progress(claim_id)
        self._residents[claim_id] = AdmittedJob(
            checkpoint_every_steps=body["checkpoint_every_steps"],
            base_name=body["base_name"],
            num_steps=num_steps,
            saved_step=step,
        )
        if not self._asks(claim_id, body):
            return
        self._write(
            claim_id,
            "admitted",
            step=step,
            num_steps=num_steps,
            num_parameters=self._engine.num_parameters(claim_id),
            steps_per_epoch=train.num_rows / config.objective.rows_per_example / config.batch_size,
        )
        self._answer_what_is_owed(claim_id, body)

    def _answer_what_is_owed(self, claim_id: str, body: Json) -> None:
        """A job that was told to leave amid its answers has evaluated that step, and won't again."""
        step = self._engine.evaluated_step(claim_id)
        if step is not None and step not in body["answered_steps"]:
            self._sample({claim_id: step})

    def _asks(self, claim_id: str, body: Json) -> bool:
        """Make the job's prompts ready. False where they can't be answered, which refuses the job."""
        samples = JobSpec.model_validate(body["spec"]).samples
        if samples is None:
            return True
        self._text = self._text or BaseText(Path(self._settings["base_dir"]))
        try:
            asked = sample_request(self._text, samples, as_chat=body["asks_as_chat"])
            check_prompts(prompts_of(asked), self._engine.base)
        except LoraCoreError as error:
            self._refuse(claim_id, error)
            return False
        except Refused as error:
            self._evict(claim_id)
            self._write(claim_id, "refused", error=described(error), is_checkpoint=False)
            return False
        self._residents[claim_id].asked = asked
        return True

    def _evict(self, claim_id: str) -> None:
        if self._residents.pop(claim_id, None) is not None:
            self._engine.evict(claim_id)
        forget(self._directory, claim_id, self._ranks)

    # What the engine says

    def _tick(self) -> None:
        try:
            events = self._engine.tick()
        except OutOfMemory as error:
            self._refuse(error.job, error)
            return
        self._events.write(*(as_json(event) for event in events if not isinstance(event, JobDiverged)))
        self._sample(steps_to_sample(events))
        for event in events:
            if event.job in self._residents:  # it may have been told to leave while others answered
                self._follow(event)

    def _sample(self, step_of: dict[str, int]) -> None:
        """Answer the prompts of the jobs just evaluated. Nobody trains meanwhile; the inbox is read at each token."""
        asked = {job: found for job in step_of if (found := self._residents[job].asked) is not None}
        if not asked:
            return
        prompts, generation = {job: prompts_of(own) for job, own in asked.items()}, None
        if self._ranks.leads or self._base.is_sharded:  # a base that is whole answers by itself; the others wait
            generation = self._engine.generation(prompts)
        while not self._ranks.told(generation is None or generation.is_complete):
            if generation is not None:
                self._advance(generation, step_of)
            self._listen()
            self._report()
        for job, answers in generation.answers().items() if generation is not None else ():
            if job in self._residents:
                assert self._text is not None
                self._write(job, "sampled", step=step_of[job], samples=sample_records(self._text, asked[job], answers))

    def _advance(self, generation: Generation, step_of: dict[str, int]) -> None:
        for job in generation.answers().keys() - self._residents.keys():
            generation.drop(job)
        try:
            generation.advance()
        except OutOfMemory as error:
            generation.drop(error.job)
            self._write(error.job, "unsampled", step=step_of[error.job], error=described(error))

    def _follow(self, event: Event) -> None:
        if isinstance(event, JobStepped):
            failpoints.pass_by(f"step_{event.step}")
            if self._residents[event.job].is_checkpoint_due(event.step):
                self._checkpoint(event.job)
        elif isinstance(event, JobFinished):
            self._export(event)
        elif isinstance(event, JobDiverged):
            if event.good_step == event.step:
                self._checkpoint(event.job)
            self._evict(event.job)
            self._events.write(as_json(event))

    def _checkpoint(self, claim_id: str) -> None:
        began_at, saved = time.time(), self._save(claim_id)
        if saved is not None:
            model = self._model(claim_id)
            failpoints.pass_by("in_checkpoint")
            self._write(claim_id, "checkpointed", **saved, **model, spans=[timed("checkpoint", began_at)])

    def _save(self, claim_id: str) -> Json | None:
        """`step` and `folder`, relative, of a new checkpoint. None where the newest is of this step, the disk failed,
        or its update broke off."""
        step, _ = self._engine.progress(claim_id)
        resident = self._residents[claim_id]
        if step == resident.saved_step:
            return None
        folder = self._directory.checkpoint_path(claim_id, step)
        self._engine.compare_ranks(claim_id)
        try:
            self._ranks.by_leader(lambda: self._engine.save_checkpoint(claim_id, folder))
        except (OSError, LoraCoreError) as error:  # torn: told to leave before its shortage could be told
            self._write(claim_id, "checkpoint_failed", step=step, error=told_error(error))
            return None
        resident.saved_step = step
        return {"step": step, "folder": self._directory.named(folder)}

    def _model(self, claim_id: str) -> Json:
        """`adapter`, relative: the weights of the step that was saved in PEFT's layout, with `num_parameters`. None
        where the disk failed, or the row holds those of the step that a finished job keeps."""
        step, _ = self._engine.progress(claim_id)
        if self._engine.evaluated_step(claim_id) not in (None, step):
            return NO_MODEL
        folder = self._directory.checkpoint_path(claim_id, step)
        adapter = folder.with_name(f"{folder.name}-adapter")
        base_name = self._residents[claim_id].base_name
        try:
            self._ranks.by_leader(
                lambda: self._engine.export(claim_id, adapter, base_name=base_name, has_evidence=False)
            )
        except (OSError, LoraCoreError) as error:
            self._write(claim_id, "checkpoint_unexported", step=step, error=told_error(error))
            return NO_MODEL
        return {"adapter": self._directory.named(adapter), "num_parameters": self._engine.num_parameters(claim_id)}

    def _export(self, finished: JobFinished) -> None:
        claim_id, folder = finished.job, self._directory.job_path(finished.job) / "adapter"
        try:
            base_name, spans = self._residents[claim_id].base_name, list[Json]()
            amid = partial(self._report, verifying=True)
            report = exported(
                self._engine, claim_id, folder, base_name=base_name, between=self._report, amid=amid, spans=spans
            )
        except (LoraCoreError, OSError) as error:
            self._refuse(claim_id, error)
            return
        body = {
            "step": finished.step,
            "kept_step": finished.kept_step,
            "stopped_early": finished.stopped_early,
            "folder": self._directory.named(folder),
            "num_parameters": self._engine.num_parameters(claim_id),
            "trained_tokens": self._engine.trained_tokens(claim_id),
            "report": report,
        }
        self._evict(claim_id)
        self._write(claim_id, "exported", **body, spans=spans)

    def _refuse(self, claim_id: str, error: LoraCoreError | OSError, *, is_checkpoint: bool = False) -> None:
        self._evict(claim_id)
        self._write(claim_id, "refused", error=told_error(error), is_checkpoint=is_checkpoint)

    def _rest(self) -> None:
        """Nothing to compute: say so once, and leave when it has lasted."""
        if not self._told_idle:
            self._events.write({"type": "idle"})
            self._told_idle = True
        limit = self._settings.get("idle_seconds")
        if limit is not None and self._ranks.told(time.monotonic() - self._busy_at >= limit):
            self._leaving = True
            return
        time.sleep(IDLE_LOOK_SECONDS)

    def _report(self, *, verifying: bool = False) -> None:
        """Every few seconds: memory and speed, which is also the sign of life while a step takes long."""
        if verifying != self._told_verifying or time.monotonic() - self._reported_at >= REPORT_SECONDS:
            self._reported_at, self._told_verifying = time.monotonic(), verifying
            rate = {"tokens_per_second": round(self._engine.tokens_per_second(), 1)}
            speeds = {"tick_speeds": self._engine.tick_speeds()}
            self._events.write({"type": "memory", "verifying": verifying, **self._engine.memory(), **rate, **speeds})

    def _write(self, claim_id: str, event_type: str, **body: Any) -> None:
        self._events.write({"type": event_type, "claim_id": claim_id, **body})
        self._log.told(claim_id, event_type, body)


def main(arguments: list[str]) -> int:
    open_log()
    directory = TrainerDirectory(Path(arguments[0]).absolute())
    if not directory.has_begun():
        stand_by(directory, warm_up)
    with joined(directory.device(), meeting=meeting_of(directory), file=ranks_file()) as ranks:
        TrainerLoop(directory, ranks).run()
    return 0


if __name__ == "__main__":
    gc.freeze()
    gc.enable()
    sys.exit(main(sys.argv[1:]))
