"""The next token follows the distribution that the parameters describe, and depends on its own request alone."""

from collections import Counter
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import TemperatureLogitsWarper, TopPLogitsWarper

from lora_core.errors import ConfigError
from lora_core.forward import sampling as sampling_module
from lora_core.forward.sampling import ChosenToken, Sampling, choose_tokens


def logits(seed: int, size: int = 50, *, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * scale


def choose(logits_V: torch.Tensor, sampling: Sampling, answer: tuple[int, ...] = ()) -> ChosenToken:
    (chosen,) = choose_tokens(logits_V[None], [sampling], [answer])
    assert chosen is not None
    return chosen


def frequencies(logits_V: torch.Tensor, answer: tuple[int, ...] = (), **fields: Any) -> torch.Tensor:
    """Return how often each token is chosen in 4,000 draws."""
    draws = Counter(choose(logits_V, Sampling(seed=seed, **fields), answer).token for seed in range(4000))
    return torch.tensor([draws[token] / 4000 for token in range(len(logits_V))])


def expected(logits_V: torch.Tensor, temperature: float, top_p: float) -> torch.Tensor:
    """Return the probabilities of transformers' generate for these parameters."""
    ids: Any = torch.zeros(1, 1)  # neither reads them
    scores_1V = TemperatureLogitsWarper(temperature)(ids, cast(Any, logits_V[None]))
    return torch.softmax(TopPLogitsWarper(top_p)(ids, scores_1V)[0], dim=-1)


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (2.0, 1.0), (1.0, 0.9), (1.5, 0.6)])
def test_frequencies_of_tokens_are_the_probabilities_of_transformers(temperature, top_p):
    logits_V = logits(1, size=12, scale=1.5)

    found = frequencies(logits_V, temperature=temperature, top_p=top_p)

    probabilities = expected(logits_V, temperature, top_p)
    torch.testing.assert_close(found, probabilities, atol=0.03, rtol=0)
    assert not found[probabilities == 0].any(), "a token outside the nucleus is never chosen"


@given(seed=st.integers(0, 10_000), top_p=st.floats(0.01, 0.999), candidates=st.sampled_from([4, 512]))
def test_nucleus_is_that_of_transformers(seed, top_p, candidates):
    logits_V = logits(seed)
    kept = set(torch.nonzero(expected(logits_V, 1.0, top_p)).flatten().tolist())
    probabilities_V = torch.softmax(logits_V.double(), dim=-1)
    cumulative = probabilities_V.sort(descending=True).values.cumsum(0)
    if (cumulative - top_p).abs().min() < 1e-6:
        return  # transformers adds float32 numbers and may round to the other side

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling_module, "NUM_CANDIDATES", candidates)
        ids_N, kept_N = sampling_module._nucleus(probabilities_V, top_p)

    assert set(ids_N.tolist()) == kept
    assert kept_N.tolist() == sorted(kept_N.tolist(), reverse=True)


def test_temperature_zero_and_a_tiny_temperature_select_the_most_likely_token():
    logits_V = logits(2)
    likeliest = int(logits_V.argmax())

    assert choose(logits_V, Sampling()).token == likeliest
    assert {choose(logits_V * 1e30, Sampling(temperature=1e-6, seed=seed)).token for seed in range(20)} == {likeliest}
    assert {choose(logits_V, Sampling(temperature=2.0, top_p=1e-9, seed=seed)).token for seed in range(20)} == {
        likeliest
    }


def test_penalties_lower_the_logits_of_tokens_in_the_answer():
    logits_V = torch.tensor([2.0, 1.9, 0.0, -9.0])

    assert choose(logits_V, Sampling(presence_penalty=0.2), (3,)).token == 0
    assert choose(logits_V, Sampling(presence_penalty=0.2), (0,)).token == 1
    assert choose(logits_V, Sampling(frequency_penalty=0.06), (0,)).token == 0
    assert choose(logits_V, Sampling(frequency_penalty=0.06), (0, 0)).token == 1
    assert choose(logits_V, Sampling(frequency_penalty=-2.0), (2, 2)).token == 2


def test_penalized_frequencies_are_those_of_the_lowered_logits():
    logits_V = logits(3, size=8, scale=1.0)
    lowered = logits_V - torch.tensor([0.5 + 2 * 0.25, 0, 0.5 + 0.25, 0, 0, 0, 0, 0])

    found = frequencies(logits_V, (0, 2, 0), temperature=1.0, presence_penalty=0.5, frequency_penalty=0.25)

    torch.testing.assert_close(found, torch.softmax(lowered, dim=-1), atol=0.03, rtol=0)


def test_log_probabilities_are_those_of_the_plain_softmax():
    logits_V = logits(4)
    logprobs_V = torch.log_softmax(logits_V, dim=-1)

    chosen = choose(logits_V, Sampling(temperature=1.7, presence_penalty=1.0, num_alternatives=3), (1, 2))

    assert chosen.logprob == pytest.approx(float(logprobs_V[chosen.token]))
    top = logprobs_V.sort(descending=True)
    assert [token for token, _ in chosen.alternatives] == top.indices[:3].tolist()
    assert [logprob for _, logprob in chosen.alternatives] == pytest.approx(top.values[:3].tolist())
    assert choose(logits_V, Sampling(num_alternatives=0)).alternatives == ()
    assert choose(logits_V, Sampling()) == ChosenToken(token=int(logits_V.argmax()))


def test_choice_depends_on_the_seed_and_the_index_alone():
    logits_V = logits(5, scale=0.5)
    others = torch.stack([logits(seed) for seed in range(4)])
    sampling = Sampling(temperature=1.0, top_p=0.95, seed=7, num_alternatives=2)

    alone = [choose(logits_V, sampling, tuple(range(index))) for index in range(30)]
    rows = torch.cat([others, logits_V[None]])
    samplings = [Sampling(), Sampling(temperature=1.0), sampling, Sampling(num_alternatives=5), sampling]
    together = [choose_tokens(rows, samplings, [(1,), (), (2, 3), (), tuple(range(index))])[-1] for index in range(30)]

    assert together == alone
    assert len({chosen.token for chosen in alone}) > 5, "another index gives another number"
    assert alone != [choose(logits_V, Sampling(temperature=1.0, seed=8), tuple(range(index))) for index in range(30)]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_without_a_finite_maximum_choose_no_token_and_leave_the_other_rows(bad):
    rows = torch.stack([logits(1), logits(2)])
    rows[0, 17] = bad

    chosen = choose_tokens(rows, [Sampling(temperature=1.0), Sampling()], [(), ()])

    assert chosen == [None, choose(rows[1], Sampling())]


def test_tokens_with_a_logit_of_minus_infinity_are_never_chosen():
    logits_V = torch.full((6,), -float("inf"))
    logits_V[4] = 0.0

    assert {choose(logits_V, Sampling(temperature=2.0, seed=seed)).token for seed in range(50)} == {4}


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": -0.1},
        {"temperature": 2.1},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_p": float("nan")},
        {"presence_penalty": -2.1},
        {"frequency_penalty": 2.1},
        {"frequency_penalty": float("nan")},
        {"num_alternatives": -1},
        {"num_alternatives": 21},
    ],
)
def test_values_out_of_range_are_rejected_by_name(fields):
    (name,) = fields

    with pytest.raises(ConfigError, match=name):
        Sampling(**fields)
