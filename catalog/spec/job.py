"""The job request (`JobRequest`, the body of the API request) and the resolved job that a worker trains (`JobSpec`).

`resolve` replaces every default and every `auto` by a value. docs/reference/job-fields.md lists the rules. Each field
states its unit and limits. A limit that a validator checks is a constant, because its field must state it in OpenAPI
too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal, TypeVar

from pydantic import ConfigDict, Field, StringConstraints, field_validator, model_validator

from catalog.error_texts import ErrorText
from catalog.errors import InvalidRequest
from catalog.spec.data import DataOptions
from catalog.spec.integrations import INTEGRATION_TYPES, Integration, checked
from catalog.spec.lora import LoraRequest, LoraSpec, resolve_lora
from catalog.spec.methods import (
    AUTO_EPOCHS,
    PREFERENCE_MULTIPLIER,
    Hyperparameters,
    Method,
    MethodType,
    PreferenceOptions,
    SupervisedOptions,
    resolve_method,
)
from catalog.spec.model_fields import LAST_SECOND, WITHOUT_NUL, Auto, Strict, Suffix
from catalog.spec.training import (
    BASE_LEARNING_RATE,
    EarlyStopping,
    EvaluationRequest,
    EvaluationSpec,
    OptimizerRequest,
    OptimizerSpec,
    ScheduleRequest,
    ScheduleSpec,
    resolve_evaluation,
    resolve_optimizer,
    resolve_schedule,
)
from catalog.states import Priority

T = TypeVar("T")
Default = TypeVar("Default")
SPEC_VERSION = 1
Precision = Literal["bfloat16", "float32"]
Quantization = Literal["none", "nf4", "int8"]
"""Quantization of the base model's linear layers."""
MAX_PAIRS, MAX_KEY_LENGTH, MAX_VALUE_LENGTH = 16, 64, 512
"""Limits of `metadata`, the same as OpenAI's; lengths in characters."""
MIN_LENGTH, MAX_LENGTH = 8, 131_072
"""Limits of `max_length`, in tokens."""
AUTO_LENGTH, AUTO_CHECKPOINT_STEPS = 4096, 50
Tag = Annotated[str, StringConstraints(min_length=1, max_length=64, pattern=r"^[^\x00-\x1f\x7f]+$")]
Id = Annotated[str, Field(min_length=1, max_length=64, json_schema_extra=WITHOUT_NUL)]
PRIORITY = "Priority class, up to the highest priority of the project and of the API key."
ModelName = Annotated[str, Field(min_length=1, max_length=256, json_schema_extra=WITHOUT_NUL)]


# The request: what a user may ask for


class ResourcesRequest(Strict):
    """Devices of a job. Its memory is estimated from the other fields."""

    devices: int = Field(default=1, description="Number of devices. Must be 1.", json_schema_extra={"enum": [1]})
    strategy: Literal["auto", "single"] = Field(
        default="auto", description="Distribution across devices. auto: single."
    )

    @field_validator("devices")
    @classmethod
    def _one_device(cls, value: int) -> int:
        if value != 1:
            raise ValueError("must be 1: a job trains on one device, which it may share with other jobs")
        return value


