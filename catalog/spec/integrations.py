"""Where a job's curves may go beside the record: which trackers there are, and what a job may say to each.

Where a tracker lives, and by which account it is written, is the operator's to say and never a job's.
"""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import Field, StringConstraints, model_validator

from catalog.spec.strict import Label, Strict

IntegrationType = Literal["wandb", "mlflow", "tensorboard", "trackio"]
INTEGRATION_TYPES: tuple[IntegrationType, ...] = get_args(IntegrationType)
INSTALL = "On a worker: pip install 'lorry-server[integrations]'; docs/INTEGRATIONS.md tells what else each one needs."
NAME_PATTERN = r"^[^\x00-\x1f\x7f/\\#?%:]+$"
"""What Weights & Biases takes for the name of a project."""
Name = Annotated[str, StringConstraints(min_length=1, max_length=128, pattern=NAME_PATTERN)]
Tags = Annotated[dict[Name, Name], Field(max_length=16, json_schema_extra={"additionalProperties": False})]
"""By name. Of names that the pattern doesn't fit a schema says nothing by itself."""


class Wandb(Strict):
    """Weights & Biases, in OpenAI's form."""

    project: Name = Field(description="The W&B project, after the name of Lorry's project and ' - '.")
    name: Name | None = Field(default=None, description="Of the run; by itself the job's id.")
    entity: Name | None = Field(
        default=None, description="Rejected: the operator sets the team or user (`WANDB_ENTITY` on the workers)."
    )
    tags: Annotated[list[Name], Field(max_length=16)] | None = Field(default=None, description="Of the run.")


class Mlflow(Strict):
    """MLflow."""

    experiment: Name = Field(default="lorry", description="Behind the project's name and a slash.")
    run_name: Name | None = Field(default=None, description="By itself the job's id.")
    tags: Tags | None = Field(default=None, description="Of the run.")


class TensorBoard(Strict):
    """A folder of TensorBoard's event files."""

    name: Label | None = Field(default=None, description="Beginning of the run's folder, before the job's id.")


class Trackio(Strict):
    """Trackio, on this service's own machines."""

    project: Name = Field(default="lorry", description="Behind the project's name and a hyphen.")
    name: Name | None = Field(default=None, description="Of the run, before the job's id.")


class Integration(Strict):
    """A tracker, and what is said to it under its own name."""

    type: IntegrationType = Field(description="Tracker.")
    wandb: Wandb | None = None
    mlflow: Mlflow | None = None
    tensorboard: TensorBoard | None = None
    trackio: Trackio | None = None

    @model_validator(mode="after")
    def _says_what_is_of_its_type(self) -> Integration:
        others = [name for name in INTEGRATION_TYPES if name != self.type and getattr(self, name) is not None]
        if others:
            raise ValueError(f"its type is '{self.type}': say so with '{others[0]}', or leave '{others[0]}' out")
        if self.type == "wandb" and self.wandb is None:
            raise ValueError("the type 'wandb' needs 'wandb' with its 'project'")
        return self

    def options(self) -> Strict:
        """Of its type, with every default."""
        given: Strict | None = getattr(self, self.type)
        return given if given is not None else DEFAULTS[self.type]()


DEFAULTS: dict[IntegrationType, type[Mlflow | TensorBoard | Trackio]] = {
    "mlflow": Mlflow,
    "tensorboard": TensorBoard,
    "trackio": Trackio,
}


def checked(integrations: list[Integration] | None) -> list[Integration] | None:
    """Of each type one at most. Raises ValueError."""
    types = [one.type for one in integrations or ()]
    if len(types) != len(set(types)):
        raise ValueError("has a type twice: name each once")
    return integrations
