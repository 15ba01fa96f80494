"""Compares a server's answer to the probe prompt with the built-in engine's. Pure.

Both engines answer the same prompt greedily. Their log-probabilities are compared token by token, up to the first
different token. An inference server computes in another order and often in another dtype, so the numbers differ a
little; how much is measured with the base model.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

Json = dict[str, Any]
ProbeKind = Literal["chat", "text"]
MESSAGES: list[Json] = [{"role": "user", "content": "Describe a harbor at night in one sentence."}]
TEXT = "The harbor at night"
"""The prompt for a base model without a chat template."""
MAX_TOKENS = 16
NUM_ALTERNATIVES = 5
LIMIT = 0.5
"""Highest tolerance, as a difference of natural log-probabilities. Rounding in bfloat16 stays below it, and an answer
of another model does not."""
FLOOR = 0.02
"""Lowest tolerance. Two float32 engines agree much better."""
MAX_END_IDS = 64
DATE = re.compile(r"[0-9]{2} [A-Z][a-z]{2} [0-9]{4}")
"""The only variable of a template that a trainer reports: see `date_arguments` in worker/children/tokenizer."""
FAR = 1e6
"""The difference if a log-probability is not a number, or if equal answers end at different places."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbeToken:
    """A token of an answer. alternatives: log-probabilities of the most likely tokens at its place, by text."""

    text: str
    logprob: float
    alternatives: dict[str, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbeAnswer:
    prompt_tokens: int
    tokens: tuple[ProbeToken, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationSettings:
    """The settings with which a server renders prompts and ends answers as the built-in engine does.

    end_ids: tokens that end an answer. template_kwargs: variables for the chat template.
    """

    end_ids: tuple[int, ...]
    template_kwargs: dict[str, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """max_diff: largest difference of log-probabilities. num_compared: tokens until the answers differ or end."""

    max_diff: float
    num_compared: int


def probe_body(kind: ProbeKind) -> Json:
    """Return the parameters of the probe, in the form of a worker's inference request."""
    prompt: Json = {"messages": MESSAGES} if kind == "chat" else {"prompts": [TEXT]}
    return {
        **prompt,
        "max_tokens": MAX_TOKENS,
        "n": 1,
        "stop": [],
        "seed": 0,
        "temperature": 0.0,
        "top_p": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "num_logprobs": NUM_ALTERNATIVES,
    }


def compare(expected: ProbeAnswer, found: ProbeAnswer) -> Comparison:
    """Compare two greedy answers to the same prompt.

    At the first place where they chose different tokens, the log-probability of the expected token is compared, which
    is small if both were about equally likely. If it is not among the alternatives, the lowest of them is a bound.
    """
    worst, number = 0.0, 0
    for wanted, other in zip(expected.tokens, found.tokens, strict=False):
        number += 1
        if wanted.text == other.text:
            difference = abs(wanted.logprob - other.logprob)
            worst = max(worst, difference if math.isfinite(difference) else FAR)
            continue
        lowest = min(other.alternatives.values(), default=other.logprob)
        return Comparison(
            max_diff=max(worst, abs(wanted.logprob - other.alternatives.get(wanted.text, lowest))), num_compared=number
        )
    if abs(len(expected.tokens) - len(found.tokens)) > 1:  # one of them may have a token for the end of the answer
        worst = FAR
    return Comparison(max_diff=worst, num_compared=number)


def judge_base(expected: ProbeAnswer, found: ProbeAnswer) -> Json:
    """Return the verification of a server's base model."""
    return _verdict(expected, found, compare(expected, found), tolerance=LIMIT)


def judge_adapter(expected: ProbeAnswer, found: ProbeAnswer, *, of_base: ProbeAnswer, base_diff: float) -> Json:
    """Return the verification of an adapter on a server.

    of_base: the built-in engine's answer of the base model. base_diff: how far the server's own differs from it. The
    tolerance is half the distance between adapter and base model, so that a server that ignores the adapter fails, but
    at least twice what the engines differ anyway.
    """
    distance = compare(expected, of_base).max_diff
    tolerance = min(LIMIT, max(FLOOR, 2 * base_diff, distance / 2))
    verdict = _verdict(expected, found, compare(expected, found), tolerance=tolerance)
    return {**verdict, "distance_to_base": distance, "distinguishes": tolerance < distance}


def _verdict(expected: ProbeAnswer, found: ProbeAnswer, comparison: Comparison, *, tolerance: float) -> Json:
    same_prompt = expected.prompt_tokens == found.prompt_tokens
    is_compared = comparison.num_compared > 0 or not (expected.tokens or found.tokens)
    return {
        "passed": same_prompt and is_compared and comparison.max_diff <= tolerance,
        "max_diff": comparison.max_diff,
        "tolerance": tolerance,
        "num_compared": comparison.num_compared,
        "prompt_tokens": found.prompt_tokens,
        "expected_prompt_tokens": expected.prompt_tokens,
    }


def why_failed(verdict: Json, *, subject: str) -> str:
    """Return the reason of a failed verification as sentences with a remedy. subject: the model, for a sentence."""
    found, wanted = verdict["prompt_tokens"], verdict["expected_prompt_tokens"]
    if found != wanted:
        return (
            f"The server reads the probe prompt of {subject} as {found} tokens, but Lorry as {wanted}: tokenizers or "
            "chat templates differ. Start the server with the files of the base model that `lorry models show` prints."
        )
    return (
        f"The server's answer of {subject} differs from the record: log-probabilities of {verdict['num_compared']} "
        f"tokens by up to {verdict['max_diff']:.3g}, but at most {verdict['tolerance']:.3g} is allowed. Check that the "
        "server has loaded the same base model, in the dtype of training and without another quantization."
    )


def answer_of(row: Json) -> ProbeAnswer:
    """Return the answer that `as_row` stored."""
    return ProbeAnswer(
        prompt_tokens=row["prompt_tokens"],
        tokens=tuple(
            ProbeToken(text=token["text"], logprob=token["logprob"], alternatives=token["alternatives"])
            for token in row["tokens"]
        ),
    )


def as_row(kind: ProbeKind, answer: ProbeAnswer, *, generation: Json | None) -> Json:
    """Return an answer of the built-in engine in the form of a stored reference.

    generation: as the trainer reported it (worker/children/trainer/inference.py). Servers get it with the requests of
    all projects, and a trainer is not trusted. Raises ValueError if it is not such a report.
    """
    if not _is_generation(generation, kind):
        raise ValueError("These are no settings for rendering prompts and ending answers.")
    tokens = [{"text": one.text, "logprob": one.logprob, "alternatives": one.alternatives} for one in answer.tokens]
    found: Json = {"kind": kind, "prompt_tokens": answer.prompt_tokens, "tokens": tokens}
    return {**found, "generation": generation}


def _is_generation(given: Any, kind: ProbeKind) -> bool:
    if not isinstance(given, dict):
        return False
    by_kind = cast(dict[Any, Any], given)
    return {"text", kind} <= by_kind.keys() <= {"text", "chat"} and all(map(_is_settings, by_kind.values()))


def _is_settings(given: Any) -> bool:
    if not isinstance(given, dict):
        return False
    found = cast(dict[Any, Any], given)
    end_ids, variables = found.get("end_ids"), found.get("template_kwargs", {})
    if not isinstance(end_ids, list) or not isinstance(variables, dict):
        return False
    ids, named = cast(list[Any], end_ids), cast(dict[Any, Any], variables)
    are_ids = len(ids) <= MAX_END_IDS and all(type(each) is int and 0 <= each < 2**31 for each in ids)
    date = named.get("date_string", "01 Jan 2000")
    return are_ids and named.keys() <= {"date_string"} and isinstance(date, str) and DATE.fullmatch(date) is not None


def settings_of(reference: Json | None, kind: ProbeKind) -> GenerationSettings | None:
    """Return the settings for a kind of request from a stored reference of the base model.

    None: the reference is not computed yet, or the base model has no chat template.
    """
    by_kind: dict[str, Json] = (reference or {}).get("generation", {})
    found = by_kind.get(kind)
    if found is None:
        return None
    return GenerationSettings(end_ids=tuple(found["end_ids"]), template_kwargs=found.get("template_kwargs", {}))


def tokens_of(events: Sequence[Json]) -> tuple[ProbeToken, ...]:
    """Return the tokens of a chat completion's `logprobs.content`, or of a worker's deltas, which are the same."""

    def alternatives(event: Json) -> dict[str, float]:
        tops: list[dict[str, Any]] = event.get("top_logprobs") or []
        return {str(top["token"]): float(top["logprob"]) for top in tops}

    return tuple(
        ProbeToken(text=str(event["token"]), logprob=float(event["logprob"]), alternatives=alternatives(event))
        for event in events
    )
