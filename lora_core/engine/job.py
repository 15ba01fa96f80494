# pyright: basic
"""One resident job: its next slices, and how the scores of a slice change its state.

Work is divided into units: one optimizer step or one evaluation. The slices of a unit depend on the job alone. Only a
completed step changes the weights, so an unfinished unit can be replayed.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property

from torch import Tensor

from lora_core.adapter.flat_adapter import FlatAdapter
from lora_core.adapter.optimizer import (
    StepSizes,
    has_joint_sizes,
    has_joint_step,
    joint_step_of,
    learning_rate_at,
    optimizer_step,
    stays_finite,
    step_sizes,
)
from lora_core.adapter.slice_gradients import SliceGradients
from lora_core.config import JobConfig, Kind
from lora_core.data.batching import Unit, make_unit
from lora_core.data.kto_pairs import mismatched
from lora_core.data.token_dataset import TokenDataset, data_digest, rows_of_step
from lora_core.distributed.ranks import ALONE, Ranks
from lora_core.engine.divergence import is_dead
from lora_core.engine.early_stopping import Selection
from lora_core.events import Event, JobDiverged, JobEvaluated, JobFinished, JobStepped, Rewards
from lora_core.kernels.gpu.optimizer_table import AdamwStep
from lora_core.losses.preference import SliceScores
from lora_core.packing.packed_batch import DropoutKey, NoiseKey, SliceInput


@dataclass(kw_only=True, slots=True)
class RunningMean:
    """Running totals of the current unit. Losses are in nats, summed over labels, pairs or answers."""

    next_slice: int = 0
    loss_sum: float = 0.0
    num_correct: int = 0
    chosen_sum: float = 0.0
    rejected_sum: float = 0.0
    num_ordered: int = 0


@dataclass(kw_only=True, slots=True)
class TrainingProgress:
    """State of a job that a checkpoint stores in addition to the vectors. `last_evaluated_step` is -1 if there is none.

    Token counts include completed training steps only.
    """

    step: int = 0
    last_evaluated_step: int = -1
    num_tokens: int = 0
    num_supervised_tokens: int = 0
    selection: Selection = field(default_factory=Selection)


class TrainingJob:
    """A job that is loaded in an engine.

    Attributes:
        served: Tokens that the engine has computed for the job, for fair queueing.
        pending: Events that the next tick reports.
        best: Weights of the best evaluation so far, fp32 like the adapter's p. None if the last weights are kept.
        reference_point: KTO's reference point of the current unit. Not in checkpoints, since weights determine it.
        shortages: Earlier attempts of the job that ran out of memory. Ticks are smaller while it is resident.
        is_torn: An update failed halfway, so the adapter must not be used.
        sizes: Sizes of the step that is due (optimizer.py), fp32 [3] on the device. None unless its batch is complete.
        reference: Reference model of the objective, if it needs one.
        parent_sha256: Digest of the parent adapter's weights, if there is a parent.
    """

    def __init__(
        self,
        name: str,
        config: JobConfig,
        *,
        adapter: FlatAdapter,
        train: TokenDataset,
        valid: TokenDataset | None,
        progress: TrainingProgress,
        best: Tensor | None = None,
        is_started: bool = True,
        reference: FlatAdapter | None = None,
        parent_sha256: str | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        """`is_started`: the adapter is initialized. Otherwise `starting` initializes it and is None at the end."""
        self.name = name
        self.config = config
        self.adapter = adapter
        self.train = train
        self.valid = valid
        self.progress = progress
        self.served = self.shortages = 0
        self.best = best
        self.starting: Iterator[int] | None = None
        if not is_started:
            self.restart_initialization()
        self.reference = reference
        self.parent_sha256 = parent_sha256
        self.is_torn = False
        self._gradients = SliceGradients(adapter=adapter, ranks=ranks)
        self.unit: Unit | None = None
        self.tally = RunningMean()
        self.sizes: Tensor | None = None
        self.reference_point: float | None = None
        self.pending: list[Event] = self._begin_unit()

    @cached_property
    def data_digest(self) -> str:
        return data_digest(self.train, self.valid)

    @property
    def num_examples(self) -> int:
        """Number of training examples: rows, or pairs of rows."""
        return self.train.num_rows // self.config.objective.rows_per_example

    @property
    def step(self) -> int:
        return self.progress.step

    @property
    def evaluated_step(self) -> int | None:
        """Step of the adapter's weights if they were evaluated, else None. After the end, the step that is kept."""
        progress = self.progress
        if progress.last_evaluated_step != progress.step:
            return None
        return self._kept_step() if self.unit is None else progress.step

    def _kept_step(self) -> int:
        return self.step if self.best is None else self.progress.selection.best_step

    @property
    def num_bytes(self) -> int:
        best_bytes = 0 if self.best is None else self.best.nbytes
        reference_bytes = 0 if self.reference is None else self.reference.num_bytes
        return self.adapter.num_bytes + self._gradients.num_bytes + best_bytes + reference_bytes

    def restart_initialization(self) -> None:
        self.starting = self.adapter.starting(self.config.seed)

    def continue_initialization(self, work: int) -> None:
        """Initialize the adapter for about `work` multiplications. `starting` is None once it is complete."""
        while self.starting is not None and work > 0:
            try:
                piece = next(self.starting, None)
            except BaseException:
                self.restart_initialization()  # an exhausted generator would look like a completed one
                raise
            if piece is None:
                self.starting = None
            else:
                work -= piece

    def waiting_tokens(self) -> tuple[int, ...]:
        """Return the tokens that each remaining slice of the unit sends through the base model.

        A slice that also needs a reference pass counts twice.
        """
        assert self.unit is not None
        passes = 1 if self.reference is None else 2
        return tuple(passes * tokens for tokens in self.unit.tokens_of_slices[self.tally.next_slice :])

    def next_slices(self, offsets: Iterable[int]) -> list[SliceInput]:
        """Return slices of the unit by their offset from the next one. Repeated calls return the same slices."""
        return [self._slice(self.tally.next_slice + offset) for offset in offsets]

    def _slice(self, index: int) -> SliceInput:
        unit = self.unit
        assert unit is not None
        training = unit.kind == "train"
        rows, kind = unit.slices[index], self.config.objective.kind
        sequences = tuple(unit.dataset.row(row) for row in rows)
        has_labels = kind in ("classification", "kto") and not unit.measures_point
        key: dict[str, int] = {"seed": self.config.seed, "step": self.step, "slice_index": index}
        dropout = noise = None
        if training and self.config.lora.dropout:
            dropout = DropoutKey(probability=self.config.lora.dropout, **key)
        if training and self.config.neftune_alpha:
            lengths = tuple(len(ids) for ids, _ in sequences)
            noise = NoiseKey(alpha=self.config.neftune_alpha, lengths=lengths, **key)
        return SliceInput(
            adapter=self._gradients.adapter_of(index) if training else self.adapter,
            sequences=sequences,
            label_weight=1 / unit.num_terms if training else 0.0,
            dropout=dropout,
            objective=self.config.objective,
            labels=tuple(unit.dataset.row_label(row) for row in rows) if has_labels else (),
            token_types=tuple(unit.dataset.row_token_types(row) for row in rows),
            reference_point=self.reference_point,
            noise=noise,
            reference=self.reference,
        )

    def collect(self, ranks_of_slices: Sequence[int]) -> None:
        """Add the gradients of this tick's slices, each from the rank that computed it."""
        if self.unit is not None and self.unit.kind == "train":
            self._gradients.collect(self.tally.next_slice, ranks_of_slices)

    def receive(self, scores: SliceScores) -> list[Event]:
        """Add the scores of one slice whose gradient was collected. Call it for the slices of a tick in order.

        After the last slice of a training batch the step is due: `finish_step` takes it. On a CPU `sizes` is set, and
        a GPU measures the steps of all jobs together (joint_steps.py).
        """
        unit, tally = self.unit, self.tally
        assert unit is not None
        if not math.isfinite(scores.loss_sum):
            what = "KTO reference point" if unit.measures_point else "loss"
            return self._diverge(f"The {what} of {unit.kind} slice {tally.next_slice + 1} is not finite.")
        tally.loss_sum += scores.loss_sum
        tally.num_correct += scores.num_correct
        if scores.rewards is not None:
            tally.chosen_sum += scores.rewards.chosen
            tally.rejected_sum += scores.rewards.rejected
            tally.num_ordered += scores.rewards.num_ordered
        tally.next_slice += 1
        if tally.next_slice < len(unit.slices):
            return []
        if unit.measures_point:
            return self._begin_unit(reference_point=max(0.0, tally.loss_sum / unit.num_terms))
        if unit.kind == "evaluate":
            return self._finish_evaluation(unit)
        self._gradients.complete()
        if not has_joint_sizes(self.adapter):
            self.sizes = step_sizes(self.adapter, self.config.optimizer, learning_rate=self._next_rate)
        return []

    @property
    def is_due(self) -> bool:
        """Whether all slices of a training batch were received, so that the step is due."""
        unit = self.unit
        if unit is None or unit.kind != "train":
            return False
        return self.tally.next_slice == len(unit.slices)

    @property
    def has_joint_step(self) -> bool:
        """Whether a GPU takes the job's steps together with those of others (joint_steps.py)."""
        return has_joint_step(self.adapter, self.config.optimizer)

    @property
    def step_adds_on_device(self) -> bool:
        """Whether a step contains sums whose last bits depend on the model of the device: Adafactor's root mean
        squares."""
        return self.config.optimizer.kind == "adafactor"

    def replay_unit(self) -> None:
        """Discard the slices computed since the last completed step or evaluation."""
        self._gradients.drop()
        self.tally, self.sizes = RunningMean(), None

    @property
    def _next_rate(self) -> float:
        return learning_rate_at(self.step + 1, peak=self.config.optimizer.learning_rate, schedule=self.config.schedule)

    def finish_step(self, sizes: StepSizes) -> list[Event]:
        """Take the step that is due. `sizes` are its sizes on the host, and its `norm` that of all ranks."""
        events = self.refuse_step(sizes)
        if events:
            return events
        with self.updating():
            config, rate = self.config.optimizer, self._next_rate
            optimizer_step(self.adapter, config, step=self.step + 1, learning_rate=rate, norm=sizes.norm)
        return self.complete_step(sizes)

    def joint_step(self, sizes: StepSizes) -> AdamwStep:
        """Return the step that is due, for a job with `has_joint_step`. Arguments as in `finish_step`."""
        config, rate = self.config.optimizer, self._next_rate
        return joint_step_of(self.adapter, config, step=self.step + 1, learning_rate=rate, norm=sizes.norm)

    def refuse_step(self, sizes: StepSizes) -> list[Event]:
        """Return JobDiverged if the step that is due is impossible, else nothing. It changes no weights."""
        unit, config, step, rate = self.unit, self.config.optimizer, self.step + 1, self._next_rate
        assert unit is not None
        norm, self.sizes = sizes.norm, None
        if not math.isfinite(norm):
            return self._diverge(f"The gradient of step {step} is not finite.")
        loss = self.tally.loss_sum / unit.num_terms
        if is_dead(self.adapter, self.config.objective, unit.dataset, unit.slices, norm=norm, loss=loss):
            stands = f"exactly zero at a loss of {loss:.4g}: no step from these weights can lower it"
            return self._diverge(f"The gradient of step {step} is {stands}.")
        if not stays_finite(self.adapter, config, learning_rate=rate, sizes=sizes):
            return self._diverge(f"The update of step {step} is not finite.", is_good=True)
        return []

    @contextmanager
    def updating(self) -> Iterator[None]:
        """Mark the job torn if the block fails: a half-applied update can be neither undone nor completed."""
        try:
            yield
        except BaseException:
            self.tear()
            raise

    def tear(self) -> None:
        self.quarantine()
        self.is_torn = True

    def complete_step(self, sizes: StepSizes) -> list[Event]:
        """Count the step whose update is complete, and begin the next unit."""
        unit, step, rate, norm = self.unit, self.step + 1, self._next_rate, sizes.norm
        assert unit is not None
        loss = self.tally.loss_sum / unit.num_terms
        self.progress.step = step
        self.progress.num_tokens += unit.num_tokens
        self.progress.num_supervised_tokens += unit.num_labels
        stepped = JobStepped(
            job=self.name,
            step=step,
            loss=loss,
            learning_rate=rate,
            grad_norm=norm,
            num_tokens=unit.num_tokens,
            num_supervised_tokens=unit.num_labels,
            token_accuracy=self.tally.num_correct / unit.num_accuracy_labels,
            rewards=self._rewards(unit),
        )
        return [stepped, *self._begin_unit()]

    def _finish_evaluation(self, unit: Unit) -> list[Event]:
        self.progress.last_evaluated_step = self.step
        loss = self.tally.loss_sum / unit.num_terms
        if self.step > 0:
            self._select(loss)
        evaluated = JobEvaluated(
            job=self.name,
            step=self.step,
            loss=loss,
            token_accuracy=self.tally.num_correct / unit.num_accuracy_labels,
            num_supervised_tokens=unit.num_labels,
            rewards=self._rewards(unit),
        )
        return [evaluated, *self._begin_unit()]

    def _select(self, loss: float) -> None:
        rule = self.config.early_stopping
        is_best = self.progress.selection.book(step=self.step, loss=loss, min_delta=rule.min_delta if rule else 0.0)
        if is_best and self.best is not None:
            self.best.copy_(self.adapter.p)

    def _rewards(self, unit: Unit) -> Rewards | None:
        if not self.config.objective.is_preference:
            return None
        tally, num_chosen, num_rejected = self.tally, unit.num_terms, unit.num_terms
        if self.reference_point is not None:
            num_chosen = sum(unit.dataset.row_label(row) == 1 for part in unit.slices for row in part)
            num_rejected = unit.num_terms - num_chosen
        chosen = tally.chosen_sum / num_chosen if num_chosen else None
        rejected = tally.rejected_sum / num_rejected if num_rejected else None
        return Rewards(
            chosen=chosen,
            rejected=rejected,
            margin=None if chosen is None or rejected is None else chosen - rejected,
            accuracy=tally.num_ordered / unit.num_terms,
            kl=self.reference_point,
        )

    def quarantine(self) -> None:
        """Stop computing the job. The adapter holds the last completed step, unless an update failed halfway."""
        self.unit = self.starting = self.sizes = None
        self._gradients.drop()

    def _diverge(self, message: str, *, is_good: bool = False) -> list[Event]:
        """Quarantine the job and report the last step with good weights.

        `is_good`: the current weights produced finite losses and a finite, nonzero gradient. Otherwise a resume from
        them would fail again, because a step is deterministic, so the previous step is reported.
        """
        self.quarantine()
        good_step = self.step if is_good else self.step - 1 if self.step else None
        return [JobDiverged(job=self.name, step=self.step, good_step=good_step, message=message)]

    def _begin_unit(self, *, reference_point: float | None = None) -> list[Event]:
        """Start the evaluation or step that is due. For KTO, first the pass that measures its reference point."""
        self.tally, self.reference_point = RunningMean(), reference_point
        if self._evaluation_is_due():
            assert self.valid is not None
            num_examples = self.valid.num_rows // self.config.objective.rows_per_example
            self.unit = self._unit("evaluate", self.valid, range(num_examples))
        elif self.step < self.config.num_steps and self._reason_to_stop() is None:
            examples = rows_of_step(
                num_rows=self.num_examples,
                batch_size=self.config.batch_size,
                seed=self.config.seed,
                step=self.step,
            )
            self.unit = self._unit("train", self.train, examples)
        else:
            self.unit = None
            return [self._finish()]
        return []

    def _unit(self, kind: Kind, dataset: TokenDataset, examples: Sequence[int]) -> Unit:
        if self.config.objective.needs_reference_point and self.reference_point is None:
            others = mismatched(dataset, examples)
            return replace(make_unit("evaluate", others, range(others.num_rows), self.config), measures_point=True)
        return make_unit(kind, dataset, examples, self.config)

    def _finish(self) -> JobFinished:
        """Load the weights to keep into the adapter. Idempotent, so a resume after the last step may repeat it."""
        if self.best is not None:
            self.adapter.p.copy_(self.best)
            self.adapter.refresh_compute()
        is_early = self.step < self.config.num_steps
        reason = self._reason_to_stop() if is_early else None
        return JobFinished(job=self.name, step=self.step, kept_step=self._kept_step(), stopped_early=reason)

    def _reason_to_stop(self) -> str | None:
        return self.progress.selection.reason_to_stop(self.config.early_stopping)

    def _evaluation_is_due(self) -> bool:
        if self.valid is None or self.progress.last_evaluated_step == self.step:
            return False
        every = self.config.evaluate_every_steps
        return self.step in (0, self.config.num_steps) or (every is not None and self.step % every == 0)
