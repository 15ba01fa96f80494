"""What a person may ask for (`JobRequest`, the wire body) and what it comes to (`JobSpec`, all numbers known).

Units and limits stand at the fields and nowhere else. `resolve` turns the one into the other by rules
that docs/CONFIGURATION.md repeats; the api never invents a default of its own.
"""

from __future__ import annotations

import math
import re
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, StringConstraints, field_validator, model_validator

from catalog.spec.data import DataRequest, DataSpec
from catalog.spec.integrations import INTEGRATION_TYPES, Integration, checked
from catalog.spec.lora import LoraRequest, LoraSpec, resolve_lora
from catalog.spec.methods import (
    PREFERENCE_MULTIPLIER,
    Hyperparameters,
    Method,
    MethodType,
    PreferenceSpec,
    SupervisedSpec,
    resolve_preference,
    resolve_supervised,
)
from catalog.spec.strict import WITHOUT_NUL, Auto, Strict
from catalog.spec.training import (
    BASE_LEARNING_RATE,
    EarlyStopping,
    EvaluationRequest,
    OptimizerRequest,
    OptimizerSpec,
    Samples,
    ScheduleRequest,
    ScheduleSpec,
    resolve_keep,
    resolve_optimizer,
    resolve_schedule,
)
from catalog.states import Priority

SPEC_VERSION = 1
Precision = Literal["bfloat16", "float32"]
Quantization = Literal["none", "nf4", "int8"]
Suffix = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
"""A label: letters, digits, dot, underscore, hyphen; 64 at most; no slash, space or control character."""
LabelValue = Annotated[str, Field(json_schema_extra={"maxLength": 512})]
Length = Annotated[int, Field(json_schema_extra={"minimum": 8, "maximum": 131_072})]
"""Limits that `JobRequest` checks with words of its own are told to the OpenAPI document in this way."""
Tag = Annotated[str, StringConstraints(min_length=1, max_length=64, pattern=r"^[^\x00-\x1f\x7f]+$")]
Id = Annotated[str, Field(min_length=1, max_length=64, json_schema_extra=WITHOUT_NUL)]
ModelName = Annotated[str, Field(min_length=1, max_length=256, json_schema_extra=WITHOUT_NUL)]


class ResourcesRequest(Strict):
    """What a job may say of devices. Its memory is reckoned from what it trains, and needn't be said."""

    devices: int = Field(default=1, description="1: every job trains on one device.", json_schema_extra={"enum": [1]})
    strategy: Literal["auto", "single"] = Field(default="auto", description="auto: single.")

    @field_validator("devices")
    @classmethod
    def _one_device(cls, value: int) -> int:
        if value != 1:
            raise ValueError("must be 1: a job trains on one device, which others may share")
        return value


