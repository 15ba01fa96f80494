# pyright: basic
"""Continuous batching: answers to many prompts, with many adapters, grow in the same forward passes.

A prompt joins and an answer leaves between two passes. Keys and values are cached while an answer grows
(lora_core/packing/packed_batch.py), so n tokens after a prompt of m tokens take m + n tokens of forward passes. The
bits of an answer, and therefore its tokens, depend on its own prompt, adapter and sampling alone, and not on the other
answers in the passes. On a GPU, and wherever the determinism level is `allclose`, that holds up to rounding.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Literal

import numpy as np
import torch

from lora_core.adapter.flat_adapter import FlatAdapter
from lora_core.base_model.model import BaseModel
from lora_core.errors import ConfigError, OutOfMemory
from lora_core.forward.language_model import hidden_states
from lora_core.forward.sampling import ChosenToken, Sampling, choose_tokens
from lora_core.kernels.kv_cache import GROWTH_TOKENS, SequenceCache
from lora_core.layers.lm_heads import logits_by_head
from lora_core.layers.longrope import bounds_in
from lora_core.packing.packed_batch import PackedBatch, SliceInput, build_pack
from lora_core.runtime.cpu_lanes import Lanes, split
from lora_core.runtime.device_errors import shortage_in_pass
from lora_core.runtime.transfers import upload

RECOVERY_PASSES = 1024
"""Successful passes after which the limit of the key-value cache has grown from nothing to its maximum."""
Finish = Literal["stop", "length", "not_finite"]
"""Why an answer is complete: an end token, the maximum number of tokens, or logits that are infinite or NaN."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """A prompt as token ids, the adapter that answers it, and the limits of the answer."""

    name: str
    """Identifies the prompt and its answer in a batch."""
    adapter: FlatAdapter
    """It must not be trained while its answer grows. An adapter without layers stands for the base model."""
    ids: tuple[int, ...]
    max_tokens: int
    """Maximum number of tokens of the answer."""
    end_ids: frozenset[int] = frozenset()
    """Token ids that end the answer. The end token is part of the answer."""
    sampling: Sampling = field(default_factory=Sampling)
    has_low_priority: bool = False
    """The prompt waits for all prompts without low priority. If those need its cache, its answer restarts later."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NewToken:
    """The next token of one answer. If `finish` is set, the answer is complete and has left the batch.

    `chosen` is None if `finish` is "not_finite".
    """

    name: str
    chosen: ChosenToken | None
    finish: Finish | None = None


