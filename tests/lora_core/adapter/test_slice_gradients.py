"""Parallel slices of a job: the adapter's bits do not depend on the number of lanes and ticks."""

from dataclasses import replace

import pytest
import torch

from lora_core.adapter.flat_adapter import AdaptedModule, FlatAdapter
from lora_core.adapter.slice_gradients import SliceGradients
from lora_core.config import LoraConfig
from lora_core.engine.engine import Engine
from lora_core.engine.fair_queue import ReadySlice, widen
from lora_core.engine_config import EngineConfig
from lora_core.runtime import cpu_lanes as lanes_module
from tests.lora_core.runtime.test_cpu_lanes import spy_on_lanes
from tests.lora_core.scenarios import Submission, admit, config, dataset

PLAIN = config(rank=4, dropout=0.2, batch_size=6, num_steps=2, seed=3, slice_tokens=24)
METHODS = replace(PLAIN.lora, use_dora=True, dropout=0.0, trainable_token_indices=(3, 9, 200))
JOBS = {
    name: Submission(config=replace(PLAIN, lora=lora), train=dataset(1, [20, 9, 17, 23, 5, 14, 31]))
    for name, lora in {"dropout": PLAIN.lora, "dora_and_tokens": METHODS}.items()
}


def trained(base, job: Submission, *, job_tokens: int, num_lanes: int) -> tuple[torch.Tensor, list[float]]:
    engine = Engine(base, EngineConfig(job_tokens=job_tokens, num_lanes=num_lanes))
    admit(engine, "job", job)
    events = []
    while not engine.idle:
        events += engine.tick()
    return engine._jobs["job"].adapter.arena.clone(), [event.loss for event in events if hasattr(event, "loss")]


@pytest.mark.parametrize("name", JOBS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapter_bits_do_not_depend_on_lanes_and_ticks(load, monkeypatch, name, dtype):
    monkeypatch.setattr(lanes_module, "MIN_LANE_TOKENS", 8)
    used = spy_on_lanes(monkeypatch)
    base = load("llama", dtype)

    one_by_one, losses = trained(base, JOBS[name], job_tokens=1, num_lanes=1)
    assert set(used) == {1}
    for job_tokens, num_lanes in ((4096, 1), (60, 2), (4096, 3)):
        used.clear()
        row, other_losses = trained(base, JOBS[name], job_tokens=job_tokens, num_lanes=num_lanes)
        assert torch.equal(row, one_by_one)
        assert other_losses == losses
        assert max(used) == num_lanes


def test_slice_gradients_are_added_in_order_and_their_buffers_freed():
    lora = LoraConfig(rank=2, alpha=2)
    adapter = FlatAdapter(
        (AdaptedModule(name="a", in_features=3, out_features=4),), lora, dtype=torch.float32, device="cpu"
    )
    gradients = SliceGradients(adapter=adapter)
    parts = [1e8, 1.0, -1e8, 1.0]

    for index in (3, 1, 0, 2):
        gradients.adapter_of(index).sites["a"].grad_b_OR.fill_(parts[index])
    gradients.collect(0, [0])
    gradients.collect(1, [0, 0, 0])

    assert torch.all(adapter.sites["a"].grad_b_OR == ((parts[0] + parts[2]) + 1.0))
    assert torch.all(adapter.sites["a"].grad_a_RD == 0)
    assert gradients.num_bytes == 0

    again = gradients.adapter_of(1)
    assert again.sites["a"].a_RD.data_ptr() == adapter.sites["a"].a_RD.data_ptr()
    assert not again.g.any()
    again.sites["a"].grad_b_OR.fill_(2.0)
    assert again.g.sum() == 2.0 * 8
    assert gradients.num_bytes == adapter.g.nbytes

    gradients.drop()
    assert gradients.num_bytes == 0
    assert not adapter.g.any()


def test_further_slices_are_added_round_robin_within_the_budget():
    one = ReadySlice(job="one", kind="train", num_tokens=10, served=0, further=(10, 10, 10))
    two = ReadySlice(job="two", kind="train", num_tokens=20, served=5, further=(20, 5))

    assert widen([one, two], token_budget=30, job_tokens=100) == [(10,), (20,)]
    assert widen([one, two], token_budget=60, job_tokens=100) == [(10, 10), (20, 20)]
    assert widen([one, two], token_budget=200, job_tokens=25) == [(10, 10), (20,)]
    assert widen([one], token_budget=5, job_tokens=1) == [(10,)]
