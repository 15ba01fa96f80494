"""The body of a sweep request (`SweepRequest`): a job, the fields that vary, and the search method.

Each field states its unit and limits. docs/how-to/sweeps.md explains them.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from catalog.search.fields import VARIABLE
from catalog.spec.job import PRIORITY, JobRequest
from catalog.spec.strict import Strict
from catalog.states import Priority

MAX_TRIALS = 1000
MAX_PARAMETERS = 32
MAX_VALUES = 200
LARGEST = 1e12
"""Maximum magnitude of a bound: larger than the limits of all fields, and far below the largest float."""

SearchType = Literal["grid", "random", "asha", "ask_tell"]
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
OWN_FIELDS: dict[SearchType, tuple[str, ...]] = {
    "grid": (),
    "random": ("trials",),
    "asha": ("trials", "reduction_factor", "min_steps", "max_rungs"),
    "ask_tell": ("trials",),
}
"""The fields that each search method uses, in addition to the seed."""
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
            "grid: every combination. random: `trials` independent samples. asha: random, with early stopping at rungs "
            "(asynchronous successive halving, arXiv 1810.05934). ask_tell: the client sets the parameters of each "
            "trial."
        )
    )
    trials: Annotated[int, Field(ge=1, le=MAX_TRIALS)] | None = Field(
        default=None,
        description="Number of trials; for ask_tell the maximum. null: a grid, with one trial per combination.",
    )
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = Field(
        default=None,
        description="Seed for sampling, and for trials whose job sets none. null: chosen at random and returned.",
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
    max_rungs: Annotated[int, Field(ge=1, le=20)] | None = Field(
        default=None, description="Maximum number of rungs (asha only). null: all rungs before the last step."
    )

    @model_validator(mode="after")
    def _fields_of_its_type(self) -> Search:
        for name in OWN_FIELDS["asha"]:
            if name not in OWN_FIELDS[self.type] and getattr(self, name) is not None:
                raise ValueError(f"{self.type} has no {name}: remove it")
        if self.trials is None and self.type != "grid":
            raise ValueError(f"{self.type} requires trials: set the number of trials")
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

    parameters: Annotated[dict[str, Parameter], Field(max_length=MAX_PARAMETERS)] = Field(
        default={},
        description="The fields that vary, by dotted path, for example lora.rank. Empty for ask_tell.",
        json_schema_extra={"propertyNames": {"enum": [*VARIABLE]}},
    )
    search: Search
    objective: Objective = Objective()
    keep_adapters: Literal["all", "best"] = Field(
        default="all", description="best: once all trials have finished, delete all adapters except the best one."
    )
    max_concurrent: Annotated[int, Field(ge=1, le=MAX_TRIALS)] | None = Field(
        default=None, description="Maximum number of unfinished trials at one time. null: no limit."
    )
    priority: Priority = Field(default="batch", description=PRIORITY)

    @model_validator(mode="after")
    def _parameters_of_its_search(self) -> SweepRequest:
        if self.search.type == "ask_tell" and self.parameters:
            raise ValueError("an ask_tell sweep has no parameters: set them when you create each trial")
        if self.search.type == "ask_tell" and self.max_concurrent is not None:
            raise ValueError("an ask_tell sweep has no max_concurrent: the client decides when it creates trials")
        if self.search.type != "ask_tell" and not self.parameters:
            raise ValueError("a sweep requires parameters: set the fields that vary")
        return self

    def template(self) -> dict[str, Any]:
        """Return the fields that all trials share, as the body of a job."""
        own = SweepRequest.model_fields.keys() - JobRequest.model_fields.keys()
        return {"priority": self.priority, **self.model_dump(mode="json", exclude_unset=True, exclude=own)}