class JobRequest(Strict):
    """The body of POST /v1/fine_tuning/jobs: OpenAI's fields, then Lorry's."""

    model: ModelName = Field(
        description="Name of a base model, or of an adapter (ft:…) to continue, which is the same as parent_adapter."
    )
    training_file: Id = Field(description="ID of a file with the purpose fine-tune.")
    validation_file: Id | None = Field(
        default=None, description="ID of another such file, for the validation loss. null: no evaluations."
    )
    method: Method | None = Field(
        default=None, description="Training method and its hyperparameters. null: supervised, with the defaults."
    )
    hyperparameters: Hyperparameters | None = Field(
        default=None,
        description="Deprecated by OpenAI. Use the hyperparameters of `method` instead. null: those of `method`.",
    )
    suffix: Suffix | None = Field(
        default=None,
        description="Part of the adapter's name. Accents and other characters outside ASCII are removed. Characters "
        "other than letters, digits, `.`, `_` and `-` become `-`. null: none.",
    )
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = Field(
        default=None, description="Seed of everything random in the job. null: drawn at random, and recorded."
    )
    metadata: dict[str, Annotated[str, Field(json_schema_extra={"maxLength": MAX_VALUE_LENGTH})]] | None = Field(
        default=None,
        description="Labels of the job, as key-value pairs. null: none.",
        json_schema_extra={
            "maxProperties": MAX_PAIRS,
            "propertyNames": {"minLength": 1, "maxLength": MAX_KEY_LENGTH},
        },
    )
    integrations: Annotated[list[Integration], Field(max_length=len(INTEGRATION_TYPES))] | None = Field(
        default=None, description="Trackers to which the job's curves are written, each at most once. null: none."
    )

    tags: Annotated[list[Tag], Field(max_length=16)] | None = Field(
        default=None, description="Tags for finding jobs, like metadata: GET /v1/fine_tuning/jobs?tag=NAME. null: none."
    )
    resources: ResourcesRequest | None = Field(default=None, description="Devices of the job. null: one device.")
    parent_adapter: ModelName | None = Field(
        default=None,
        description=(
            "ID or name of an adapter of the same base model to continue from. Its weights are copied. `lora` and "
            "`quantization` are inherited; a different value is an error, except lora.dropout, which "
            "is not inherited. null: none."
        ),
    )
    must_serve_on: Annotated[str, Field(min_length=1, max_length=64, json_schema_extra=WITHOUT_NUL)] | None = Field(
        default=None,
        description=(
            "Reject the job unless its adapter can run there: vllm, or the name or ID of a serving endpoint. Depends "
            "on rank, DoRA, patterns and the base model's architecture. null: not checked."
        ),
    )
    lora: LoraRequest = LoraRequest()
    optimizer: OptimizerRequest = OptimizerRequest()
    schedule: ScheduleRequest = ScheduleRequest()
    evaluation: EvaluationRequest = EvaluationRequest()
    data: DataOptions = DataOptions()
    early_stopping: EarlyStopping | None = Field(
        default=None, description="Stop early when the validation loss no longer improves. null: train all steps."
    )
    precision: Literal["auto", "bfloat16", "float32"] = Field(
        default="auto",
        description="Precision of the base model. auto: bf16, or fp32 if there are workers but none has bf16.",
    )
    quantization: Quantization = Field(
        default="none",
        description=(
            "Quantization of the base model's linear layers during training, by bitsandbytes: nf4 (4 bits, as in "
            "QLoRA, arXiv 2305.14314) or int8 (arXiv 2208.07339, without outlier columns). none: the layers have the "
            "dtype `precision`. The adapter is verified on the quantized base model."
        ),
    )
    max_length: Annotated[int, Field(json_schema_extra={"minimum": MIN_LENGTH, "maximum": MAX_LENGTH})] | Auto = Field(
        default="auto",
        description=f"Maximum tokens of a row (see data.overflow). auto: the base model's, at most {AUTO_LENGTH}.",
    )
    max_steps: Annotated[int, Field(ge=1, le=10_000_000)] | None = Field(
        default=None, description="Maximum number of optimizer steps. null: all epochs."
    )
    checkpoint_every_steps: Annotated[int, Field(ge=1, le=1_000_000)] | Auto = Field(
        default="auto", description=f"Optimizer steps between checkpoints. auto: {AUTO_CHECKPOINT_STEPS}."
    )
    priority: Priority = Field(default="normal", description=PRIORITY)
    deadline: Annotated[int, Field(ge=0, le=LAST_SECOND)] | None = Field(
        default=None,
        description=(
            "Time by which the job should finish, in Unix seconds. Among the project's jobs of the same class, "
            "jobs with a deadline go first, ordered by latest start. A job that can't meet its deadline gets a warning "
            "event and keeps running. null: no deadline."
        ),
    )

    @field_validator("metadata")
    @classmethod
    def _metadata_limits(cls, value: dict[str, str] | None) -> dict[str, str] | None:
        if value is None:
            return None
        if len(value) > MAX_PAIRS:
            raise ValueError(f"must have at most {MAX_PAIRS} pairs")
        if any(not 1 <= len(key) <= MAX_KEY_LENGTH or len(text) > MAX_VALUE_LENGTH for key, text in value.items()):
            raise ValueError(
                f"must have keys of 1 to {MAX_KEY_LENGTH} and values of at most {MAX_VALUE_LENGTH} characters"
            )
        return value

    @field_validator("integrations")
    @classmethod
    def _each_tracker_once(cls, value: list[Integration] | None) -> list[Integration] | None:
        return checked(value)

    @field_validator("max_length")
    @classmethod
    def _length_limits(cls, value: int | str) -> int | str:
        if isinstance(value, int) and not MIN_LENGTH <= value <= MAX_LENGTH:
            raise ValueError(f"must be between {MIN_LENGTH} and {MAX_LENGTH} tokens, or 'auto'")
        return value

    @model_validator(mode="after")
    def _one_place_for_hyperparameters(self) -> JobRequest:
        if self.method is not None and self.hyperparameters is not None:
            raise ValueError(f"set hyperparameters only once: in method.{self.method.type} or at the top level")
        return self

    def method_hyperparameters(self) -> Hyperparameters:
        """Return OpenAI's three hyperparameters and the method's own, from the field that the request uses."""
        if self.method is not None:
            return self.method.hyperparameters()
        return self.hyperparameters or Hyperparameters()

    @property
    def method_type(self) -> MethodType:
        return "supervised" if self.method is None else self.method.type


