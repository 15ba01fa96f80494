# pyright: basic
"""Chooses the next token from its logits: greedy, or sampled with temperature, top-p and penalties.

A choice depends on the row of logits, the request's own tokens, its seed and the index of the token, and on nothing
else. Random numbers are functions of (seed, index), so a repeated request gives the same answer.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_core.config import require
from lora_core.runtime.counter_rng import uniform

NUM_CANDIDATES = 512
"""Most likely tokens among which top-p sampling looks first. A full sort of the vocabulary takes ten times as long."""
MAX_ALTERNATIVES = 20
MAX_TEMPERATURE = 2.0
MAX_PENALTY = 2.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How the tokens of one answer are chosen. The fields have the meaning of OpenAI's parameters.

    Attributes:
        temperature: Divisor of the logits, from 0 to 2. 0 selects the most likely token.
        top_p: Sample from the smallest set of most likely tokens with at least this probability, in (0, 1].
        seed: Seed of the random numbers.
        presence_penalty: Subtracted from the logit of each token that the answer contains, from -2 to 2.
        frequency_penalty: Subtracted as often as the answer contains the token, from -2 to 2.
        num_alternatives: Number of most likely tokens whose log-probabilities are reported with each token. None: no
            log-probability is reported.

    Raises:
        ConfigError: A value is out of range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    num_alternatives: int | None = None

    def __post_init__(self) -> None:
        in_range = 0 <= self.temperature <= MAX_TEMPERATURE
        require(in_range, "temperature", self.temperature, f"between 0 and {MAX_TEMPERATURE:g}")
        require(0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1")
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            require(-MAX_PENALTY <= value <= MAX_PENALTY, name, value, f"between -{MAX_PENALTY:g} and {MAX_PENALTY:g}")
        count = self.num_alternatives
        fits = count is None or 0 <= count <= MAX_ALTERNATIVES
        require(fits, "num_alternatives", count, f"between 0 and {MAX_ALTERNATIVES}, or None")

    @property
    def has_penalty(self) -> bool:
        return self.presence_penalty != 0 or self.frequency_penalty != 0


@dataclass(frozen=True, kw_only=True, slots=True)
class ChosenToken:
    """One token of an answer.

    `logprob` is its log-probability in nats at temperature 1 and without penalties, and `alternatives` are the most
    likely tokens with theirs, most likely first. Without `Sampling.num_alternatives` they are None and empty.
    """

    token: int
    logprob: float | None = None
    alternatives: tuple[tuple[int, float], ...] = ()


def choose_tokens(
    logits_RV: Tensor, samplings: Sequence[Sampling], answers: Sequence[Sequence[int]]
) -> list[ChosenToken | None]:
    """Choose the next token of each answer from its row of logits [R, V].

    `answers` are the tokens chosen so far. The result is None for a row that has no finite maximum, because then no
    token can be chosen.
    """
    greedy_R = logits_RV.argmax(dim=-1).tolist()
    is_usable_R = torch.isfinite(logits_RV.amax(dim=-1)).tolist()  # NaN propagates to the maximum
    rows = zip(logits_RV, greedy_R, is_usable_R, samplings, answers, strict=True)
    return [
        _choose(logits_V, greedy, sampling, answer) if is_usable else None
        for logits_V, greedy, is_usable, sampling, answer in rows
    ]


def _choose(logits_V: Tensor, greedy: int, sampling: Sampling, answer: Sequence[int]) -> ChosenToken:
    token = greedy
    if sampling.has_penalty or sampling.temperature > 0:
        token = _sampled(_penalized(logits_V.float(), sampling, answer), sampling, index=len(answer))
    if sampling.num_alternatives is None:
        return ChosenToken(token=token)
    logprobs_V = torch.log_softmax(logits_V.float(), dim=-1)
    top = logprobs_V.topk(min(sampling.num_alternatives, len(logprobs_V)))
    return ChosenToken(
        token=token,
        logprob=float(logprobs_V[token]),
        alternatives=tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True)),
    )


def _penalized(logits_V: Tensor, sampling: Sampling, answer: Sequence[int]) -> Tensor:
    if not sampling.has_penalty or not answer:
        return logits_V
    counts = Counter(answer)
    ids_U = torch.tensor(list(counts), device=logits_V.device)
    counts_U = torch.tensor(list(counts.values()), device=logits_V.device, dtype=logits_V.dtype)
    penalties_U = sampling.presence_penalty + sampling.frequency_penalty * counts_U
    return logits_V.index_add(0, ids_U, -penalties_U)


def _sampled(logits_V: Tensor, sampling: Sampling, *, index: int) -> int:
    """Sample by inversion of the cumulative distribution function, at a number that depends on seed and index alone."""
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    # The maximum is subtracted first: at a small temperature the quotients would be infinite.
    probabilities_V = torch.softmax((logits_V - logits_V.max()).double() / sampling.temperature, dim=-1)
    if sampling.top_p == 1:
        return _inverted(probabilities_V, sampling.seed, index)
    ids_N, kept_N = _nucleus(probabilities_V, sampling.top_p)
    return int(ids_N[_inverted(kept_N, sampling.seed, index)])


def _nucleus(probabilities_V: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """Return the smallest set of most likely tokens with a probability of at least `top_p` (arXiv 1904.09751)."""
    for count in (min(NUM_CANDIDATES, len(probabilities_V)), len(probabilities_V)):
        top = probabilities_V.topk(count)
        sums_N = top.values.cumsum(0)
        if float(sums_N[-1]) >= top_p:
            break
    num_kept = min(int((sums_N < top_p).sum()) + 1, len(sums_N))
    return top.indices[:num_kept], top.values[:num_kept]


def _inverted(probabilities_N: Tensor, seed: int, index: int) -> int:
    sums_N = probabilities_N.cumsum(0)
    (number,) = uniform("answer", seed, index, count=1)
    found = torch.searchsorted(sums_N, torch.tensor(number * float(sums_N[-1]), device=sums_N.device), right=True)
    return min(int(found), len(sums_N) - 1)
