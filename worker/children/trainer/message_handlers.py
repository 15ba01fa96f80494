"""Handles the messages in a trainer's inbox and the events of its engine; worker/protocol/mailbox.py lists both.

main.py calls `read_inbox`, `tick` and `report` in a loop. Messages are handled between two ticks, in their order.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, cast

from catalog import failpoints
from catalog.spec.job import JobSpec
from lora_core.engine.engine import Engine
from lora_core.errors import BadCheckpoint, LoraCoreError, OutOfMemory
from lora_core.events import Event, JobDiverged, JobFinished, JobStepped
from lora_core.forward.generation import Generation, check_prompts
from worker.children.tokenizer.chat_template import Refused
from worker.children.tokenizer.text_encoder import BaseText
from worker.children.trainer.checkpoint_writer import (
    CheckpointDraft,
    CheckpointFiles,
    CheckpointWriter,
    WrittenCheckpoint,
    writes_while_training,
)
from worker.children.trainer.file_broadcast import forget, receive_files
from worker.children.trainer.inference import InferenceRequests, TimeShare
from worker.children.trainer.job_config import job_config
from worker.children.trainer.message_queue import ANSWER_CHARS, MessageQueue
from worker.children.trainer.outputs import (
    AdmittedJob,
    BaseReference,
    TrainerLog,
    as_json,
    datasets_of,
    exported,
    prompts_of,
    sample_records,
    sample_request,
    steps_to_sample,
)
from worker.node.devices import free_host_bytes
from worker.protocol.answer_pipes import TrainerPipes
from worker.protocol.errors import described, error_report
from worker.protocol.mailbox import (
    AdmitBody,
    AnswerBody,
    EventWriter,
    InboxReader,
    Json,
    TrainerDirectory,
    TrainerMessage,
    timed,
)

REPORT_SECONDS = 5.0
RELEASING = ("pause", "preempt", "drain")
"""Verbs after which a job leaves the trainer with a checkpoint."""
NO_ADAPTER: Json = {"adapter": None}


class MessageHandlers:
    """One engine with its jobs, on this rank. `is_exiting`: the process ends before the next tick.

    All ranks do the same in the same order. The leader reads the inbox, and alone writes events and files.
    """

    def __init__(self, directory: TrainerDirectory, engine: Engine, events: EventWriter) -> None:
        self.engine = engine
        self.events = events
        self.is_exiting = False
        self._directory = directory
        self._settings = directory.settings()
        self._ranks = engine.ranks
        self._pipes = TrainerPipes(directory.requests_path, directory.tokens_path) if engine.ranks.leads else None
        self._messages = MessageQueue(InboxReader(directory), self._pipes, engine.ranks)
        self._log = TrainerLog(self._settings, logs_events=engine.ranks.leads)
        self._jobs: dict[str, AdmittedJob] = {}
        self._text: BaseText | None = None
        self.inference = InferenceRequests(
            engine,
            directory,
            send=self._pipes.write if self._pipes is not None else lambda _: None,
            text=self._base_text,
            free_host_bytes=free_host_bytes,
        )
        self.share = TimeShare()
        """How the trainer divides its time. Only the leader's is used."""
        self._writer = CheckpointWriter(free_host_bytes=free_host_bytes)
        self._writes_while_training = writes_while_training(directory.device())
        self._reported_at = time.monotonic()
        self._reported_verifying = False

    # Messages of the worker

    def wait(self, seconds: float) -> None:
        """Wait for a request, but at most this long. On ranks that do not lead, only the time counts."""
        if self._pipes is None:
            time.sleep(seconds)
        else:
            self._pipes.wait(seconds)

    def read_inbox(self, *, begins_answers: bool) -> None:
        """Handle the new messages in their order. Consecutive messages that make jobs leave are handled together.

        begins_answers: while a job trains, handle some `answer` messages if inference has its turn. False: none. To
        encode a long prompt may take longer than many ticks, so the others wait.
        """
        answer_chars = math.inf
        if not self.engine.idle:
            answer_chars = ANSWER_CHARS if begins_answers and not self.share.is_training_next() else 0
        due = self._messages.take(answer_chars=answer_chars)
        for releases, messages in groupby(due, lambda message: message.verb in RELEASING):
            if releases:
                self._release(messages)
            else:
                for message in messages:
                    self._handle(message)

    def _handle(self, message: TrainerMessage) -> None:
        if message.verb == "admit":
            self._admit(cast(AdmitBody, message.body))
        elif message.verb == "cancel":
            self._writer.discard(message.body["claim_id"])
            self._evict(message.body["claim_id"])
            self.events.write({"type": "cancelled", "claim_id": message.body["claim_id"]})
        elif message.verb == "answer":
            self._begin_answer(cast(AnswerBody, message.body))
        elif message.verb == "stop_answering":
            self.inference.remove(message.body["request_id"])
        elif message.verb == "unload":
            self.is_exiting = not self._jobs

    def _begin_answer(self, body: AnswerBody) -> None:
        begin = partial(self.inference.add, body)
        if self.engine.idle:
            begin()
        else:
            self.share.measure(begin, "preparation")

    def _release(self, messages: Iterable[TrainerMessage]) -> None:
        # The time to leave may be short. A checkpoint loses no work, so all are written and reported before the first
        # adapter, whose export takes longer.
        messages = list(messages)
        self.is_exiting |= any(message.verb == "drain" for message in messages)
        named = {message.body.get("claim_id") for message in messages}
        releasing = [claim_id for claim_id in self._jobs if self.is_exiting or claim_id in named]
        saved: set[str] = set()
        for claim_id in releasing:
            if (checkpoint := self._save(claim_id)) is not None:
                self._report_event(claim_id, "checkpointed", **checkpoint, **NO_ADAPTER)
                saved.add(claim_id)
        for claim_id in releasing:
            step, _ = self.engine.progress(claim_id)
            adapter = self._export_checkpoint(claim_id) if claim_id in saved else NO_ADAPTER
            self._evict(claim_id)
            self._report_event(claim_id, "paused", step=step, **adapter)

    def _admit(self, body: AdmitBody) -> None:
        claim_id, spec = self._log.register(body), JobSpec.model_validate(body["spec"])
        try:
            config = job_config(spec, num_steps=body["num_steps"], evaluate_every_steps=body["evaluate_every_steps"])
            train_path, valid_path, resume, parent = receive_files(self._directory, body, self._ranks)
            train, valid = datasets_of(claim_id, train_path, valid_path, self._ranks)
            self.engine.admit(
                claim_id, config, train, valid, resume_from=resume, parent=parent, shortages=body["shortages"]
            )
        except (LoraCoreError, OSError) as error:
            # The code and not the class, because `Ranks.sharing_errors` raises another rank's error as a LoraCoreError.
            is_checkpoint = not isinstance(error, OSError) and error.code == BadCheckpoint.code
            self._refuse(claim_id, error, is_checkpoint=is_checkpoint)
            return
        step, num_steps = self.engine.progress(claim_id)
        self._jobs[claim_id] = AdmittedJob(
            checkpoint_every_steps=body["checkpoint_every_steps"],
            base=BaseReference(name=body["base_name"], revision=body["base_revision"]),
            num_steps=num_steps,
            saved_step=step,
        )
        try:
            self._prepare_prompts(claim_id, spec, body)
        except (LoraCoreError, Refused) as error:
            self._refuse(claim_id, error)
            return
        self._report_event(
            claim_id,
            "admitted",
            step=step,
            num_steps=num_steps,
            num_parameters=self.engine.job(claim_id).adapter.num_parameters,
            steps_per_epoch=train.num_rows / config.objective.rows_per_example / config.batch_size,
        )
        # A job that left while it sampled has evaluated that step already, and will not do it again.
        evaluated_step = self.engine.job(claim_id).evaluated_step
        if evaluated_step is not None and evaluated_step not in body["answered_steps"]:
            self._sample({claim_id: evaluated_step})

    def _prepare_prompts(self, claim_id: str, spec: JobSpec, body: AdmitBody) -> None:
        """Raises Refused and LoraCoreError if the base model can't answer the job's prompts."""
        if spec.evaluation.samples is not None:
            request = sample_request(self._base_text(), spec.evaluation.samples, as_chat=body["asks_as_chat"])
            check_prompts(prompts_of(request), self.engine.base)
            self._jobs[claim_id].sample_request = request

    def _base_text(self) -> BaseText:
        """Return the tokenizer and chat template. Raises Refused and OSError if they can't be read."""
        self._text = self._text or BaseText(Path(self._settings["base_dir"]))
        return self._text

    def _evict(self, claim_id: str) -> None:
        self._settle(claim_id)  # its folder is deleted after the event that follows
        if self._jobs.pop(claim_id, None) is not None:
            self.engine.evict(claim_id)
        forget(self._directory, claim_id, self._ranks)

    def _refuse(self, claim_id: str, error: LoraCoreError | OSError | Refused, *, is_checkpoint: bool = False) -> None:
        self._evict(claim_id)
        self._report_event(claim_id, "refused", error=error_report(error), is_checkpoint=is_checkpoint)

    # Events of the engine

    def tick(self) -> None:
        """Compute one tick, report its events and handle them."""
        try:
            events = self.engine.tick()
        except OutOfMemory as error:
            self._refuse(error.job, error)
            return
        for event in events:
            if isinstance(event, (JobFinished, JobDiverged)):  # its checkpoints are reported before
                self._settle(event.job)
        # A divergence is reported after its last checkpoint: the worker ends the attempt on that event.
        self.events.write(*(as_json(event) for event in events if not isinstance(event, JobDiverged)))
        self._sample(steps_to_sample(events))
        for event in events:
            if event.job in self._jobs:  # else a message evicted it while `_sample` ran
                self._handle_event(event)

    def answer(self) -> None:
        """Compute one pass of the inference requests, and report its tokens."""
        if self.inference.computes:
            self.inference.advance()

    def _handle_event(self, event: Event) -> None:
        if isinstance(event, JobStepped):
            failpoints.pass_by(f"step_{event.step}")
            if self._jobs[event.job].is_checkpoint_due(event.step):
                self._checkpoint(event.job)
        elif isinstance(event, JobFinished):
            self._export(event)
        elif isinstance(event, JobDiverged):
            if event.good_step == event.step:
                self._checkpoint(event.job)
            self._evict(event.job)
            self.events.write(as_json(event))

    def _sample(self, step_of: dict[str, int]) -> None:
        """Answer the prompts of jobs that were just evaluated. No job trains meanwhile, but messages are handled after
        each token."""
        requests = {job: found for job in step_of if (found := self._jobs[job].sample_request) is not None}
        if not requests:
            return
        generation = None
        if self._ranks.leads or self.engine.base.is_sharded:  # else the leader computes alone, and the others wait
            generation = self.engine.generation({job: prompts_of(request) for job, request in requests.items()})
        while not self._ranks.broadcast(generation is None or generation.is_complete):
            if generation is not None:
                self._advance(generation, step_of)
            self.read_inbox(begins_answers=False)
            self.report()
        for job, answers in generation.answers().items() if generation is not None else ():
            if job in self._jobs:
                records = sample_records(self._base_text(), requests[job], answers)
                self._report_event(job, "sampled", step=step_of[job], samples=records)

    def _advance(self, generation: Generation, step_of: dict[str, int]) -> None:
        for job in generation.answers().keys() - self._jobs.keys():
            generation.drop(job)
        try:
            generation.advance()
        except OutOfMemory as error:
            generation.drop(error.job)
            self._report_event(error.job, "unsampled", step=step_of[error.job], error=described(error))

    # Checkpoints and adapters

    def _checkpoint(self, claim_id: str) -> None:
        if self._writes_while_training:
            self._begin_checkpoint(claim_id)
            return
        began_at, checkpoint = time.time(), self._save(claim_id)
        if checkpoint is not None:
            adapter = self._export_checkpoint(claim_id)
            failpoints.pass_by("in_checkpoint")
            spans = [timed("checkpoint", began_at)]
            self._report_event(claim_id, "checkpointed", **checkpoint, **adapter, spans=spans)

    def _save(self, claim_id: str) -> Json | None:
        """`step` and relative `folder` of a new checkpoint. None: this step is saved already, the disk failed, or an
        update of the job broke off."""
        step, _ = self.engine.progress(claim_id)
        if self._writer.has_unwritten(claim_id, step):
            self._settle(claim_id)
        job = self._jobs[claim_id]
        if self._ranks.broadcast(step == job.saved_step):
            return None
        folder = self._directory.checkpoint_path(claim_id, step)
        try:
            self.engine.compare_ranks(claim_id)
            self._ranks.by_leader(lambda: self.engine.save_checkpoint(claim_id, folder))
        except (OSError, LoraCoreError) as error:  # LoraCoreError: the engine has not yet raised the job's shortage
            self._settle(claim_id)  # an older one is the last checkpoint of the job
            self._report_event(claim_id, "checkpoint_failed", step=step, error=error_report(error))
            return None
        self._writer.discard(claim_id)  # so that a leaving job does not wait for them
        self._settle(claim_id)
        job.saved_step = step
        return {"step": step, "folder": self._directory.named(folder)}

    def _export_checkpoint(self, claim_id: str) -> Json:
        """Relative `adapter`, with the weights of the saved step in PEFT's layout, and `num_parameters`. NO_ADAPTER:
        the disk failed, or a finished job has gone back to the weights of an earlier step."""
        step, _ = self.engine.progress(claim_id)
        if not self._has_weights_of(claim_id, step):
            return NO_ADAPTER
        adapter = self._directory.checkpoint_adapter_path(claim_id, step)
        base = self._jobs[claim_id].base
        try:
            self._ranks.by_leader(
                lambda: self.engine.export(
                    claim_id, adapter, base_name=base.name, base_revision=base.revision, has_evidence=False
                )
            )
        except (OSError, LoraCoreError) as error:
            self._report_event(claim_id, "checkpoint_unexported", step=step, error=error_report(error))
            return NO_ADAPTER
        return {
            "adapter": self._directory.named(adapter),
            "num_parameters": self.engine.job(claim_id).adapter.num_parameters,
        }

    def _has_weights_of(self, claim_id: str, step: int) -> bool:
        """Return whether the adapter has the weights of the last completed step, and not of an earlier one."""
        return self.engine.job(claim_id).evaluated_step in (None, step)

    def _begin_checkpoint(self, claim_id: str) -> None:
        """Copy the job's state on the leader, which writes it while the job trains on."""
        self._settle(claim_id)
        began_at, base = time.time(), self._jobs[claim_id].base
        step, _ = self.engine.progress(claim_id)
        if self._ranks.broadcast(step == self._jobs[claim_id].saved_step):
            return
        num_bytes = self.engine.job(claim_id).num_bytes
        self._report_written(self._writer.make_room(num_bytes))
        try:
            self.engine.compare_ranks(claim_id)
            checkpoint = self._ranks.by_leader(lambda: self.engine.checkpoint_snapshot(claim_id))
        except LoraCoreError as error:
            self._report_event(claim_id, "checkpoint_failed", step=step, error=error_report(error))
            return
        adapter = None
        try:
            if self._has_weights_of(claim_id, step):
                adapter = self._ranks.by_leader(
                    lambda: self.engine.adapter_snapshot(claim_id, base_name=base.name, base_revision=base.revision)
                )
        except LoraCoreError as error:
            self._report_event(claim_id, "checkpoint_unexported", step=step, error=error_report(error))
        if checkpoint is None:  # this rank does not lead
            return
        files = CheckpointFiles(
            claim_id=claim_id,
            step=step,
            folder=self._directory.checkpoint_path(claim_id, step),
            adapter_folder=self._directory.checkpoint_adapter_path(claim_id, step),
        )
        draft = CheckpointDraft(files=files, checkpoint=checkpoint, adapter=adapter, began_at=began_at)
        self._writer.begin(draft, num_bytes=num_bytes)

    def _settle(self, claim_id: str) -> None:
        """Wait for the job's unwritten checkpoints, and report them."""
        self._report_written(self._writer.settle(claim_id))

    def release_memory(self) -> None:
        """Return the memory that checkpoints have used. Call it while no job trains."""
        self._writer.release_memory()

    def close(self) -> None:
        """Wait for all unwritten checkpoints, and report them."""
        self._report_written(self._writer.close())
        if self._pipes is not None:
            self._pipes.close()

    def _report_written(self, outcomes: Iterable[WrittenCheckpoint]) -> None:
        for outcome in outcomes:
            claim_id, step, files = outcome.files.claim_id, outcome.files.step, outcome.files
            if outcome.error is not None:
                self._report_event(claim_id, "checkpoint_failed", step=step, error=error_report(outcome.error))
                continue
            self._jobs[claim_id].saved_step = step
            adapter = NO_ADAPTER
            if outcome.num_parameters is not None:
                folder = self._directory.named(files.adapter_folder)
                adapter = {"adapter": folder, "num_parameters": outcome.num_parameters}
            if outcome.adapter_error is not None:
                error = error_report(outcome.adapter_error)
                self._report_event(claim_id, "checkpoint_unexported", step=step, error=error)
            folder, spans = self._directory.named(files.folder), list(outcome.spans)
            self._report_event(claim_id, "checkpointed", step=step, folder=folder, **adapter, spans=spans)

    def _export(self, finished: JobFinished) -> None:
        claim_id, folder = finished.job, self._directory.job_path(finished.job) / "adapter"
        spans: list[Json] = []
        memory = self.engine.memory()  # before the export, whose passes are not training
        try:
            report = exported(
                self.engine,
                claim_id,
                folder,
                base=self._jobs[claim_id].base,
                between=self.report,
                on_verified_linear=partial(self.report, verifying=True),
                spans=spans,
            )
        except (LoraCoreError, OSError) as error:
            self._refuse(claim_id, error)
            return
        body = {
            "step": finished.step,
            "kept_step": finished.kept_step,
            "stopped_early": finished.stopped_early,
            "folder": self._directory.named(folder),
            "num_parameters": self.engine.job(claim_id).adapter.num_parameters,
            "trained_tokens": self.engine.job(claim_id).progress.num_tokens,
            "report": report,
            "memory": memory,
        }
        self._evict(claim_id)
        self._report_event(claim_id, "exported", **body, spans=spans)

    # Reports

    def report(self, *, verifying: bool = False) -> None:
        """Report the checkpoints that were written since the last call, and memory and speed every REPORT_SECONDS.

        During long work, such as an export, this is also the heartbeat for the worker's watchdog.
        """
        self._report_written(self._writer.completed())
        if verifying != self._reported_verifying or time.monotonic() - self._reported_at >= REPORT_SECONDS:
            self._reported_at, self._reported_verifying = time.monotonic(), verifying
            self.events.write(
                {
                    "type": "memory",
                    "verifying": verifying,
                    **self.engine.memory(),
                    "cached_bytes": self.engine.activations.cached_bytes(),
                    "tokens_per_second": round(self.engine.throughput.tokens_per_second, 1),
                    "tick_speeds": self.engine.throughput.table(),
                }
            )

    def _report_event(self, claim_id: str, event_type: str, **body: Any) -> None:
        self.events.write({"type": event_type, "claim_id": claim_id, **body})
        self._log.record_event(claim_id, event_type, body)
