# pyright: basic
"""Generates greedy answers of jobs to their own prompts, for samples next to the loss."""

from collections.abc import Mapping
from dataclasses import dataclass

from lora_core.adapter.flat_adapter import FlatAdapter
from lora_core.base_model.model import BaseModel
from lora_core.errors import ConfigError, OutOfMemory
from lora_core.forward.continuous_batch import ContinuousBatch, Prompt, check_prompt
from lora_core.runtime.cpu_lanes import Lanes


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompts:
    """The prompts of one job as token ids, and the limits of its answers."""

    prompts: tuple[tuple[int, ...], ...]
    max_tokens: int
    """Maximum number of tokens of one answer."""
    end_ids: frozenset[int] = frozenset()
    """Token ids that end an answer. The end token is part of the answer."""


class Generation:
    """Answers that grow by one token per `advance`. The adapters must not be trained meanwhile."""

    def __init__(
        self,
        base: BaseModel,
        requests: Mapping[str, tuple[FlatAdapter, Prompts]],
        *,
        lanes: Lanes,
        token_budget: int,
        is_exact: bool,
    ) -> None:
        """`requests` are the adapter and the prompts of each job; `token_budget` limits the tokens of answers that grow
        at once, including prompts. `is_exact`: as for ContinuousBatch. Raises ConfigError."""
        self._batch = ContinuousBatch(
            base, lanes=lanes, cache_tokens=token_budget, prompt_tokens=token_budget, is_exact=is_exact
        )
        self._answers: dict[str, list[list[int]]] = {job: [] for job in requests}
        self._places: dict[str, tuple[str, int]] = {}
        """Job and number of each prompt in the batch, by its name there."""
        for job, (adapter, prompts) in requests.items():
            check_prompts(prompts, base)
            for number, ids in enumerate(prompts.prompts):
                name = str(len(self._places))
                self._places[name] = job, number
                self._answers[job].append([])
                self._batch.add(
                    Prompt(name=name, adapter=adapter, ids=ids, max_tokens=prompts.max_tokens, end_ids=prompts.end_ids)
                )

    @property
    def is_complete(self) -> bool:
        return not len(self._batch)

    def advance(self) -> None:
        """Generate one token for each answer that grows. Does nothing if all are complete.

        Raises OutOfMemory for one job: `drop` it or discard this object. Raises BrokenPass if the base model is
        sharded.
        """
        try:
            tokens = self._batch.advance()
        except OutOfMemory as error:
            job, _ = self._places[error.job]
            raise OutOfMemory(job, num_tokens=error.num_tokens) from error
        for new in tokens:
            if new.chosen is not None:
                job, number = self._places[new.name]
                self._answers[job][number].append(new.chosen.token)

    def drop(self, job: str) -> None:
        """Stop answering this job and discard its answers."""
        del self._answers[job]
        for name, (owner, _) in self._places.items():
            if owner == job:
                self._batch.remove(name)

    def answers(self) -> dict[str, list[tuple[int, ...]]]:
        """Return the token ids of each answer so far, in the order of the prompts, including end tokens."""
        return {job: [tuple(ids) for ids in answers] for job, answers in self._answers.items()}


def check_prompts(prompts: Prompts, base: BaseModel) -> None:
    """Raise ConfigError if the prompts can't be answered."""
    if not prompts.prompts:
        raise ConfigError("Sampling needs at least one prompt.", remedy="Add a prompt.")
    for number, ids in enumerate(prompts.prompts, start=1):
        check_prompt(ids, prompts.max_tokens, base, name=f"Prompt {number}")