class JobRequest(Strict):
    """The body of POST /v1/fine_tuning/jobs: OpenAI's fields, then Lorry's."""

    model: ModelName = Field(
        description="A base model's name; or an adapter's, ft:…, to continue that, as parent_adapter does."
    )
    training_file: Id
    validation_file: Id | None = None
    method: Method | None = None
    hyperparameters: Hyperparameters | None = Field(
        default=None, description="Deprecated by OpenAI; the same as method's."
    )
    suffix: Suffix | None = Field(default=None, description="Becomes part of the adapter's name.")
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    metadata: dict[str, LabelValue] | None = Field(
        default=None, json_schema_extra={"maxProperties": 16, "propertyNames": {"minLength": 1, "maxLength": 64}}
    )
    integrations: Annotated[list[Integration], Field(max_length=len(INTEGRATION_TYPES))] | None = Field(
        default=None, description="Trackers that the job's curves are written to, beside the record."
    )

    tags: Annotated[list[Tag], Field(max_length=16)] | None = Field(
        default=None, description="What jobs are found by, beside metadata: GET /v1/fine_tuning/jobs?tag=NAME."
    )
    resources: ResourcesRequest | None = Field(default=None, description="Where it trains: on one device.")
    parent_adapter: ModelName | None = Field(
        default=None,
        description=(
            "Id or name of an adapter of the same base model that the job begins with. What `lora` and `quantization` "
            "leave out is then the parent's, and what they say must be so; lora.dropout is the job's own."
        ),
    )
    lora: LoraRequest = LoraRequest()
    optimizer: OptimizerRequest = OptimizerRequest()
    schedule: ScheduleRequest = ScheduleRequest()
    evaluation: EvaluationRequest = EvaluationRequest()
    data: DataRequest = DataRequest()
    early_stopping: EarlyStopping | None = Field(
        default=None, description="End before the last step where the held-out loss falls no more; null: never."
    )
    precision: Literal["auto", "bfloat16", "float32"] = Field(
        default="auto",
        description="The base's dtype; auto: bfloat16, or float32 where workers live and none's device has it.",
    )
    quantization: Quantization = Field(
        default="none",
        description=(
            "How the base's linear layers are held while training: nf4 (4 bits, as in QLoRA, arXiv 2305.14314) or int8 "
            "(arXiv 2208.07339, without outlier columns), by bitsandbytes; none: as they are, in `precision`. The "
            "adapter is verified on the base so held."
        ),
    )
    max_length: Length | Auto = Field(
        default="auto", description="Tokens of a row that are kept. auto: the base's, at most 4096."
    )
    max_steps: Annotated[int, Field(ge=1, le=10_000_000)] | None = Field(
        default=None, description="End after so many steps."
    )
    checkpoint_every_steps: Annotated[int, Field(ge=1, le=1_000_000)] | Auto = Field(
        default="auto", description="auto: 50."
    )
    priority: Priority = "normal"
    deadline: Annotated[int, Field(ge=0, le=253_402_300_799)] | None = Field(
        default=None,
        description=(
            "When the job should have ended, in seconds since 1970. Of the project's jobs of its class, those with a "
            "deadline go first, that first which must start first; one that can't meet it is told so and goes on."
        ),
    )

    @field_validator("metadata")
    @classmethod
    def _metadata_limits(cls, value: dict[str, str] | None) -> dict[str, str] | None:
        if value is None:
            return None
        if len(value) > 16:
            raise ValueError("at most 16 pairs")
        if any(not 1 <= len(k) <= 64 or len(v) > 512 for k, v in value.items()):
            raise ValueError("a key has 1 to 64 characters and a value at most 512")
        return value

    @field_validator("integrations")
    @classmethod
    def _each_tracker_once(cls, value: list[Integration] | None) -> list[Integration] | None:
        return checked(value)

    @field_validator("max_length")
    @classmethod
    def _length_limits(cls, value: int | str) -> int | str:
        if isinstance(value, int) and not 8 <= value <= 131_072:
            raise ValueError("must be between 8 and 131072 tokens, or 'auto'")
        return value

    @model_validator(mode="after")
    def _one_place_for_hyperparameters(self) -> JobRequest:
        if self.method is not None and self.hyperparameters is not None:
            raise ValueError(f"give hyperparameters once: in method.{self.method.type}, not at the top as well")
        return self

    def numbers(self) -> Hyperparameters:
        """The method's numbers, OpenAI's three among them, from wherever they were given."""
        if self.method is not None:
            return self.method.numbers()
        return self.hyperparameters or Hyperparameters()

    @property
    def method_type(self) -> MethodType:
        return "supervised" if self.method is None else self.method.type


class PlannedJob(Strict):
    """The other body of POST /v1/fine_tuning/jobs: the job that a plan has planned. Other fields must say the same."""

    model_config = ConfigDict(
        extra="allow",  # they are read with the plan, and refused there as anywhere
        json_schema_extra={"propertyNames": {"enum": ["plan", *JobRequest.model_fields]}},
    )
    plan: Id = Field(description="A plan's id.")


class ParentSpec(Strict):
    """The adapter that a job begins with: its id and name, the digest of its files, and its lineage record's id."""

    adapter: str
    name: str
    artifact: str
    lineage: str