class PlannedJob(Strict):
    """The alternative body of POST /v1/fine_tuning/jobs: the job of a plan. Other fields must match the plan."""

    model_config = ConfigDict(
        extra="allow",  # validated later, together with the plan
        json_schema_extra={"propertyNames": {"enum": ["plan", *JobRequest.model_fields]}},
    )
    plan: Id = Field(description="ID of the plan whose job is created.")


# The resolved job: what a worker trains


class ParentSpec(Strict):
    """The adapter that a job continues: its id, its name, the digest of its files, and the id of its lineage record."""

    adapter: str
    name: str
    artifact: str
    lineage: str


class JobSpec(Strict):
    """A job with every default resolved. A worker trains it, and the adapter's lineage records it.

    The number of steps is known once the files are tokenized, because rows may turn out to be unusable: `num_steps`.
    """

    version: Literal[1] = SPEC_VERSION
    method: MethodType = "supervised"
    method_options: SupervisedOptions | PreferenceOptions
    """Hyperparameters that only the method has."""
    parent: ParentSpec | None = None
    lora: LoraSpec
    optimizer: OptimizerSpec
    schedule: ScheduleSpec
    batch_size: int
    n_epochs: int
    max_steps: int | None
    learning_rate_multiplier: float
    max_length: int
    evaluation: EvaluationSpec
    early_stopping: EarlyStopping | None = None
    checkpoint_every_steps: int
    precision: Precision
    quantization: Quantization = "none"
    slice_tokens: int = 512
    """Maximum tokens of a slice (micro-batch), unless a row is longer. It affects the rounding of gradients."""
    seed: int
    data: DataOptions = DataOptions()

    def num_steps(self, num_rows: int) -> int:
        """Optimizer steps of the job over `num_rows` usable rows, or pairs of answers.

        Every batch is full: at the end of an epoch it continues with rows of the next one, also after the last epoch.
        """
        steps = math.ceil(self.n_epochs * num_rows / self.batch_size)
        return steps if self.max_steps is None else min(steps, self.max_steps)


@dataclass(frozen=True, kw_only=True, slots=True)
class FleetDefaults:
    """Values of a job that depend on the workers that are live when it is accepted. The job keeps them.

    precision: The dtype that the workers support. slice_tokens: Maximum tokens of a slice (micro-batch).
    """

    precision: Precision = "bfloat16"
    slice_tokens: int = 512

    @classmethod
    def of(cls, spec: JobSpec) -> FleetDefaults:
        """Return those of an accepted job."""
        return cls(precision=spec.precision, slice_tokens=spec.slice_tokens)


