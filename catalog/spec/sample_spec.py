"""Prompts that a job answers at each evaluation, for people to read. Their cost is bounded by the limits here."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, StringConstraints

from catalog.spec.strict import Strict

MAX_PROMPTS = 8
MAX_PROMPT_CHARS = 2000
MAX_ANSWER_TOKENS = 128

Prompt = Annotated[str, StringConstraints(min_length=1, max_length=MAX_PROMPT_CHARS, pattern=r"\S")]


class Samples(Strict):
    """Greedy answers: the likeliest token, time and again. Training is not changed by them."""

    prompts: Annotated[list[Prompt], Field(min_length=1, max_length=MAX_PROMPTS)] = Field(
        description="As a user's turn where the training rows are chats, else as text that goes on."
    )
    max_tokens: Annotated[int, Field(ge=1, le=MAX_ANSWER_TOKENS)] = Field(default=64, description="Of one answer.")
