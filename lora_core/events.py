# pyright: strict
"""What Engine.tick() reports. Steps count from 1; losses are nats per supervised token. No torch here."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class JobStepped:
    """One optimizer step is done. `grad_norm` is the norm before clipping."""

    job: str
    step: int
    loss: float
    learning_rate: float
    grad_norm: float
    num_tokens: int
    num_supervised_tokens: int
    token_accuracy: float


@dataclass(frozen=True, kw_only=True, slots=True)
class JobEvaluated:
    """The held-out set was scored at `step` completed steps (0: the base model itself)."""

    job: str
    step: int
    loss: float
    token_accuracy: float
    num_supervised_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class JobFinished:
    """All steps and the last evaluation are done; the job stays resident until it is evicted."""

    job: str
    step: int


@dataclass(frozen=True, kw_only=True, slots=True)
class JobDiverged:
    """A loss or gradient was not finite; the row holds the last completed `step`. Evict the job."""

    job: str
    step: int
    message: str


Event = JobStepped | JobEvaluated | JobFinished | JobDiverged