class JobSpec(Strict):
    """A job with every default resolved: what lineage records and what a worker obeys.

    `n_epochs` with the number of usable rows gives the number of steps, once the files are prepared:
    `num_steps(rows)`.
    """

    version: Literal[1] = SPEC_VERSION
    method: MethodType = "supervised"
    supervised: SupervisedSpec | None = None
    """Only where answers are learnt as they are; None there in records of before there was something to choose."""
    preference: PreferenceSpec | None = None
    """Only where answers are compared, in pairs or by their labels."""
    parent: ParentSpec | None = None
    lora: LoraSpec
    optimizer: OptimizerSpec
    schedule: ScheduleSpec
    batch_size: int
    n_epochs: int
    max_steps: int | None
    learning_rate_multiplier: float
    max_length: int
    evaluate_every_steps: int | None
    """None: ten times over the job."""
    keep: Literal["last", "best"] = "last"
    early_stopping: EarlyStopping | None = None
    checkpoint_every_steps: int
    precision: Precision
    quantization: Quantization = "none"
    """Of jobs from before there was a choice: none."""
    seed: int
    data: DataSpec = DataSpec()
    samples: Samples | None = None

    @property
    def method_numbers(self) -> SupervisedSpec | PreferenceSpec:
        """Those that its method has beside OpenAI's three."""
        return self.preference or self.supervised or SupervisedSpec()

    def num_steps(self, num_rows: int) -> int:
        """Optimizer steps of the whole job over `num_rows` usable rows, or pairs of answers.

        Every batch is full: it runs on into the next epoch's order, and the last one may go past the end.
        """
        steps = math.ceil(self.n_epochs * num_rows / self.batch_size)
        return steps if self.max_steps is None else min(steps, self.max_steps)


def resolve(
    request: JobRequest,
    *,
    num_rows: int,
    max_positions: int | None,
    seed: int,
    auto_precision: Precision = "bfloat16",
    parent: ParentSpec | None = None,
) -> JobSpec:
    """Every `auto` becomes a number.

    num_rows: rows of the training file, as counted at upload. max_positions: the longest sequence that
    the base was made for, in tokens. seed: used where the request names none. auto_precision: what suits the
    workers there are. parent: what it continues; the request is then one that `continuing` has completed.
    """
    numbers = request.numbers()
    preference = resolve_preference(numbers)
    auto_multiplier = 1.0 if preference is None else PREFERENCE_MULTIPLIER
    rate, multiplier = _resolve_rate(
        request.optimizer.learning_rate, numbers.learning_rate_multiplier, auto_multiplier=auto_multiplier
    )
    longest = max_positions or 4096
    return JobSpec(
        method=request.method_type,
        supervised=resolve_supervised(numbers),
        preference=preference,
        parent=parent,
        lora=resolve_lora(request.lora),
        optimizer=resolve_optimizer(request.optimizer, learning_rate=rate),
        schedule=resolve_schedule(request.schedule),
        batch_size=auto_batch_size(num_rows) if numbers.batch_size == "auto" else numbers.batch_size,
        n_epochs=3 if numbers.n_epochs == "auto" else numbers.n_epochs,
        max_steps=request.max_steps,
        learning_rate_multiplier=multiplier,
        max_length=min(longest, 4096) if request.max_length == "auto" else min(longest, request.max_length),
        evaluate_every_steps=None if request.evaluation.every_steps == "auto" else request.evaluation.every_steps,
        keep=resolve_keep(request.evaluation, request.early_stopping),
        early_stopping=request.early_stopping,
        checkpoint_every_steps=50 if request.checkpoint_every_steps == "auto" else request.checkpoint_every_steps,
        precision=auto_precision if request.precision == "auto" else request.precision,
        quantization=request.quantization,
        seed=seed if request.seed is None else request.seed,
        data=DataSpec(**request.data.model_dump()),
        samples=request.evaluation.samples,
    )


def _resolve_rate(rate: float | Auto, multiplier: float | Auto, *, auto_multiplier: float) -> tuple[float, float]:
    """(peak rate, the multiplier that says the same). Where both were given they agree: submission refuses others."""
    if rate == "auto":
        factor = auto_multiplier if multiplier == "auto" else multiplier
        return BASE_LEARNING_RATE * factor, factor
    return rate, rate / BASE_LEARNING_RATE if multiplier == "auto" else multiplier


def auto_batch_size(num_rows: int) -> int:
    """About 0.5% of the rows, a power of two between 4 and 32."""
    return min(32, max(4, 2 ** round(math.log2(max(1.0, num_rows * 0.005)))))


LABEL_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$"
LABEL = re.compile(LABEL_PATTERN.replace("$", r"\Z"))
"""What names chosen by people must look like (base models, projects, keys)."""
