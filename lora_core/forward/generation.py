# pyright: basic
"""Greedy generation with adapters, for sample answers next to the loss. Uses the same pass as evaluation.

Keys and values are cached while an answer grows (lora_core/packing/packed_batch.py), so n tokens after a prompt of m
tokens take m + n tokens of forward passes. An answer depends on its job alone: its bits, and therefore its tokens,
don't depend on the other answers in the pass.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
import torch.nn.functional as F

from lora_core.adapter.flat_adapter import FlatAdapter
from lora_core.base_model.model import BaseModel
from lora_core.errors import ConfigError, OutOfMemory
from lora_core.forward.language_model import hidden_states
from lora_core.layers.lm_heads import head_of
from lora_core.layers.longrope import bounds_in
from lora_core.losses.chunked_cross_entropy import LABEL_MULTIPLE
from lora_core.packing.packed_batch import KeptKeys, PackedBatch, SliceInput, build_pack
from lora_core.runtime.device_errors import shortage_in_pass


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompts:
    """The prompts of one job as token ids, and the limits of its answers."""

    prompts: tuple[tuple[int, ...], ...]
    max_tokens: int
    """Maximum number of tokens of one answer."""
    end_ids: frozenset[int] = frozenset()
    """Token ids that end an answer. The end token is part of the answer."""


@dataclass(kw_only=True, slots=True)
class _Answer:
    prompt: tuple[int, ...]
    ids: list[int] = field(default_factory=list)
    is_complete: bool = False
    kept: KeptKeys | None = None
    """None before the first pass, and if the answer restarts from its prompt."""

    @property
    def num_tokens(self) -> int:
        return len(self.prompt) + len(self.ids)


class Generation:
    """Answers that grow by one token per `advance`. The adapters must not be trained meanwhile.

    Jobs are processed in groups, one after another. The final answers of a group have at most `token_budget` tokens
    including prompts, which bounds the memory of the key-value cache. A single larger job is a group of its own.
    """

    def __init__(
        self, base: BaseModel, requests: Mapping[str, tuple[FlatAdapter, Prompts]], *, token_budget: int
    ) -> None:
        """`requests` are the adapter and the prompts of each job. Raises ConfigError."""
        for _, prompts in requests.values():
            check_prompts(prompts, base)
        self._base = base
        self._requests = dict(requests)
        self._token_budget = token_budget
        self._group: list[str] = []
        self._bounds = bounds_in(base.model)
        self._answers = {
            job: [_Answer(prompt=prompt) for prompt in prompts.prompts] for job, (_, prompts) in requests.items()
        }

    @property
    def is_complete(self) -> bool:
        return not self._growing()

    def advance(self) -> None:
        """Generate one token for each incomplete answer of the group. Does nothing if all are complete.

        Raises OutOfMemory for one job: `drop` it or discard this object. Raises BrokenPass if the base model is
        sharded.
        """
        while not self.is_complete:
            jobs = [job for job in self._group if self._open(job)]
            if not jobs:
                self._group = jobs = self._next_group()
            try:
                with shortage_in_pass(is_sharded=self._base.is_sharded):
                    found = self._next_tokens(jobs)
            except torch.OutOfMemoryError as error:
                num_tokens = sum(self._most_tokens(job) for job in jobs)
                for job in jobs:
                    self._restart(job)
                if len(jobs) == 1:
                    raise OutOfMemory(jobs[0], num_tokens=num_tokens) from error
                self._token_budget, self._group = num_tokens // 2, []
                continue
            for job, tokens in zip(jobs, found, strict=True):
                self._book(job, tokens)
            return

    def drop(self, job: str) -> None:
        """Stop answering this job and discard its answers."""
        del self._requests[job], self._answers[job]
        self._group = [other for other in self._group if other != job]

    def answers(self) -> dict[str, list[tuple[int, ...]]]:
        """Return the token ids of each answer so far, in the order of the prompts, including end tokens."""
        return {job: [tuple(answer.ids) for answer in answers] for job, answers in self._answers.items()}

    def _growing(self) -> list[str]:
        return [job for job in self._requests if self._open(job)]

    def _open(self, job: str) -> list[_Answer]:
        return [answer for answer in self._answers[job] if not answer.is_complete]

    def _most_tokens(self, job: str) -> int:
        """Return the tokens that all incomplete answers of the job can reach, including prompts."""
        return sum(len(answer.prompt) + self._requests[job][1].max_tokens for answer in self._open(job))

    def _next_group(self) -> list[str]:
        """Return the first jobs that fit together. The answers of one job are never split."""
        taken: list[str] = []
        num_tokens = 0
        for job in self._growing():
            num_tokens += self._most_tokens(job)
            if taken and num_tokens > self._token_budget:
                break
            taken.append(job)
        return taken

    def _restart(self, job: str) -> None:
        """Discard the incomplete answers and their cache, so that they get the same bits as without interruption."""
        for answer in self._open(job):
            answer.ids.clear()
            answer.kept = None

    @torch.no_grad()
    def _next_tokens(self, jobs: Sequence[str]) -> list[list[int]]:
        """Return the most likely next token of each open answer, by job."""
        growing = [(job, answer) for job in jobs for answer in self._open(job)]
        for job, answer in growing:
            self._prepare_cache(answer, capacity=len(answer.prompt) + self._requests[job][1].max_tokens)
        pack = self._pack(jobs)
        h_SD = hidden_states(self._base, pack)[pack.sequence_bounds_S[1:] - 1]
        found: list[list[int]] = []
        for segment in pack.segments:
            h_lD = h_SD[segment.graded.first : segment.graded.last]
            num_padding = -len(h_lD) % LABEL_MULTIPLE
            logits_lV = head_of(self._base.head(), segment.adapter).logits(F.pad(h_lD, (0, 0, 0, num_padding)))
            found.append(logits_lV[: len(h_lD)].argmax(dim=-1).tolist())
        for kept, (_, answer) in zip(pack.kept, growing, strict=True):
            kept.num_tokens = answer.num_tokens
        return found

    def _prepare_cache(self, answer: _Answer, *, capacity: int) -> None:
        """Prepare the key-value cache of an answer for a pass.

        The pass recomputes all tokens if there is no cache yet, or if the answer has reached a length from which on
        all positions are encoded differently (longrope.py).
        """
        if answer.kept is None or answer.kept.num_tokens in self._bounds:
            answer.kept = KeptKeys(capacity=capacity)
        answer.kept.begin_pass()

    def _pack(self, jobs: Sequence[str]) -> PackedBatch:
        """Build a pack of the tokens that are not in the key-value cache, at their positions in the answer."""
        slices = [
            SliceInput(
                adapter=self._requests[job][0],
                sequences=tuple(_new_tokens(answer) for answer in self._open(job)),
                label_weight=0.0,
                dropout=None,
            )
            for job in jobs
        ]
        pack = build_pack(slices, device=self._base.device)
        kept = tuple(answer.kept for job in jobs for answer in self._open(job) if answer.kept is not None)
        offsets = [of_answer.num_tokens for of_answer in kept]
        offsets += [0] * (len(pack.sequence_lengths) - len(kept))  # the padding sequence
        by_token = torch.tensor(offsets).repeat_interleave(torch.tensor(pack.sequence_lengths))
        return replace(pack, kept=kept, position_ids=pack.position_ids + by_token.to(pack.position_ids.device))

    def _book(self, job: str, tokens: Sequence[int]) -> None:
        prompts = self._requests[job][1]
        for answer, token in zip(self._open(job), tokens, strict=True):
            answer.ids.append(token)
            answer.is_complete = token in prompts.end_ids or len(answer.ids) == prompts.max_tokens
            if answer.is_complete:
                answer.kept = None


def _new_tokens(answer: _Answer) -> tuple[np.ndarray, np.ndarray]:
    """Return the tokens without cache. There is no padding, because rotary factors may depend on the length."""
    kept = 0 if answer.kept is None else answer.kept.num_tokens
    ids = np.array([*answer.prompt, *answer.ids][kept:], dtype=np.int32)
    return ids, np.zeros(len(ids), dtype=np.uint8)


def check_prompts(prompts: Prompts, base: BaseModel) -> None:
    """Raise ConfigError if the prompts can't be answered."""
    if base.task != "causal-lm":
        raise ConfigError("A sequence classifier can't answer prompts.", remedy="Use a job on a causal language model.")
    if not prompts.prompts or prompts.max_tokens < 1:
        raise ConfigError(
            "Sampling needs at least one prompt, and max_tokens must be at least 1.",
            remedy="Add a prompt, or raise max_tokens.",
        )
    for number, prompt in enumerate(prompts.prompts, start=1):
        if not prompt:
            raise ConfigError(f"Prompt {number} is empty.", remedy="Fill in the prompt, or remove it.")
        if not 0 <= min(prompt) <= max(prompt) < base.vocab_size:
            raise ConfigError(
                f"Prompt {number} contains a token ID that is not between 0 and {base.vocab_size - 1}.",
                remedy="Tokenize prompts with this base model's tokenizer.",
            )
        longest = len(prompt) + prompts.max_tokens
        if base.max_positions is not None and longest > base.max_positions:
            raise ConfigError(
                f"Prompt {number} has {len(prompt)} tokens. With an answer of max_tokens={prompts.max_tokens}, it "
                f"exceeds the base model's maximum of {base.max_positions} tokens.",
                remedy="Shorten the prompt, or lower max_tokens.",
            )
