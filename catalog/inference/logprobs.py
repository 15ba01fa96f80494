"""The log-probabilities of /v1/completions. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Json = dict[str, Any]


def text_logprobs(tokens: Sequence[Json], *, start: int) -> Json:
    """Return OpenAI's older format. tokens: in the format of chats. start: characters of the answer before them, which
    `text_offset` counts.

    Of tokens with the same text, the sampled one counts, or else the most likely one.
    """
    offsets: list[int] = []
    for token in tokens:
        offsets.append(start)
        start += len(token["token"])
    return {
        "tokens": [token["token"] for token in tokens],
        "token_logprobs": [token["logprob"] for token in tokens],
        "top_logprobs": [
            {top["token"]: top["logprob"] for top in reversed(token["top_logprobs"])}
            | {token["token"]: token["logprob"]}
            for token in tokens
        ],
        "text_offset": offsets,
    }
