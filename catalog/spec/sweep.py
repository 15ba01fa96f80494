"""The body of a sweep request (`SweepRequest`): a job, the fields that vary, and the search method.

Each field states its unit and limits. docs/how-to/sweeps.md explains them.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from catalog.spec.job import PRIORITY, JobRequest
from catalog.spec.model_fields import Strict, fields_of
from catalog.states import Priority

MAX_TRIALS = 1000
MAX_PARAMETERS = 32
MAX_VALUES = 200
LARGEST = 1e12
"""Maximum magnitude of a bound: larger than the limits of all fields, and far below the largest float."""
TPE_AT_ONCE = 4
"""Default of max_concurrent for tpe, which learns only from trials that have ended."""
FIXED: dict[str, str] = {
    "model": "all trials of a sweep train on the same base model",
    "training_file": "all trials of a sweep are compared on the same data",
    "validation_file": "all trials of a sweep are compared on the same data",
    "suffix": "it only names adapters",
    "metadata": "it only labels jobs",
    "integrations": "they do not affect the adapter",
    "must_serve_on": "it only restricts the other fields",
    "priority": "it only affects when a job trains",
}
"""Fields that a sweep can't vary, and the reasons."""
VARIABLE = {path: kind for path, kind in fields_of(JobRequest) if path.split(".", 1)[0] not in FIXED}
"""Paths of the fields that a sweep may vary, and their annotations."""

SearchType = Literal["grid", "random", "tpe", "asha"]
Metric = Literal[
    "valid_loss",
    "valid_mean_token_accuracy",
    "valid_reward_accuracy",
    "valid_reward_margin",
    "train_loss",
    "train_mean_token_accuracy",
]
Goal = Literal["minimize", "maximize"]
SweepState = Literal["running", "succeeded", "failed", "cancelled"]
Bound = Annotated[float, Field(ge=-LARGEST, le=LARGEST, allow_inf_nan=False)]


class Parameter(Strict):
    """The possible values of a field: a list of `values`, or a range from `min` to `max`."""

    values: Annotated[list[Any], Field(min_length=1, max_length=MAX_VALUES)] | None = Field(
        default=None, description="The possible values. null: a range."
    )
    min: Bound | None = Field(default=None, description="Lower end of the range. null: `values` are set.")
    max: Bound | None = Field(default=None, description="Upper end of the range. null: `values` are set.")
    scale: Literal["linear", "log"] = Field(
        default="linear", description="Scale of the range. log: equal ratios are equally likely; min must be above 0."
    )
    points: Annotated[int, Field(ge=2, le=MAX_TRIALS)] | None = Field(
        default=None,
        description="Number of values from min to max, evenly spaced on the scale (grid only). null: not a grid, "
        "or `values` are set.",
    )

    @model_validator(mode="after")
    def _values_or_a_range(self) -> Parameter:
        is_range = self.min is not None or self.max is not None
        if (self.values is not None) == is_range:
            raise ValueError("set either values, or min and max")
        if self.values is not None:
            if self.points is not None or self.scale != "linear":
                raise ValueError("scale and points can't be combined with values: remove them, or set min and max")
            return self
        if self.min is None or self.max is None:
            raise ValueError("set both min and max")
        if not self.min < self.max:
            raise ValueError("min must be less than max; to set a single value, use values")
        if self.scale == "log" and self.min <= 0:
            raise ValueError("min must be greater than 0 for a log scale")
        return self


class Search(Strict):
    """The search method: how parameters are chosen, and whether bad trials are stopped early."""

    type: SearchType = Field(
        description=(
            "grid: every combination. random: `trials` independent samples. tpe: `trials` samples that learn from the "
            "trials that have ended (tree-structured Parzen estimator). asha: random with the pruner asha."
        )
    )
    trials: Annotated[int, Field(ge=1, le=MAX_TRIALS)] | None = Field(
        default=None, description="Number of trials. null: a grid, with one trial per combination."
    )
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = Field(
        default=None,
        description="Seed for sampling, and for trials whose job sets none. null: chosen at random and returned.",
    )
    pruner: Literal["asha"] | None = Field(
        default=None,
        description="asha: compare trials at rungs, and stop the worse ones (asynchronous successive halving, "
        "arXiv 1810.05934). null: stop no trial, unless the type is asha.",
    )
    reduction_factor: Annotated[int, Field(ge=2, le=100)] | None = Field(
        default=None, description="At each rung, the best 1 of this many trials continues (asha only). null: 3."
    )
    min_steps: Annotated[int, Field(ge=1, le=1_000_000)] | None = Field(
        default=None,
        description=(
            "Optimizer steps before the first rung (asha only). Each further rung is at reduction_factor times the "
            "steps. null: chosen so that three rungs come before the last step."
        ),
    )

    @property
    def is_pruned(self) -> bool:
        return self.pruner is not None or self.type == "asha"

    @model_validator(mode="after")
    def _fields_of_its_type(self) -> Search:
        if (self.trials is None) != (self.type == "grid"):
            raise ValueError(
                "grid has no trials: remove it" if self.trials else f"{self.type} requires trials: set their number"
            )
        for name in ("reduction_factor", "min_steps"):
            if not self.is_pruned and getattr(self, name) is not None:
                raise ValueError(f"{name} requires a pruner: remove it, or set pruner to 'asha'")
        return self


class Objective(Strict):
    """The metric by which trials are compared."""

    metric: Metric = Field(
        default="valid_loss",
        description=(
            "Metric of a trial: its latest value, and after training the value of the adapter. train_… metrics are "
            "means over the last 10 steps. valid_reward_… metrics are not available for the method supervised."
        ),
    )
    goal: Goal | Literal["auto"] = Field(default="auto", description="auto: minimize a loss, maximize other metrics.")

    def resolved_goal(self) -> Goal:
        if self.goal != "auto":
            return self.goal
        return "minimize" if self.metric.endswith("_loss") else "maximize"


class SweepRequest(JobRequest):
    """The body of POST /v1/sweeps: the job fields that all trials share, and the parameters that vary."""

    parameters: Annotated[dict[str, Parameter], Field(min_length=1, max_length=MAX_PARAMETERS)] = Field(
        description="The fields that vary, by dotted path, for example lora.rank.",
        json_schema_extra={"propertyNames": {"enum": [*VARIABLE]}},
    )
    search: Search
    objective: Objective = Objective()
    keep_adapters: Literal["all", "best"] = Field(
        default="all", description="best: once all trials have finished, delete all adapters except the best one."
    )
    max_concurrent: Annotated[int, Field(ge=1, le=MAX_TRIALS)] | None = Field(
        default=None,
        description=f"Maximum number of unfinished trials at one time. null: {TPE_AT_ONCE} for tpe, else no limit.",
    )
    priority: Priority = Field(default="batch", description=PRIORITY)

    def template(self) -> dict[str, Any]:
        """Return the fields that all trials share, as the body of a job."""
        own = SweepRequest.model_fields.keys() - JobRequest.model_fields.keys()
        return {"priority": self.priority, **self.model_dump(mode="json", exclude_unset=True, exclude=own)}
