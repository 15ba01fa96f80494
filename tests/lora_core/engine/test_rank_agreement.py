"""The ranks of a trainer clip a gradient by the same norm, though their devices add up its squares in other orders."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from lora_core.adapter.optimizer import StepSizes
from lora_core.base_model.model import BaseModel
from lora_core.distributed.ranks import Ranks
from lora_core.engine import engine as engine_module
from lora_core.engine import rank_agreement
from lora_core.engine.engine import Engine
from lora_core.engine.rank_agreement import StepOutcome, agree, read_sizes
from lora_core.engine_config import EngineConfig
from lora_core.errors import OutOfMemory

OWN = (1.0, 2.0, 3.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Follower(Ranks):
    """A rank whose leader has other norms."""

    norms: tuple[float, ...]

    def leader_numbers(self, own: Any) -> list[float]:
        assert len(own) == len(self.norms), "all ranks pass a number for each job of the tick"
        return list(self.norms)


def read(norm: float, sizes: tuple[float, ...] | None = OWN, error: OutOfMemory | None = None) -> StepSizes | None:
    job = SimpleNamespace(sizes=None if sizes is None else torch.tensor(sizes))
    outcome = StepOutcome(job=cast(Any, job), step=0, num_pending=0, error=error)
    (found,) = read_sizes(Follower(rank=1, size=2, norms=(norm,)), [outcome])
    return found


def test_a_rank_takes_the_norm_of_the_leader_and_keeps_its_own_largest_numbers() -> None:
    assert read(1.0000001) == StepSizes(norm=1.0000001, weight=2.0, moment=3.0)


def test_a_norm_that_is_not_finite_on_one_rank_alone_stays_different() -> None:
    assert read(math.nan) == StepSizes(norm=1.0, weight=2.0, moment=3.0)
    broken = read(1.0, (math.inf, 2.0, 3.0))
    assert broken is not None
    assert broken.norm == math.inf


def test_memory_that_runs_out_while_the_sizes_are_read_fails_the_job_and_keeps_the_exchange(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def out_of_memory(_: Any) -> None:
        raise torch.OutOfMemoryError("simulated")

    monkeypatch.setattr(rank_agreement, "download", out_of_memory)
    job = SimpleNamespace(name="job", sizes=torch.tensor(OWN))
    outcome = StepOutcome(job=cast(Any, job), step=0, num_pending=0)

    assert read_sizes(Follower(rank=1, size=2, norms=(1.0,)), [outcome]) == [None]
    assert isinstance(outcome.error, OutOfMemory)


@dataclass(frozen=True, kw_only=True, slots=True)
class Receiver(Ranks):
    """A rank whose leader has `vectors`, and where all ranks have the same outcomes."""

    vectors: list[torch.Tensor]

    def numbers(self, own: Any) -> list[list[int]]:
        return [list(own)] * self.size

    def gathered(self, value: Any) -> list[Any]:
        return [None, value]

    def spread(self, total: torch.Tensor, *, holder: int | None) -> None:
        assert holder == 0
        total.copy_(self.vectors.pop(0))


def agreed(job: Any, *, step_before: int) -> list[OutOfMemory]:
    ranks = Receiver(rank=1, size=2, vectors=[torch.full((4,), 2.0), torch.full((3,), 3.0)])
    outcome = StepOutcome(job=job, step=step_before, num_pending=0)
    memory = SimpleNamespace(own_memory=lambda: (0, 0), adopt_ranks=lambda *_: None)
    return agree(ranks, [outcome], cast(Any, memory))


def job_after_step(*, refresh: Any) -> Any:
    adapter = SimpleNamespace(p=torch.ones(4), v=torch.ones(3), refresh_compute=refresh)
    job = SimpleNamespace(name="job", step=5, adapter=adapter, pending=["stepped"], step_adds_on_device=True)
    job.progress, job.is_torn, job.quarantine = SimpleNamespace(step=5), False, lambda: None
    return job


def test_a_step_with_sums_of_the_device_is_that_of_the_leader() -> None:
    refreshed: list[float] = []
    job = job_after_step(refresh=lambda: refreshed.append(float(job.adapter.p.sum())))

    assert agreed(job, step_before=4) == []

    assert job.adapter.p.tolist() == [2.0] * 4
    assert job.adapter.v.tolist() == [3.0] * 3
    assert refreshed == [8.0], "what passes read follows from the leader's weights"


@pytest.mark.parametrize(
    ("step_before", "depends"), [(5, True), (4, False)], ids=["no step", "the same on all devices"]
)
def test_nothing_is_sent_without_a_step_that_depends_on_the_device(step_before: int, depends: bool) -> None:
    job = job_after_step(refresh=lambda: None)
    job.step_adds_on_device = depends

    assert agreed(job, step_before=step_before) == []

    assert job.adapter.p.tolist() == [1.0] * 4


def test_memory_that_runs_out_after_a_step_of_the_leader_fails_the_job() -> None:
    def out_of_memory() -> None:
        raise torch.OutOfMemoryError("simulated")

    job = job_after_step(refresh=out_of_memory)

    (error,) = agreed(job, step_before=4)

    assert isinstance(error, OutOfMemory)
    assert (job.is_torn, job.progress.step, job.pending) == (True, 4, [])


def test_a_job_without_a_due_step_or_with_an_error_has_no_sizes() -> None:
    assert read(1.0, None) is None
    assert read(1.0, error=OutOfMemory("job")) is None


def test_ranks_agree_on_the_kernels_of_the_device_that_tensors_name(
    load: Callable[..., BaseModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The base model may be loaded on "cuda", but a kernel is looked up by the device of a tensor, such as "cuda:0"."""

    class Agreed(Exception):
        """Ends the start of the engine, which has no GPU here."""

    def agree(device: torch.device, _: object) -> None:
        raise Agreed(device)

    monkeypatch.setattr(engine_module, "agree_on_kernels", agree)
    base = load("llama")

    with pytest.raises(Agreed) as caught:
        Engine(replace(base, device="cuda"), EngineConfig())

    assert caught.value.args == (next(base.model.parameters()).device,)
