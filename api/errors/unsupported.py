"""What OpenAI's API has and Lorry has not, of what its client asks for: told as such, with what to do instead."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class NotOffered:
    """Routes that are not there, by their paths."""

    paths: re.Pattern[str]
    message: str
    remedy: str


INSTEAD_OF_REINFORCEMENT = "Learn from preferences (dpo, orpo, simpo, kto); evaluation.samples shows a job's answers."
ALL = (
    NotOffered(
        paths=re.compile(r"/v1/fine_tuning/alpha/graders/[^/]*"),
        message="Graders are of reinforcement fine-tuning, which isn't offered.",
        remedy=INSTEAD_OF_REINFORCEMENT,
    ),
    NotOffered(
        paths=re.compile(r"/v1/(chat/completions|completions|responses|embeddings)(/.*)?"),
        message="Models are trained here and don't answer.",
        remedy="Download the adapter with `lorry adapters pull NAME`, and have PEFT or a server such as vLLM load it.",
    ),
    NotOffered(
        paths=re.compile(r"/v1/organization(/.*)?"),
        message="OpenAI's administration API isn't offered: Lorry has its own.",
        remedy="Ask for /v1/projects, /v1/api_keys, /v1/organizations, /v1/usage or /v1/audit_events.",
    ),
)


def find(path: str) -> NotOffered | None:
    return next((one for one in ALL if one.paths.fullmatch(path)), None)
