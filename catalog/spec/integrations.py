"""Experiment trackers that a job's curves can be written to, and the options of each tracker.

The address and the account of a tracker are set by the operator, never by a job.
"""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import Field, StringConstraints, model_validator

from catalog.spec.model_fields import Label, Strict

IntegrationType = Literal["wandb", "mlflow", "tensorboard"]
INTEGRATION_TYPES: tuple[IntegrationType, ...] = get_args(IntegrationType)
NAME_PATTERN = r"^[^\x00-\x1f\x7f/\\#?%:]+$"
"""Pattern of project names that Weights & Biases accepts."""
Name = Annotated[str, StringConstraints(min_length=1, max_length=128, pattern=NAME_PATTERN)]
Tags = Annotated[dict[Name, Name], Field(max_length=16, json_schema_extra={"additionalProperties": False})]
"""Values by name. `additionalProperties` is false because a JSON schema otherwise allows names that do not match."""


def install_hint(tracker: IntegrationType) -> str:
    """Return what an operator must do so that a worker can write to the tracker."""
    account = ", set WANDB_API_KEY or WANDB_MODE=offline," if tracker == "wandb" else ""
    return (
        f"On a worker, run `pip install 'lorry-server[integrations]'`{account} and include {tracker} in "
        "LORRY_INTEGRATIONS if that is set. Then restart the worker."
    )


class Wandb(Strict):
    """Weights & Biases, in OpenAI's format."""

    project: Name = Field(description="W&B project. The name of the Lorry project and ' - ' are added in front.")
    name: Name | None = Field(default=None, description="Name of the run. Default: the job ID.")
    entity: Name | None = Field(
        default=None,
        description="Rejected: the operator sets the team or user (`WANDB_ENTITY` on the workers). null: that of "
        "the operator.",
    )
    tags: Annotated[list[Name], Field(max_length=16)] | None = Field(
        default=None, description="Tags of the run. null: none."
    )


class Mlflow(Strict):
    """An MLflow tracking server."""

    experiment: Name = Field(
        default="lorry", description="Experiment. The name of the Lorry project and '/' are added in front."
    )
    run_name: Name | None = Field(default=None, description="Name of the run. Default: the job ID.")
    tags: Tags | None = Field(default=None, description="Tags of the run. null: none.")


class TensorBoard(Strict):
    """A directory of TensorBoard event files."""

    name: Label | None = Field(
        default=None, description="Prefix of the run's directory, before the job ID. null: none."
    )


class Integration(Strict):
    """A tracker type, and its options under the name of the type."""

    type: IntegrationType = Field(description="Tracker to write to.")
    wandb: Wandb | None = Field(default=None, description="Options of Weights & Biases. null: another type.")
    mlflow: Mlflow | None = Field(default=None, description="Options of MLflow. null: the defaults.")
    tensorboard: TensorBoard | None = Field(default=None, description="Options of TensorBoard. null: the defaults.")

    @model_validator(mode="after")
    def _check_fields_of_type(self) -> Integration:
        others = [name for name in INTEGRATION_TYPES if name != self.type and getattr(self, name) is not None]
        if others:
            raise ValueError(f"its type is '{self.type}': set the type to '{others[0]}', or remove '{others[0]}'")
        if self.type == "wandb" and self.wandb is None:
            raise ValueError("the type 'wandb' requires 'wandb' with its 'project'")
        return self

    def options(self) -> Strict:
        """Return the options of its type, with all defaults."""
        given: Strict | None = getattr(self, self.type)
        return given if given is not None else DEFAULTS[self.type]()


DEFAULTS: dict[IntegrationType, type[Mlflow | TensorBoard]] = {
    "mlflow": Mlflow,
    "tensorboard": TensorBoard,
}


def checked(integrations: list[Integration] | None) -> list[Integration] | None:
    """Check that each type occurs at most once. Raises ValueError."""
    types = [one.type for one in integrations or ()]
    if len(types) != len(set(types)):
        raise ValueError("must contain each type at most once")
    return integrations
