"""Optimizers on the flat adapter equal torch's, and schedules equal those of transformers."""

from dataclasses import replace

import pytest
import torch
from transformers import (
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
    get_wsd_schedule,
)

from lora_core.adapter.flat_adapter import AdaptedModule, FlatAdapter
from lora_core.adapter.modules_to_save import TrainedTensor, TrainedTensors
from lora_core.adapter.optimizer import StepSizes, learning_rate_at, optimizer_step, stays_finite, step_sizes
from lora_core.config import LoraConfig, OptimizerConfig, ScheduleConfig

TARGETS = (
    AdaptedModule(name="a", in_features=12, out_features=8),
    AdaptedModule(name="b", in_features=4, out_features=20),
)


def new_adapter(dtype: torch.dtype = torch.float32) -> FlatAdapter:
    adapter = FlatAdapter(TARGETS, LoraConfig(rank=3, alpha=6), dtype=dtype, device="cpu")
    adapter.initialize(1)
    return adapter


def sizes_of(adapter: FlatAdapter, config: OptimizerConfig) -> StepSizes:
    return StepSizes.of(step_sizes(adapter, config, learning_rate=config.learning_rate))


@pytest.mark.parametrize("max_grad_norm", [None, 0.5, 1e6])
def test_steps_equal_torch_adamw_with_clipping(max_grad_norm):
    torch.manual_seed(0)
    adapter = new_adapter()
    config = OptimizerConfig(learning_rate=0.1, weight_decay=0.1, max_grad_norm=max_grad_norm)
    parameter = torch.nn.Parameter(adapter.p.clone())
    reference = torch.optim.AdamW([parameter], lr=0.1, weight_decay=0.1)
    for step in range(1, 6):
        gradient = torch.randn(adapter.num_parameters)
        adapter.g.copy_(gradient)
        norm = sizes_of(adapter, config).norm
        optimizer_step(adapter, config, step=step, learning_rate=0.1, norm=norm)

        parameter.grad = gradient
        if max_grad_norm is not None:
            expected_norm = torch.nn.utils.clip_grad_norm_([parameter], max_grad_norm)
            assert norm == pytest.approx(float(expected_norm))
        reference.step()
        torch.testing.assert_close(adapter.p, parameter.detach(), rtol=1e-5, atol=1e-6)
        assert not adapter.g.any()


def test_lora_plus_rate_of_b_applies_to_magnitudes_but_not_full_modules():
    torch.manual_seed(0)
    trained = TrainedTensors(
        tensors=tuple(
            TrainedTensor(name=f"head.{name}", shape=shape, start=lambda _seed, shape=shape: torch.full(shape, 0.3))
            for name, shape in (("weight", (5, 8)), ("bias", (5,)))
        ),
        modules=("head",),
    )
    adapter = FlatAdapter(
        TARGETS,
        LoraConfig(rank=3, alpha=6, use_dora=True),
        dtype=torch.float32,
        device="cpu",
        frozen={target.name: torch.randn(target.out_features, target.in_features) for target in TARGETS},
        trained=trained,
    )
    adapter.initialize(1)
    config = OptimizerConfig(learning_rate=0.1, weight_decay=0.1, max_grad_norm=None, lora_plus_ratio=16)
    sizes = [3 * (12 + 4), 3 * (8 + 20), 8 + 20, 5 * 8 + 5]
    a, b, magnitudes, in_full = (torch.nn.Parameter(part.clone()) for part in adapter.p.split(sizes))
    reference = torch.optim.AdamW(
        [{"params": [a, in_full]}, {"params": [b, magnitudes], "lr": 1.6}], lr=0.1, weight_decay=0.1
    )

    for step in range(1, 6):
        adapter.g.copy_(torch.randn(adapter.num_parameters))
        for parameter, gradient in zip((a, b, magnitudes, in_full), adapter.g.clone().split(sizes), strict=True):
            parameter.grad = gradient
        optimizer_step(adapter, config, step=step, learning_rate=0.1, norm=sizes_of(adapter, config).norm)
        reference.step()

    torch.testing.assert_close(adapter.p, torch.cat([a, b, magnitudes, in_full]).detach(), rtol=1e-5, atol=1e-6)


SGD = {"kind": "sgd", "max_grad_norm": None}


