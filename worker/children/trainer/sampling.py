"""What a job is asked at its evaluations, as tokens, and its answers as text. Runs in the trainer; knows no torch."""

from __future__ import annotations

from dataclasses import dataclass

from catalog.spec.sample_spec import Samples
from worker.children.tokenizer.text_encoder import BaseText
from worker.protocol.mailbox import Json


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """One job's prompts, with what ends an answer."""

    texts: tuple[str, ...]
    ids: tuple[tuple[int, ...], ...]
    max_tokens: int
    end_ids: frozenset[int]


def ask(base: BaseText, samples: Samples, *, as_chat: bool) -> Asked:
    """as_chat: each prompt is a user's turn in the base's template. Raises Refused where that takes none."""
    return Asked(
        texts=tuple(samples.prompts),
        ids=tuple(base.prompt_ids(prompt, as_chat=as_chat) for prompt in samples.prompts),
        max_tokens=samples.max_tokens,
        end_ids=base.end_ids(as_chat=as_chat),
    )


def told(base: BaseText, asked: Asked, answers: list[tuple[int, ...]]) -> list[Json]:
    """Prompts with answers, for people. `is_complete`: the answer has come to its end within max_tokens."""
    return [
        {
            "prompt": prompt,
            "answer": base.text_of(ids),
            "num_tokens": len(ids),
            "is_complete": bool(ids) and ids[-1] in asked.end_ids,
        }
        for prompt, ids in zip(asked.texts, answers, strict=True)
    ]
