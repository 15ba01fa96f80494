"""AdamW over the flat row is torch's AdamW; schedules are those of transformers."""

import pytest
import torch
from transformers import (
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)

from lora_core.adapters import AdapterRow, Target
from lora_core.config import LoraConfig, OptimizerConfig, ScheduleConfig
from lora_core.optim import adamw_step, gradient_norm, learning_rate_at, stays_finite

TARGETS = (Target(name="a", in_features=12, out_features=8), Target(name="b", in_features=4, out_features=20))


def new_row(dtype: torch.dtype = torch.float32) -> AdapterRow:
    row = AdapterRow(TARGETS, LoraConfig(rank=3, alpha=6), dtype=dtype, device="cpu")
    row.initialise(1)
    return row


@pytest.mark.parametrize("max_grad_norm", [None, 0.5, 1e6])
def test_steps_equal_torch_adamw_with_clipping(max_grad_norm):
    torch.manual_seed(0)
    row = new_row()
    config = OptimizerConfig(learning_rate=0.1, weight_decay=0.1, max_grad_norm=max_grad_norm)
    parameter = torch.nn.Parameter(row.p.clone())
    reference = torch.optim.AdamW([parameter], lr=0.1, weight_decay=0.1)
    for step in range(1, 6):
        gradient = torch.randn(row.num_parameters)
        row.g.copy_(gradient)
        norm = gradient_norm(row)
        adamw_step(row, config, step=step, learning_rate=0.1, norm=norm)

        parameter.grad = gradient
        if max_grad_norm is not None:
            expected_norm = torch.nn.utils.clip_grad_norm_([parameter], max_grad_norm)
            assert norm == pytest.approx(float(expected_norm))
        reference.step()
        torch.testing.assert_close(row.p, parameter.detach(), rtol=1e-5, atol=1e-6)
        assert not row.g.any()


def test_steps_of_lora_plus_equal_torch_adamw_with_two_groups():
    torch.manual_seed(0)
    row = new_row()
    config = OptimizerConfig(learning_rate=0.1, weight_decay=0.1, max_grad_norm=None, lora_plus_ratio=16)
    a, b = (torch.nn.Parameter(part.clone()) for part in (row.p[: row.num_a], row.p[row.num_a :]))
    reference = torch.optim.AdamW([{"params": [a]}, {"params": [b], "lr": 1.6}], lr=0.1, weight_decay=0.1)
    for step in range(1, 6):
        row.g.copy_(torch.randn(row.num_parameters))
        a.grad, b.grad = row.g[: row.num_a].clone(), row.g[row.num_a :].clone()
        adamw_step(row, config, step=step, learning_rate=0.1, norm=gradient_norm(row))
        reference.step()
    assert row.num_a == 3 * (12 + 4)
    torch.testing.assert_close(row.p, torch.cat([a, b]).detach(), rtol=1e-5, atol=1e-6)


def test_the_compute_copy_follows_the_master():
    row = new_row(torch.bfloat16)
    row.g.fill_(1)
    adamw_step(row, OptimizerConfig(learning_rate=0.1), step=1, learning_rate=0.1, norm=gradient_norm(row))
    assert torch.equal(row.compute, row.p.bfloat16())
    assert row.sites["b"].a_RD.dtype == torch.bfloat16


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_a_gradient_that_is_not_finite_or_overflows_is_seen_in_its_norm(value):
    row = new_row()
    row.g[7] = value
    assert not stays_finite(row, OptimizerConfig(learning_rate=0.1), learning_rate=0.1, norm=gradient_norm(row))


@pytest.mark.parametrize("warmup_steps", [0, 3])
@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
def test_schedules_equal_those_of_transformers_without_their_first_step(kind, warmup_steps):
    schedule = ScheduleConfig(kind=kind, warmup_steps=warmup_steps, num_steps=10)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    make = {
        "constant": lambda: get_constant_schedule_with_warmup(optimizer, warmup_steps + 1),
        "linear": lambda: get_linear_schedule_with_warmup(optimizer, warmup_steps + 1, 11),
        "cosine": lambda: get_cosine_schedule_with_warmup(optimizer, warmup_steps + 1, 11),
    }
    reference = make[kind]()
    optimizer.step()
    reference.step()  # past their step of rate 0
    for step in range(1, 11):
        rate = learning_rate_at(step, peak=0.5, schedule=schedule)
        assert rate == pytest.approx(reference.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        reference.step()


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
def test_every_step_of_every_job_has_a_rate_above_zero(kind):
    for num_steps in (1, 2, 3, 10):
        for warmup_steps in range(num_steps + 1):
            schedule = ScheduleConfig(kind=kind, warmup_steps=warmup_steps, num_steps=num_steps)
            assert all(learning_rate_at(step, peak=1, schedule=schedule) > 0 for step in range(1, num_steps + 1))


def test_a_row_is_one_vector_of_exact_size_and_starts_as_peft_starts():
    row = new_row()
    assert row.num_parameters == 3 * (12 + 8) + 3 * (4 + 20)
    assert float(row.sites["a"].a_RD.abs().max()) <= 12**-0.5
    assert float(row.sites["a"].a_RD.std()) == pytest.approx(12**-0.5 / 3**0.5, rel=0.3)
    assert not row.sites["a"].b_OR.any()
    assert row.sites["a"].grad_b_OR.data_ptr() == row.g[3 * (12 + 4) :].data_ptr()


def test_initial_weights_depend_on_seed_and_module_name_alone():
    alone = AdapterRow(TARGETS[1:], LoraConfig(rank=3, alpha=6), dtype=torch.float32, device="cpu")
    alone.initialise(1)
    assert torch.equal(alone.sites["b"].a_RD, new_row().sites["b"].a_RD)
    alone.initialise(2)
    assert not torch.equal(alone.sites["b"].a_RD, new_row().sites["b"].a_RD)
