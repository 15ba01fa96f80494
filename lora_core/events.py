# pyright: strict
"""Events that `Engine.tick` returns. Does not import torch.

Steps count from 1. Losses are in nats per trained (loss-bearing) token. For preference objectives they are means
over pairs or single answers, `rewards` is set, and token accuracy is that of the chosen answers of pairs.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Rewards:
    """Mean rewards that a preference loss compares.

    For pairs: the means over chosen and over rejected answers, their difference, and the fraction of pairs whose
    chosen answer has the higher reward. `kl` is None.
    For single answers (KTO): the means over desirable and over undesirable answers, None if there are none of a kind.
    `kl` is the reference point in nats. `accuracy` is the fraction of rewards on the correct side of β · `kl`.
    """

    chosen: float | None
    rejected: float | None
    margin: float | None
    accuracy: float
    kl: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class JobStepped:
    """One optimizer step is complete. `grad_norm` is the norm before clipping."""

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
    """The validation set was evaluated after `step` completed steps. Step 0 is the model before training."""

    job: str
    step: int
    loss: float
    token_accuracy: float
    num_supervised_tokens: int
    rewards: Rewards | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class JobFinished:
    """All steps and the final evaluation are complete. The job stays resident until it is evicted.

    `kept_step` is the step whose weights the adapter holds. `stopped_early` is a sentence with the reason if the job
    stopped before its last step, otherwise None.
    """

    job: str
    step: int
    kept_step: int
    stopped_early: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class JobDiverged:
    """A loss, gradient or update was not finite, or a gradient was exactly zero although its loss was not.

    See lora_core/engine/divergence.py. The adapter holds the weights of the last completed `step`. Evict the job.
    `good_step` is the newest step whose weights produced a finite loss and a finite, nonzero gradient. It is `step`
    if only the update was not finite, otherwise the step before it, or None if there is no earlier step.
    """

    job: str
    step: int
    good_step: int | None
    message: str


Event = JobStepped | JobEvaluated | JobFinished | JobDiverged