@pytest.mark.parametrize(
    ("options", "optimizer"),
    [
        ({"lora_plus_ratio": 16, "max_grad_norm": None}, torch.optim.AdamW),
        *(
            (SGD | {"momentum": momentum, "max_grad_norm": norm, "lora_plus_ratio": 4}, torch.optim.SGD)
            for momentum in (0.0, 0.9)
            for norm in (None, 0.5)
        ),
    ],
)
def test_steps_with_separate_learning_rates_equal_those_of_torch(options, optimizer):
    torch.manual_seed(0)
    adapter = new_adapter()
    config = OptimizerConfig(learning_rate=0.1, weight_decay=0.1, **options)
    a, b = (torch.nn.Parameter(part.clone()) for part in (adapter.p[: adapter.num_a], adapter.p[adapter.num_a :]))
    groups = [{"params": [a]}, {"params": [b], "lr": 0.1 * config.lora_plus_ratio}]
    momentum = {"momentum": options["momentum"]} if "momentum" in options else {}
    reference = optimizer(groups, lr=0.1, weight_decay=0.1, **momentum)

    for step in range(1, 6):
        adapter.g.copy_(torch.randn(adapter.num_parameters))
        a.grad, b.grad = adapter.g[: adapter.num_a].clone(), adapter.g[adapter.num_a :].clone()
        optimizer_step(adapter, config, step=step, learning_rate=0.1, norm=sizes_of(adapter, config).norm)
        if config.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_([a, b], config.max_grad_norm)
        reference.step()
        torch.testing.assert_close(adapter.p, torch.cat([a, b]).detach(), rtol=1e-5, atol=1e-6)
        assert not adapter.g.any()

    assert adapter.num_a == 3 * (12 + 4)
    assert adapter.v.any() == (optimizer is torch.optim.AdamW)


@pytest.mark.parametrize(
    ("gradient", "options"),
    [
        (1e12, {"learning_rate": 1e30, "max_grad_norm": None}),
        (1e12, {"learning_rate": 1e30, "max_grad_norm": 1e30}),
        (1e-3, {"learning_rate": 1e-3, "weight_decay": 1e42}),
        (1e-22, {"learning_rate": 1e25, "eps": 1e-37}),
        (1e18, SGD | {"learning_rate": 1e21}),
        (1e18, SGD | {"learning_rate": 1e5, "lora_plus_ratio": 1e16}),
        (1e18, SGD | {"learning_rate": 1e-30, "momentum": 0.9, "weight_decay": 1e37}),
    ],
)
def test_overflow_is_detected_before_the_step(gradient, options):
    adapter = new_adapter()
    adapter.p.fill_(100)
    adapter.g.fill_(gradient)
    config = OptimizerConfig(**options)

    sizes = sizes_of(adapter, config)
    assert not stays_finite(adapter, config, learning_rate=config.learning_rate, sizes=sizes)
    optimizer_step(adapter, config, step=1, learning_rate=config.learning_rate, norm=sizes.norm)
    assert not (torch.isfinite(adapter.p).all() and torch.isfinite(adapter.m).all())


@pytest.mark.parametrize("options", [{"learning_rate": 1e39}, {"learning_rate": 1e-40, "weight_decay": 1e39}])
def test_sgd_factor_outside_fp32_is_detected_before_the_step(options):
    adapter = new_adapter()
    adapter.p.fill_(1e-20)
    adapter.g.fill_(1e-20)
    config = OptimizerConfig(kind="sgd", **options)
    sizes = sizes_of(adapter, config)

    assert not stays_finite(adapter, config, learning_rate=config.learning_rate, sizes=sizes)
    with pytest.raises(RuntimeError, match="without overflow"):
        optimizer_step(adapter, config, step=1, learning_rate=config.learning_rate, norm=sizes.norm)


@pytest.mark.parametrize(
    "config",
    [
        *(OptimizerConfig(learning_rate=1e-3, max_grad_norm=norm) for norm in (None, 1.0, 1e38)),
        OptimizerConfig(kind="sgd", learning_rate=0.1, momentum=0.9, max_grad_norm=None),
    ],
)
def test_usual_rate_stays_finite_with_a_large_gradient(config):
    adapter = new_adapter()
    adapter.g.fill_(1e18)

    assert stays_finite(adapter, config, learning_rate=config.learning_rate, sizes=sizes_of(adapter, config))


