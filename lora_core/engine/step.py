# pyright: basic
"""The passes of a tick: assigns slices to ranks and lanes, and runs them."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from typing import Any

import numpy as np
import torch

from lora_core.adapter.flat_adapter import FlatAdapter
from lora_core.base_model.model import BaseModel
from lora_core.config import Kind, LoraConfig
from lora_core.distributed.ranks import Ranks
from lora_core.engine.job import TrainingJob
from lora_core.forward.language_model import run_evaluation, run_training
from lora_core.losses.preference import RewardSums, SliceScores
from lora_core.packing.packed_batch import ROW_MULTIPLE, SliceInput, build_pack
from lora_core.runtime.cpu_lanes import Lanes, split
from lora_core.runtime.device_errors import shortage_in_pass

EMPTY_LORA = LoraConfig(rank=1, alpha=1)
"""Configuration of an adapter without targets."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TickPlan:
    """The token counts of each job's next slices, all of one kind, and the rank of each slice. Equal on every rank."""

    kind: Kind
    tokens: Mapping[str, tuple[int, ...]]
    ranks: tuple[int, ...]
    checkpointed: bool = False

    @property
    def sizes(self) -> list[int]:
        """Tokens of each slice, in order."""
        return list(chain(*self.tokens.values()))

    @property
    def num_tokens(self) -> int:
        return sum(self.sizes)

    @property
    def largest_share(self) -> int:
        """Number of tokens of the rank that has the most."""
        return max(map(self.share_of, set(self.ranks)))

    def share_of(self, rank: int) -> int:
        """Return the number of tokens that one rank computes."""
        return sum(size for size, of_rank in zip(self.sizes, self.ranks, strict=True) if of_rank == rank)

    def by_job(self) -> dict[str, range]:
        """Return the indices of each job's slices in the tick."""
        spans: dict[str, range] = {}
        start = 0
        for job, tokens in self.tokens.items():
            spans[job] = range(start, start + len(tokens))
            start += len(tokens)
        return spans

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"tokens": list(self.tokens.items())}

    @classmethod
    def of_json(cls, fields: dict[str, Any]) -> "TickPlan":
        tokens = {job: tuple(sizes) for job, sizes in fields["tokens"]}
        return cls(**fields | {"tokens": tokens, "ranks": tuple(fields["ranks"])})


@dataclass(frozen=True, kw_only=True, slots=True)
class Computed:
    """Scores of all slices, and the number of tokens of the fullest lane of all ranks."""

    scores: list[SliceScores]
    fullest_lane: int


class Passes:
    """Runs the passes of one engine."""

    def __init__(self, base: BaseModel, *, lanes: Lanes, ranks: Ranks) -> None:
        self._base = base
        self._lanes = lanes
        self._ranks = ranks

    def run(self, plan: TickPlan, jobs: Mapping[str, TrainingJob]) -> Computed:
        """Compute the plan's slices and leave their gradients in SliceGradients.

        Raises torch.OutOfMemoryError on every rank if the slices of any rank do not fit. Raises BrokenPass on this
        rank alone if that happened in a sharded base model.
        """
        own = [index for index, rank in enumerate(plan.ranks) if rank == self._ranks.rank]
        shortage: str | None = None
        scores: list[SliceScores] = []
        sizes = [plan.sizes[index] for index in own]
        lanes: list[list[int]] = []
        try:
            with shortage_in_pass(is_sharded=self._base.is_sharded):
                slices = _slices(plan, jobs, own)
                lanes = split(sizes, num_lanes=self._lanes.count) if own else []
                if self._base.is_sharded:
                    slices += self._keeping_step(slices, plan, jobs)
                    lanes = [list(range(len(slices)))]
                scores = self._run_lanes(lanes, slices, plan.kind, checkpointed=plan.checkpointed)[: len(own)]
        except torch.OutOfMemoryError as error:
            shortage = str(error)  # the error itself would keep the activations of its frames alive
        own_lanes = [sum(sizes[index] for index in lane if index < len(own)) for lane in lanes]
        fields = {"scores": [asdict(score) for score in scores], "lane": max(own_lanes, default=0)}
        found = self._ranks.gathered(fields if shortage is None else None)
        if shortage is not None:
            raise torch.OutOfMemoryError(shortage)
        if None in found:
            raise torch.OutOfMemoryError(f"The slices of rank {found.index(None)} do not fit on its device.")
        each = [iter(of_rank["scores"]) for of_rank in found]
        return Computed(
            scores=[_scores(next(each[rank])) for rank in plan.ranks],
            fullest_lane=max(of_rank["lane"] for of_rank in found),
        )

    def _keeping_step(
        self, slices: Sequence[SliceInput], plan: TickPlan, jobs: Mapping[str, TrainingJob]
    ) -> list[SliceInput]:
        """Return dummy slices, so that this rank makes as many passes through a sharded base model as the others."""
        compares = any(jobs[name].reference is not None for name in plan.tokens)
        if slices and (not compares or any(part.reference is not None for part in slices)):
            return []
        empty = FlatAdapter((), EMPTY_LORA, dtype=self._base.dtype, device=self._base.device, is_trained=False)
        ids, mask = np.zeros(ROW_MULTIPLE, np.int32), np.zeros(ROW_MULTIPLE, np.uint8)
        mask[-1] = 1
        return [
            SliceInput(
                adapter=empty,
                sequences=((ids, mask),),
                label_weight=0.0,
                dropout=None,
                reference=empty if compares else None,
            )
        ]

    def _run_lanes(
        self, lanes: list[list[int]], slices: list[SliceInput], kind: Kind, *, checkpointed: bool
    ) -> list[SliceScores]:
        """Return the scores of each slice. `lanes` are indices of `slices`."""
        run = run_training if kind == "train" else run_evaluation

        def compute(lane: list[int]) -> list[SliceScores]:
            pack = build_pack([slices[index] for index in lane], device=self._base.device)
            return run(self._base, replace(pack, is_checkpointed=checkpointed))

        scores = dict(zip(chain(*lanes), chain(*self._lanes.run(compute, lanes)), strict=True))
        return [scores[index] for index in range(len(slices))]


def _slices(plan: TickPlan, jobs: Mapping[str, TrainingJob], own: Sequence[int]) -> list[SliceInput]:
    """Return the slices with the indices `own`."""
    wanted, slices = set(own), list[SliceInput]()
    for name, numbers in plan.by_job().items():
        slices += jobs[name].next_slices(number - numbers.start for number in numbers if number in wanted)
    return slices


def _scores(fields: dict[str, Any]) -> SliceScores:
    rewards: dict[str, Any] | None = fields.pop("rewards")
    return SliceScores(**fields, rewards=None if rewards is None else RewardSums(**rewards))
