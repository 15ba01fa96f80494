# pyright: strict
"""What Engine.tick() reports. No torch here.

Steps count from 1. Losses are nats per supervised token; where the objective is one of preference they are means
over pairs, or over single answers, `rewards` is there, and token accuracy is that of the chosen answers of pairs.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Rewards:
    """Means over pairs: what the loss compares, the difference, and how often the chosen answer has the greater.

    Of single answers: means over the desirable ones, and over the others; None where there are none of them. Accuracy
    is how often a reward lies on its side of β · `kl`, the reference point in nats, which pairs don't have.
    """

    chosen: float | None
    rejected: float | None
    margin: float | None
    accuracy: float
    kl: float | None = None


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
    rewards: Rewards | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class JobEvaluated:
    """The held-out set was scored at `step` completed steps (0: the base model itself)."""

    job: str
    step: int
    loss: float
    token_accuracy: float
    num_supervised_tokens: int
    rewards: Rewards | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class JobFinished:
    """All steps and the last evaluation are done; the job stays resident until it is evicted.

    `kept_step`: the step whose weights the adapter holds now. `stopped_early`: the sentence why the job ended before
    its last step; None where it didn't.
    """

    job: str
    step: int
    kept_step: int
    stopped_early: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class JobDiverged:
    """A loss, a gradient or an update was not finite, or a gradient was exactly zero and its loss was not
    (lora_core/engine/early_stopping.py); the adapter holds the last completed `step`. Evict the job.

    `good_step`: the newest whose weights are known to be good, for losses and gradient computed with them were finite,
    and the gradient was alive. It is `step` where the update alone was not finite; else the one before, and None where
    nothing was completed before.
    """

    job: str
    step: int
    good_step: int | None
    message: str


Event = JobStepped | JobEvaluated | JobFinished | JobDiverged