@dataclass(kw_only=True, slots=True)
class _Answer:
    prompt: Prompt
    ids: list[int] = field(default_factory=list)
    num_reported: int = 0
    """Tokens that `advance` has returned. More than `ids` has if the answer restarted from its prompt."""
    cache: SequenceCache | None = None
    """None before the first pass, and after a restart."""

    @property
    def num_tokens(self) -> int:
        return len(self.prompt.ids) + len(self.ids)

    @property
    def cache_tokens(self) -> int:
        """Tokens for which the answer needs memory in the key-value cache, which grows in steps. An answer that
        restarted needs as much as before, or it would have to restart again."""
        num_tokens = len(self.prompt.ids) + max(len(self.ids), self.num_reported)
        return min(-(-num_tokens // GROWTH_TOKENS) * GROWTH_TOKENS, self.max_tokens)

    @property
    def max_tokens(self) -> int:
        return len(self.prompt.ids) + self.prompt.max_tokens

    def restart(self, *, is_exact: bool) -> None:
        """Discard the cache. If bits depend on nothing else, also the answer: it gets the same tokens again. Otherwise
        its tokens are kept, and the next pass computes their keys and values."""
        if is_exact:
            self.ids.clear()
        self.cache = None

    def new_ids(self) -> np.ndarray:
        """Return the tokens that are not in the cache."""
        num_cached = 0 if self.cache is None else self.cache.num_tokens
        return np.array([*self.prompt.ids, *self.ids][num_cached:], dtype=np.int32)


class ContinuousBatch:
    """Answers that grow by one token per `advance`. Prompts wait, in order, until the key-value cache has space.

    If the cache becomes full, the newest answer restarts from its prompt later, one with low priority first. If memory
    runs out in a pass, the answers restart and the cache is halved. It grows again with each pass that succeeds.
    """

    def __init__(
        self, base: BaseModel, *, lanes: Lanes, cache_tokens: int, prompt_tokens: int, is_exact: bool = True
    ) -> None:
        """
        Args:
            is_exact: The bits of an answer don't depend on other answers (invariance "bitwise").
            lanes: CPU threads, each of which computes some of the answers.
            cache_tokens: Maximum number of tokens in the key-value cache. One answer alone may exceed it.
            prompt_tokens: Maximum number of prompt tokens of one pass. One prompt alone may exceed it.
        """
        self._base = base
        self._lanes = lanes
        self._is_exact = is_exact
        self._cache_tokens = self._max_cache_tokens = cache_tokens
        self._growth = max(1, cache_tokens // RECOVERY_PASSES)
        self._prompt_tokens = prompt_tokens
        self._bounds = bounds_in(base.model)
        self._waiting: list[_Answer] = []
        self._growing: list[_Answer] = []

    def __len__(self) -> int:
        return len(self._waiting) + len(self._growing)

    @property
    def cache_bytes_per_token(self) -> int:
        """Memory of one token in the key-value cache. 0 while nothing is cached."""
        return max((answer.cache.bytes_per_token for answer in self._growing if answer.cache is not None), default=0)

    @property
    def max_sequence_tokens(self) -> int | None:
        """Maximum number of tokens of a prompt with its answer, on a sharded base model. None on others: they recover
        from a shortage of memory.

        One pass computes a prompt. If an answer restarts, one pass recomputes its prompt and the answer so far.
        """
        return min(self._prompt_tokens, self._max_cache_tokens) if self._base.is_sharded else None

    def add(self, prompt: Prompt) -> None:
        """Add a prompt. Raises ConfigError if it can't be answered."""
        check_prompt(prompt.ids, prompt.max_tokens, self._base)
        place = len(self._waiting) if prompt.has_low_priority else self._num_urgent()
        self._waiting.insert(place, _Answer(prompt=prompt))

    def remove(self, name: str) -> None:
        """Remove a prompt with its answer, if it is in the batch."""
        self._waiting = [answer for answer in self._waiting if answer.prompt.name != name]
        self._growing = [answer for answer in self._growing if answer.prompt.name != name]

    def advance(self) -> list[NewToken]:
        """Compute one pass, and return the next token of each answer in it.

        Raises OutOfMemory for one prompt, which is then removed. Raises BrokenPass if the base model is sharded.
        """
        while len(self):
            self._schedule()
            try:
                with shortage_in_pass(is_sharded=self._base.is_sharded):
                    chosen = self._compute()
            except torch.OutOfMemoryError as error:
                self._recover(error)
                continue
            self._cache_tokens = min(self._max_cache_tokens, self._cache_tokens + self._growth)
            return self._recorded(chosen)
        return []

    def _schedule(self) -> None:
        """Choose the answers of the next pass: those that grow, and waiting prompts in their order while they fit."""
        num_tokens = sum(answer.cache_tokens for answer in self._growing)
        while num_tokens > self._cache_tokens and len(self._growing) > 1:
            num_tokens -= self._restart_newest().cache_tokens
        num_prompt_tokens = 0
        while self._waiting:
            first = self._waiting[0]
            while num_tokens + first.cache_tokens > self._cache_tokens and self._can_replace(first):
                num_tokens -= self._restart_newest().cache_tokens
            num_tokens += first.cache_tokens
            num_prompt_tokens += first.num_tokens
            is_first_prompt = num_prompt_tokens == first.num_tokens
            exceeds_cache = num_tokens > self._cache_tokens and (self._growing or not is_first_prompt)
            if exceeds_cache or (num_prompt_tokens > self._prompt_tokens and not is_first_prompt):
                break
            self._growing.append(self._waiting.pop(0))

    def _num_urgent(self) -> int:
        """Return the number of waiting prompts without low priority. They are the first ones."""
        return sum(not answer.prompt.has_low_priority for answer in self._waiting)

    def _can_replace(self, waiting: _Answer) -> bool:
        """Return whether an answer with low priority grows, and the waiting prompt has none."""
        is_any_low = any(answer.prompt.has_low_priority for answer in self._growing)
        return is_any_low and not waiting.prompt.has_low_priority

    def _restart_newest(self) -> _Answer:
        """Let the newest growing answer wait again: the newest one with low priority, if there is any."""
        low = [index for index, answer in enumerate(self._growing) if answer.prompt.has_low_priority]
        newest = self._growing.pop(low[-1] if low else -1)
        newest.restart(is_exact=self._is_exact)
        self._waiting.insert(self._num_urgent() if low else 0, newest)
        return newest

    def _recover(self, error: torch.OutOfMemoryError) -> None:
        """Prepare for another pass after one that ran out of memory. Raises OutOfMemory if it had a single answer."""
        if len(self._growing) == 1:
            (answer,) = self._growing
            self._growing = []
            self._cache_tokens = self._max_cache_tokens  # the limit was lowered because of this answer
            raise OutOfMemory(answer.prompt.name, num_tokens=answer.num_tokens) from error
        self._cache_tokens = sum(answer.cache_tokens for answer in self._growing) // 2
        for answer in self._growing:
            answer.restart(is_exact=self._is_exact)
        waiting = sorted(self._growing + self._waiting, key=lambda answer: answer.prompt.has_low_priority)
        self._waiting, self._growing = waiting, []

    def _compute(self) -> list[tuple[_Answer, ChosenToken | None]]:
        """Return the next token of each growing answer."""
        for answer in self._growing:
            self._prepare_cache(answer)
        costs = [len(answer.new_ids()) for answer in self._growing]
        parts = split(costs, num_lanes=self._lanes.count)
        found = self._lanes.run(self._compute_lane, [[self._growing[index] for index in part] for part in parts])
        return [pair for of_lane in found for pair in of_lane]

    @torch.no_grad()
    def _compute_lane(self, growing: Sequence[_Answer]) -> list[tuple[_Answer, ChosenToken | None]]:
        groups = _groups(growing)
        answers = [answer for group in groups for answer in group]
        pack = self._pack(groups)
        h_SD = hidden_states(self._base, pack)[pack.sequence_bounds_S[1 : len(answers) + 1] - 1]
        chosen = choose_tokens(
            logits_by_head(h_SD, self._base.head(), pack),
            [answer.prompt.sampling for answer in answers],
            [answer.ids for answer in answers],
        )
        return list(zip(answers, chosen, strict=True))

    def _prepare_cache(self, answer: _Answer) -> None:
        """Prepare the key-value cache of an answer for a pass.

        The pass recomputes all tokens if there is no cache yet, or if the answer has reached a length from which on
        all positions are encoded differently (longrope.py).
        """
        if answer.cache is None or answer.cache.num_tokens in self._bounds:
            answer.cache = SequenceCache(max_tokens=answer.max_tokens)
        answer.cache.begin_pass()

    def _pack(self, groups: Sequence[Sequence[_Answer]]) -> PackedBatch:
        """Build a pack of the tokens that are not in the key-value cache, at their positions in the answer.

        Each of the `groups` becomes a segment.
        """
        slices = [
            SliceInput(
                adapter=answers[0].prompt.adapter,
                sequences=tuple(_unlabelled(answer.new_ids()) for answer in answers),
                label_weight=0.0,
                dropout=None,
                is_by_row=len(answers[0].new_ids()) == 1,
            )
            for answers in groups
        ]
        pack = build_pack(slices, device=self._base.device)
        caches = tuple(answer.cache for answers in groups for answer in answers if answer.cache is not None)
        offsets = [cache.num_tokens for cache in caches]
        offsets += [0] * (len(pack.sequence_lengths) - len(caches))  # the padding sequence
        starts = accumulate(pack.sequence_lengths, initial=0)
        newest = [start for start, offset in zip(starts, offsets, strict=False) if offset]
        arrays = [np.repeat(offsets, pack.sequence_lengths)[None], np.array(newest, np.int64)]
        if newest and self._base.kernels.decoding_head_size is not None:
            arrays.append(np.stack([cache.addresses() for cache in caches if cache.num_tokens], axis=1))
        offsets_1T, rows_n, *tables = upload(arrays, self._base.device)
        return replace(
            pack,
            caches=caches,
            newest_rows_n=rows_n,
            addresses_Cn4=tables[0] if tables else None,
            position_ids=pack.position_ids + offsets_1T,
        )

    def _recorded(self, chosen: Sequence[tuple[_Answer, ChosenToken | None]]) -> list[NewToken]:
        """Append the tokens to their answers, and return those that were not returned before a restart."""
        news: list[NewToken] = []
        for answer, token in chosen:
            assert answer.cache is not None
            answer.cache.num_tokens = answer.num_tokens
            new = _appended(answer, token)
            if new.finish is not None or len(answer.ids) > answer.num_reported:
                answer.num_reported = len(answer.ids)
                news.append(new)
        complete = {new.name for new in news if new.finish is not None}
        self._growing = [answer for answer in self._growing if answer.prompt.name not in complete]
        return news


def _groups(answers: Sequence[_Answer]) -> list[list[_Answer]]:
    """Return the segments of a pass: each prompt alone, and the answers that grow by one token, by adapter.

    LoRA's matmuls run by segment. Their bits may depend on the number of rows, so a prompt shares them with no other,
    and single rows are computed one by one (`SliceInput.is_by_row`).
    """
    groups: dict[tuple[int, int], list[_Answer]] = {}
    for number, answer in enumerate(answers):
        is_single = len(answer.new_ids()) == 1
        groups.setdefault((id(answer.prompt.adapter), -1 if is_single else number), []).append(answer)
    return list(groups.values())


def _appended(answer: _Answer, chosen: ChosenToken | None) -> NewToken:
    prompt, finish = answer.prompt, None
    if chosen is None:
        return NewToken(name=prompt.name, chosen=None, finish="not_finite")
    answer.ids.append(chosen.token)
    if chosen.token in prompt.end_ids:
        finish: Finish | None = "stop"
    elif len(answer.ids) == prompt.max_tokens:
        finish = "length"
    return NewToken(name=prompt.name, chosen=chosen, finish=finish)


def _unlabelled(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """There is no padding, because rotary factors may depend on the length."""
    return ids, np.zeros(len(ids), dtype=np.uint8)


def check_prompt(ids: Sequence[int], max_tokens: int, base: BaseModel, *, name: str = "The prompt") -> None:
    """Raise ConfigError if the base model can't answer the prompt. `name`: begins the message."""
    if base.task != "causal-lm":
        raise ConfigError("A sequence classifier can't answer prompts.", remedy="Use a job on a causal language model.")
    if max_tokens < 1:
        raise ConfigError("An answer needs max_tokens of at least 1.", remedy="Raise max_tokens.")
    if not ids:
        raise ConfigError(f"{name} is empty.", remedy="Fill in the prompt, or remove it.")
    if not 0 <= min(ids) <= max(ids) < base.vocab_size:
        raise ConfigError(
            f"{name} contains a token ID that is not between 0 and {base.vocab_size - 1}.",
            remedy="Tokenize prompts with this base model's tokenizer.",
        )
    if base.max_positions is not None and len(ids) + max_tokens > base.max_positions:
        raise ConfigError(
            f"{name} has {len(ids)} tokens. With an answer of max_tokens={max_tokens}, it exceeds the base model's "
            f"maximum of {base.max_positions} tokens.",
            remedy="Shorten the prompt, or lower max_tokens.",
        )