def resolve(
    request: JobRequest,
    *,
    num_rows: int,
    max_positions: int | None,
    seed: int,
    fleet_defaults: FleetDefaults = FleetDefaults(),
    parent: ParentSpec | None = None,
) -> JobSpec:
    """Replace every `auto` and every default by a value.

    `num_rows`: rows of the training file, as counted at upload. `max_positions`: the longest sequence of the base
    model, in tokens. `seed`: used if the request has none. `fleet_defaults`: what depends on the workers.
    `parent`: the adapter that the job continues; catalog/admission/accept.py has then completed the request.
    """
    hyperparameters = request.method_hyperparameters()
    auto_multiplier = 1.0 if request.method_type == "supervised" else PREFERENCE_MULTIPLIER
    rate, multiplier = _resolve_rate(
        request.optimizer.learning_rate, hyperparameters.learning_rate_multiplier, auto_multiplier=auto_multiplier
    )
    longest = max_positions or AUTO_LENGTH
    return JobSpec(
        method=request.method_type,
        method_options=resolve_method(hyperparameters),
        parent=parent,
        lora=resolve_lora(request.lora),
        optimizer=resolve_optimizer(request.optimizer, learning_rate=rate),
        schedule=resolve_schedule(request.schedule),
        batch_size=_given(hyperparameters.batch_size, auto=auto_batch_size(num_rows)),
        n_epochs=_given(hyperparameters.n_epochs, auto=AUTO_EPOCHS),
        max_steps=request.max_steps,
        learning_rate_multiplier=multiplier,
        max_length=min(longest, _given(request.max_length, auto=AUTO_LENGTH)),
        evaluation=resolve_evaluation(request.evaluation, request.early_stopping),
        early_stopping=request.early_stopping,
        checkpoint_every_steps=_given(request.checkpoint_every_steps, auto=AUTO_CHECKPOINT_STEPS),
        precision=fleet_defaults.precision if request.precision == "auto" else request.precision,
        quantization=request.quantization,
        slice_tokens=fleet_defaults.slice_tokens,
        seed=seed if request.seed is None else request.seed,
        data=request.data,
    )


def _given(value: T | Auto, *, auto: Default) -> T | Default:
    return auto if value == "auto" else value


def _resolve_rate(rate: float | Auto, multiplier: float | Auto, *, auto_multiplier: float) -> tuple[float, float]:
    """Return (peak learning rate, equivalent multiplier). If the request sets both, admission has checked that they
    agree."""
    if rate == "auto":
        factor = auto_multiplier if multiplier == "auto" else multiplier
        return BASE_LEARNING_RATE * factor, factor
    return rate, rate / BASE_LEARNING_RATE if multiplier == "auto" else multiplier


def auto_batch_size(num_rows: int) -> int:
    """Return about 0.5% of the rows, as a power of two from 4 to 32."""
    return min(32, max(4, 2 ** round(math.log2(max(1.0, num_rows * 0.005)))))


def most_steps(spec: JobSpec, num_rows: int) -> int | None:
    """Return the maximum steps of a job over a file of `num_rows`, before the number of usable rows is known.

    Split texts can become more rows; otherwise some rows may be skipped. None if there is no bound.
    """
    return spec.max_steps if spec.data.overflow == "split" else spec.num_steps(num_rows)


def interval_exceeds(spec: JobSpec, num_steps: int | None) -> bool:
    """Return whether the requested evaluation interval is longer than the job."""
    every = spec.evaluation.every_steps
    return every is not None and num_steps is not None and every > num_steps


def is_decided_by_evaluations(spec: JobSpec) -> bool:
    """Return whether the result of the job depends on its evaluations."""
    return spec.early_stopping is not None or spec.evaluation.keep == "best"


def check_evaluated_in_time(spec: JobSpec, num_steps: int | None) -> None:
    """Raises InvalidRequest if the result depends on evaluations and none comes in time. `num_steps`: the maximum."""
    if not is_decided_by_evaluations(spec) or not interval_exceeds(spec, num_steps):
        return
    assert num_steps is not None
    raise InvalidRequest(
        "no_evaluation_in_time" if num_steps > 1 else "no_evaluation_in_one_step",
        field="evaluation.keep 'best'" if spec.early_stopping is None else "early_stopping",
        every_steps=spec.evaluation.every_steps or 0,
        num_steps=num_steps,
        param="evaluation.every_steps",
    )


def evaluations_too_late(spec: JobSpec, num_steps: int) -> ErrorText:
    """Return the warning for a job whose evaluation interval is longer than the job."""
    every_steps = spec.evaluation.every_steps or 0
    if num_steps <= 1:
        return ErrorText.of("evaluations_too_late_for_one_step", every_steps=every_steps)
    if is_decided_by_evaluations(spec):
        return ErrorText.of("deciding_evaluations_too_late", every_steps=every_steps, num_steps=num_steps)
    return ErrorText.of("evaluations_too_late", every_steps=every_steps, num_steps=num_steps)
