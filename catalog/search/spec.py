"""What a person may ask of a sweep (`SweepRequest`, the wire body): a job, what varies of it, and how it is searched.

Units and limits stand at the fields. docs/SWEEPS.md tells what they mean together.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from catalog.search.fields import VARIABLE
from catalog.spec.job import JobRequest
from catalog.spec.strict import Strict
from catalog.states import Priority

MAX_TRIALS = 1000
MAX_PARAMETERS = 32
MAX_VALUES = 200
LARGEST = 1e12
"""Of a bound: beyond what any field takes, and far from what a float can't hold."""

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
"""Of each way to search, what it reads beside the seed."""
Bound = Annotated[float, Field(ge=-LARGEST, le=LARGEST, allow_inf_nan=False)]


class Parameter(Strict):
    """What a field may be: one of `values`, or a number from `min` to `max`."""

    values: Annotated[list[Any], Field(min_length=1, max_length=MAX_VALUES)] | None = None
    min: Bound | None = None
    max: Bound | None = None
    scale: Literal["linear", "log"] = Field(
        default="linear", description="log: every factor is as likely as another of its size."
    )
    points: Annotated[int, Field(ge=2, le=MAX_TRIALS)] | None = Field(
        default=None, description="Of a grid: so many numbers from min to max, evenly on the scale."
    )

    @model_validator(mode="after")
    def _values_or_a_range(self) -> Parameter:
        is_range = self.min is not None or self.max is not None
        if (self.values is not None) == is_range:
            raise ValueError("give either values, or min and max")
        if self.values is not None:
            if self.points is not None or self.scale != "linear":
                raise ValueError("scale and points belong to min and max: leave them out beside values")
            return self
        if self.min is None or self.max is None:
            raise ValueError("give both min and max")
        if not self.min < self.max:
            raise ValueError("min must be below max; for a single value, give it in values")
        if self.scale == "log" and self.min <= 0:
            raise ValueError("a log scale begins above 0")
        return self


class Search(Strict):
    """How parameters are chosen, and whether bad trials are stopped."""

    type: SearchType = Field(
        description=(
            "grid: every combination. random: as many as `trials`, each drawn by itself. asha: drawn the same way, and "
            "stopped at rungs (asynchronous successive halving, arXiv 1810.05934). ask_tell: the client gives each "
            "trial its parameters."
        )
    )
    trials: Annotated[int, Field(ge=1, le=MAX_TRIALS)] | None = Field(
        default=None, description="How many, of ask_tell at most. A grid has as many as it has combinations."
    )
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = Field(
        default=None,
        description="Of what is drawn, and of each trial whose job names none. null: drawn once, and shown.",
    )
    reduction_factor: Annotated[int, Field(ge=2, le=100)] | None = Field(
        default=None, description="Of asha: at each rung the best of so many go on. null: 3."
    )
    min_steps: Annotated[int, Field(ge=1, le=1_000_000)] | None = Field(
        default=None, description="Of asha: the first rung; each further one is at reduction_factor times the steps."
    )
    max_rungs: Annotated[int, Field(ge=1, le=20)] | None = Field(
        default=None, description="Of asha: rungs at most. null: as many as come before the last step."
    )

    @model_validator(mode="after")
    def _fields_of_its_type(self) -> Search:
        for name in OWN_FIELDS["asha"]:
            if name not in OWN_FIELDS[self.type] and getattr(self, name) is not None:
                raise ValueError(f"{self.type} has no {name}: leave it out")
        if self.trials is None and self.type != "grid":
            raise ValueError(f"{self.type} needs trials: say how many")
        return self


class Objective(Strict):
    """What tells good trials from bad ones."""

    metric: Metric = Field(
        default="valid_loss",
        description=(
            "As measured last, and at the end of the adapter itself. Of train_… the mean of the last ten steps; "
            "valid_reward_… are of methods that compare answers."
        ),
    )
    goal: Goal | Literal["auto"] = Field(default="auto", description="auto: a loss is minimized, all else maximized.")

    def resolved_goal(self) -> Goal:
        if self.goal != "auto":
            return self.goal
        return "minimize" if self.metric.endswith("_loss") else "maximize"


class SweepRequest(JobRequest):
    """The body of POST /v1/sweeps: a job's fields, which all trials share, and what varies."""

    parameters: Annotated[dict[str, Parameter], Field(max_length=MAX_PARAMETERS)] = Field(
        default={},
        description="By the dotted path of a job's field, such as lora.rank.",
        json_schema_extra={"propertyNames": {"enum": [*VARIABLE]}},
    )
    search: Search
    objective: Objective = Objective()
    keep_adapters: Literal["all", "best"] = Field(
        default="all", description="best: when all trials have ended, the others' adapters are deleted."
    )
    max_concurrent: Annotated[int, Field(ge=1, le=MAX_TRIALS)] | None = Field(
        default=None, description="Trials that are unfinished at one time, at most. null: any number."
    )
    priority: Priority = "batch"

    @model_validator(mode="after")
    def _parameters_of_its_search(self) -> SweepRequest:
        if self.search.type == "ask_tell" and self.parameters:
            raise ValueError("an ask_tell sweep has no parameters: each of its trials is given its own")
        if self.search.type == "ask_tell" and self.max_concurrent is not None:
            raise ValueError("an ask_tell sweep has no max_concurrent: its client decides how many it asks for")
        if self.search.type != "ask_tell" and not self.parameters:
            raise ValueError("a sweep needs parameters: say what varies")
        return self

    def template(self) -> dict[str, Any]:
        """What all trials share, as the body of a job."""
        own = SweepRequest.model_fields.keys() - JobRequest.model_fields.keys()
        return {"priority": self.priority, **self.model_dump(mode="json", exclude_unset=True, exclude=own)}
