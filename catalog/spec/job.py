"""What a user may ask for (`JobRequest`, the body of the API request) and what a worker trains (`JobSpec`).

`resolve` replaces every default and every `auto` by a value; docs/CONFIGURATION.md lists the rules. Each field states
its unit and limits. A limit that a validator checks is a constant, because its field must state it in OpenAPI too.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal, TypeVar

from pydantic import ConfigDict, Field, StringConstraints, field_validator, model_validator

from catalog.spec.data import DataRequest, DataSpec
from catalog.spec.integrations import INTEGRATION_TYPES, Integration, checked
from catalog.spec.lora import LoraRequest, LoraSpec, resolve_lora
from catalog.spec.methods import (
    AUTO_EPOCHS,
    PREFERENCE_MULTIPLIER,
    Hyperparameters,
    Method,
    MethodType,
    PreferenceSpec,
    SupervisedSpec,
    resolve_preference,
    resolve_supervised,
)
from catalog.spec.strict import WITHOUT_NUL, Auto, Label, Strict
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

T = TypeVar("T")
Default = TypeVar("Default")
SPEC_VERSION = 1
Precision = Literal["bfloat16", "float32"]
Quantization = Literal["none", "nf4", "int8"]
"""A label: letters, digits, dot, underscore, hyphen; 64 at most; no slash, space or control character."""
MAX_PAIRS, MAX_KEY_LENGTH, MAX_VALUE_LENGTH = 16, 64, 512
"""Of `metadata`; lengths in characters, as OpenAI limits them."""
MIN_LENGTH, MAX_LENGTH = 8, 131_072
"""Of a row, in tokens."""
AUTO_LENGTH, AUTO_CHECKPOINT_STEPS = 4096, 50
Tag = Annotated[str, StringConstraints(min_length=1, max_length=64, pattern=r"^[^\x00-\x1f\x7f]+$")]
Id = Annotated[str, Field(min_length=1, max_length=64, json_schema_extra=WITHOUT_NUL)]
ModelName = Annotated[str, Field(min_length=1, max_length=256, json_schema_extra=WITHOUT_NUL)]


# The request: what a user may ask for


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
    training_file: Id = Field(description="Id of a file with the purpose fine-tune.")
    validation_file: Id | None = Field(
        default=None, description="Id of another such file, for the validation loss. null: no evaluations."
    )
    method: Method | None = None
    hyperparameters: Hyperparameters | None = Field(
        default=None, description="Deprecated by OpenAI; the same as method's."
    )
    suffix: Label | None = Field(default=None, description="Becomes part of the adapter's name.")
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    metadata: dict[str, Annotated[str, Field(json_schema_extra={"maxLength": MAX_VALUE_LENGTH})]] | None = Field(
        default=None,
        description="Labels of the job, as key-value pairs.",
        json_schema_extra={
            "maxProperties": MAX_PAIRS,
            "propertyNames": {"minLength": 1, "maxLength": MAX_KEY_LENGTH},
        },
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
    max_length: Annotated[int, Field(json_schema_extra={"minimum": MIN_LENGTH, "maximum": MAX_LENGTH})] | Auto = Field(
        default="auto", description=f"Tokens of a row that are kept. auto: the base's, at most {AUTO_LENGTH}."
    )
    max_steps: Annotated[int, Field(ge=1, le=10_000_000)] | None = Field(
        default=None, description="End after so many steps."
    )
    checkpoint_every_steps: Annotated[int, Field(ge=1, le=1_000_000)] | Auto = Field(
        default="auto", description=f"auto: {AUTO_CHECKPOINT_STEPS}."
    )
    priority: Priority = Field(
        default="normal", description="Priority class, up to the highest priority of the project and of the API key."
    )
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
        if len(value) > MAX_PAIRS:
            raise ValueError(f"at most {MAX_PAIRS} pairs")
        if any(not 1 <= len(key) <= MAX_KEY_LENGTH or len(text) > MAX_VALUE_LENGTH for key, text in value.items()):
            raise ValueError(f"a key has 1 to {MAX_KEY_LENGTH} characters and a value at most {MAX_VALUE_LENGTH}")
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
            raise ValueError(f"give hyperparameters once: in method.{self.method.type}, not at the top as well")
        return self

    def method_hyperparameters(self) -> Hyperparameters:
        """OpenAI's three and the method's own, from the field where they were given."""
        if self.method is not None:
            return self.method.hyperparameters()
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


# The resolved job: what a worker trains


class ParentSpec(Strict):
    """The adapter that a job begins with: its id and name, the digest of its files, and its lineage record's id."""

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
    supervised: SupervisedSpec | None = None
    """Of the method supervised. None in records that are older than its hyperparameters."""
    preference: PreferenceSpec | None = None
    """Of the methods that compare answers, in pairs or by their labels."""
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
    """None: ten times, evenly over the job."""
    keep: Literal["last", "best"] = "last"
    early_stopping: EarlyStopping | None = None
    checkpoint_every_steps: int
    precision: Precision
    quantization: Quantization = "none"
    seed: int
    data: DataSpec = DataSpec()
    samples: Samples | None = None

    @property
    def method_hyperparameters(self) -> SupervisedSpec | PreferenceSpec:
        """The method's own, without OpenAI's three."""
        return self.preference or self.supervised or SupervisedSpec()

    def num_steps(self, num_rows: int) -> int:
        """Optimizer steps of the job over `num_rows` usable rows, or pairs of answers.

        Every batch is full: at the end of an epoch it continues with rows of the next one, also after the last epoch.
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
    """Replace every `auto` and every default by a value.

    `num_rows`: rows of the training file, as counted at upload. `max_positions`: the longest sequence of the base
    model, in tokens. `seed`: of a request without one. `auto_precision`: the one that suits the workers. `parent`: the
    adapter that the job continues; catalog/admission/parent.py has then completed the request.
    """
    hyperparameters = request.method_hyperparameters()
    preference = resolve_preference(hyperparameters)
    auto_multiplier = 1.0 if preference is None else PREFERENCE_MULTIPLIER
    rate, multiplier = _resolve_rate(
        request.optimizer.learning_rate, hyperparameters.learning_rate_multiplier, auto_multiplier=auto_multiplier
    )
    longest = max_positions or AUTO_LENGTH
    return JobSpec(
        method=request.method_type,
        supervised=resolve_supervised(hyperparameters),
        preference=preference,
        parent=parent,
        lora=resolve_lora(request.lora),
        optimizer=resolve_optimizer(request.optimizer, learning_rate=rate),
        schedule=resolve_schedule(request.schedule),
        batch_size=_given(hyperparameters.batch_size, auto=auto_batch_size(num_rows)),
        n_epochs=_given(hyperparameters.n_epochs, auto=AUTO_EPOCHS),
        max_steps=request.max_steps,
        learning_rate_multiplier=multiplier,
        max_length=min(longest, _given(request.max_length, auto=AUTO_LENGTH)),
        evaluate_every_steps=_given(request.evaluation.every_steps, auto=None),
        keep=resolve_keep(request.evaluation, request.early_stopping),
        early_stopping=request.early_stopping,
        checkpoint_every_steps=_given(request.checkpoint_every_steps, auto=AUTO_CHECKPOINT_STEPS),
        precision=auto_precision if request.precision == "auto" else request.precision,
        quantization=request.quantization,
        seed=seed if request.seed is None else request.seed,
        data=DataSpec(**request.data.model_dump()),
        samples=request.evaluation.samples,
    )


def _given(value: T | Auto, *, auto: Default) -> T | Default:
    return auto if value == "auto" else value


def _resolve_rate(rate: float | Auto, multiplier: float | Auto, *, auto_multiplier: float) -> tuple[float, float]:
    """(peak learning rate, the multiplier that gives the same). If both were given they agree: admission checks it."""
    if rate == "auto":
        factor = auto_multiplier if multiplier == "auto" else multiplier
        return BASE_LEARNING_RATE * factor, factor
    return rate, rate / BASE_LEARNING_RATE if multiplier == "auto" else multiplier


def auto_batch_size(num_rows: int) -> int:
    """About 0.5% of the rows, a power of two between 4 and 32."""
    return min(32, max(4, 2 ** round(math.log2(max(1.0, num_rows * 0.005)))))