def test_compute_copy_is_updated_with_the_master_weights():
    adapter = new_adapter(torch.bfloat16)
    adapter.g.fill_(1)
    config = OptimizerConfig(learning_rate=0.1)
    optimizer_step(adapter, config, step=1, learning_rate=0.1, norm=sizes_of(adapter, config).norm)
    assert torch.equal(adapter.compute, adapter.p.bfloat16())
    assert adapter.sites["b"].a_RD.dtype == torch.bfloat16


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_non_finite_or_overflowing_gradient_is_detected_in_its_norm(value):
    adapter = new_adapter()
    adapter.g[7] = value
    config = OptimizerConfig(learning_rate=0.1)
    assert not stays_finite(adapter, config, learning_rate=0.1, sizes=sizes_of(adapter, config))


@pytest.mark.parametrize("warmup_steps", [0, 3])
@pytest.mark.parametrize("kind", ["constant", "linear", "cosine", "wsd"])
def test_schedules_equal_those_of_transformers_without_their_first_step(kind, warmup_steps):
    decay_steps = 4 if kind == "wsd" else 0
    schedule = ScheduleConfig(kind=kind, warmup_steps=warmup_steps, decay_steps=decay_steps, num_steps=10)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    make = {
        "constant": lambda: get_constant_schedule_with_warmup(optimizer, warmup_steps + 1),
        "linear": lambda: get_linear_schedule_with_warmup(optimizer, warmup_steps + 1, 11),
        "cosine": lambda: get_cosine_schedule_with_warmup(optimizer, warmup_steps + 1, 11),
    }
    make["wsd"] = lambda: get_wsd_schedule(optimizer, warmup_steps + 1, 4, 11, decay_type="linear")
    reference = make[kind]()
    optimizer.step()
    reference.step()  # skips their step at learning rate 0
    for step in range(1, 11):
        rate = learning_rate_at(step, peak=0.5, schedule=schedule)
        assert rate == pytest.approx(reference.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        reference.step()


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
def test_every_step_of_every_job_has_a_learning_rate_above_zero(kind):
    for num_steps in (1, 2, 3, 10):
        for warmup_steps in range(num_steps + 1):
            schedule = ScheduleConfig(kind=kind, warmup_steps=warmup_steps, num_steps=num_steps)
            assert all(learning_rate_at(step, peak=1, schedule=schedule) > 0 for step in range(1, num_steps + 1))
            longest = replace(schedule, kind="wsd", decay_steps=num_steps - warmup_steps)
            assert all(learning_rate_at(step, peak=1, schedule=longest) > 0 for step in range(1, num_steps + 1))


def test_wsd_keeps_the_peak_then_decays_linearly_to_zero_past_the_end():
    schedule = ScheduleConfig(kind="wsd", warmup_steps=1, decay_steps=4, num_steps=8)
    rates = [learning_rate_at(step, peak=1, schedule=schedule) for step in range(1, 9)]
    assert rates == [0.5, 1, 1, 1, 1, 0.75, 0.5, 0.25]


def test_flat_adapter_has_exact_size_and_the_initialization_of_peft():
    adapter = new_adapter()
    assert adapter.num_parameters == 3 * (12 + 8) + 3 * (4 + 20)
    assert float(adapter.sites["a"].a_RD.abs().max()) <= 12**-0.5
    assert float(adapter.sites["a"].a_RD.std()) == pytest.approx(12**-0.5 / 3**0.5, rel=0.3)
    assert not adapter.sites["a"].b_OR.any()
    assert adapter.sites["a"].grad_b_OR.data_ptr() == adapter.g[3 * (12 + 4) :].data_ptr()


def test_initial_weights_depend_on_seed_and_module_name_alone():
    alone = FlatAdapter(TARGETS[1:], LoraConfig(rank=3, alpha=6), dtype=torch.float32, device="cpu")
    alone.initialize(1)
    assert torch.equal(alone.sites["b"].a_RD, new_adapter().sites["b"].a_RD)
    alone.initialize(2)
    assert not torch.equal(alone.sites["b"].a_RD, new_adapter().sites["b"].a_RD)
