"""Adafactor on the flat adapter equals torch's for each matrix. Its state is small and resumes exactly."""

from dataclasses import replace

import pytest
import torch

from lora_core.adapter.flat_adapter import AdaptedModule, FlatAdapter
from lora_core.adapter.modules_to_save import TrainedTensor, TrainedTensors
from lora_core.adapter.optimizer import StepSizes, optimizer_step, stays_finite, step_sizes
from lora_core.config import LoraConfig, OptimizerConfig
from lora_core.engine.engine import Engine
from lora_core.engine_config import EngineConfig
from lora_core.events import JobStepped
from tests.lora_core.scenarios import Submission, admit, config, dataset, run_alone, state_bytes

TARGETS = (
    AdaptedModule(name="a", in_features=12, out_features=8),
    AdaptedModule(name="b", in_features=4, out_features=20),
)
HEAD = TrainedTensors(
    tensors=(
        TrainedTensor(name="head.weight", shape=(5, 8), start=lambda _seed: torch.full((5, 8), 0.3)),
        TrainedTensor(name="head.bias", shape=(5,), start=lambda _seed: torch.zeros(5)),
    ),
    modules=("head",),
)
USUAL = OptimizerConfig(kind="adafactor", learning_rate=0.05, max_grad_norm=None)


def new_adapter(*, use_dora: bool = True, rank: int = 3) -> FlatAdapter:
    frozen = {target.name: torch.randn(target.out_features, target.in_features) for target in TARGETS}
    lora = LoraConfig(rank=rank, alpha=6, use_dora=use_dora)
    adapter = FlatAdapter(
        TARGETS, lora, dtype=torch.float32, device="cpu", frozen=frozen, trained=HEAD, optimizer="adafactor"
    )
    adapter.initialize(1)
    return adapter


def parameters(adapter: FlatAdapter) -> list[torch.nn.Parameter]:
    """Return each tensor of the flat adapter as a separate parameter, as in a usual training loop."""
    return [torch.nn.Parameter(adapter.p[block.numbers].view(block.shape).clone()) for block in adapter.blocks]


def flat(tensors: list[torch.nn.Parameter]) -> torch.Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


@pytest.mark.parametrize(
    ("options", "gradient_size"),
    [
        ({}, 1.0),
        ({"weight_decay": 0.1, "max_grad_norm": 0.5}, 1.0),
        ({"learning_rate": 5.0, "beta2_decay": -0.5, "clip_threshold": 1.5, "scale_floor": 0.02}, 1.0),
        ({}, 1e-6),
        ({}, 1e-15),
    ],
    ids=["usual", "decay and clip", "custom options", "gradients near epsilon", "gradients far below epsilon"],
)
@pytest.mark.parametrize("rank", [1, 3])
def test_steps_equal_torch_adafactor_with_separate_learning_rates(options, gradient_size, rank):
    torch.manual_seed(0)
    adapter = new_adapter(rank=rank)
    numbers = replace(USUAL, lora_plus_ratio=4, **options)
    tensors = parameters(adapter)
    ratios = [1.0] * 2 + [4.0] * 4 + [1.0] * 2  # two A, two B, two magnitudes, head and bias
    groups = [
        {"params": [tensor], "lr": numbers.learning_rate * ratio} for tensor, ratio in zip(tensors, ratios, strict=True)
    ]
    reference = torch.optim.Adafactor(
        groups,
        beta2_decay=numbers.beta2_decay,
        eps=(None, numbers.scale_floor),
        d=numbers.clip_threshold,
        weight_decay=numbers.weight_decay,
    )
    for step in range(1, 8):
        adapter.g.copy_(torch.randn(adapter.num_parameters) * gradient_size * step)
        for tensor, block in zip(tensors, adapter.blocks, strict=True):
            tensor.grad = adapter.g[block.numbers].view(block.shape).clone()
        sizes = StepSizes.of(step_sizes(adapter, numbers, learning_rate=numbers.learning_rate))
        assert stays_finite(adapter, numbers, learning_rate=numbers.learning_rate, sizes=sizes)
        optimizer_step(adapter, numbers, step=step, learning_rate=numbers.learning_rate, norm=sizes.norm)
        if numbers.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(tensors, numbers.max_grad_norm)
        reference.step()
        torch.testing.assert_close(adapter.p, flat(tensors), rtol=2e-5, atol=1e-6)
        assert not adapter.g.any()
    assert not torch.equal(flat(parameters(new_adapter(rank=rank))), adapter.p)


def test_state_is_factored_for_matrices_full_for_vectors_without_momentum():
    adapter = new_adapter()

    matrices = (3 + 12) + (3 + 4) + (8 + 3) + (20 + 3) + (5 + 8)
    vectors = 8 + 20 + 5
    assert adapter.v.numel() == matrices + vectors
    assert adapter.m.numel() == 0
    norms_and_factors = 2 * (8 + 20)
    assert adapter.num_bytes == 4 * (2 * adapter.num_parameters + adapter.v.numel() + norms_and_factors)


@pytest.mark.parametrize(
    "options",
    [{"learning_rate": 1e30, "weight_decay": 0.1}, {"scale_floor": 1e38, "learning_rate": 1.0}],
    ids=["weight decay factor", "unclipped step size"],
)
def test_adafactor_overflow_is_detected_before_the_step(options):
    adapter = new_adapter(use_dora=False)
    adapter.p.fill_(1e36)
    adapter.g[::7] = -1.0  # part of each matrix, with updates above the mean
    numbers = replace(USUAL, clip_threshold=20.0, **options)
    sizes = StepSizes.of(step_sizes(adapter, numbers, learning_rate=numbers.learning_rate))

    assert not stays_finite(adapter, numbers, learning_rate=numbers.learning_rate, sizes=sizes)
    for _ in range(3):
        adapter.g[::7] = -1.0
        optimizer_step(adapter, numbers, step=1, learning_rate=numbers.learning_rate, norm=sizes.norm)
    assert not torch.isfinite(adapter.p).all()


@pytest.mark.parametrize("size", [1e-30, 1e-9, 1e9, 1e17])
def test_gradients_with_a_finite_norm_survive_intermediate_overflow(size):
    """The direction is kept. At 1e10 the product of rows and columns alone would be infinite, and the step zero."""
    torch.manual_seed(0)
    adapter = new_adapter(use_dora=False)
    before = adapter.p.clone()
    adapter.g.copy_(torch.randn(adapter.num_parameters) * size)
    signs = adapter.g.sign()
    sizes = StepSizes.of(step_sizes(adapter, USUAL, learning_rate=0.05))

    assert stays_finite(adapter, USUAL, learning_rate=0.05, sizes=sizes)
    optimizer_step(adapter, USUAL, step=1, learning_rate=0.05, norm=sizes.norm)

    assert torch.isfinite(adapter.p).all()
    assert torch.isfinite(adapter.v).all()
    if size >= 1e-9:
        assert torch.equal((before - adapter.p).sign()[adapter.num_ab :], signs[adapter.num_ab :])


def job() -> Submission:
    plain = config(rank=3, dropout=0.1, batch_size=2, num_steps=6, seed=3, slice_tokens=30)
    numbers = OptimizerConfig(kind="adafactor", learning_rate=0.5, lora_plus_ratio=2.0, scale_floor=0.1)
    return Submission(config=replace(plain, optimizer=numbers), train=dataset(3, [14, 9, 22, 31]))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_job_resumed_at_any_step_ends_with_the_same_bytes(load, tmp_path, dtype):
    base = load("llama", dtype)
    uninterrupted = run_alone(base, job())

    for stop in range(1, 6):
        engine = Engine(base, EngineConfig())
        admit(engine, "job", job())
        while engine.progress("job")[0] < stop:
            engine.tick()
        engine.save_checkpoint("job", tmp_path / f"{stop}")
        resumed = Engine(base, EngineConfig(token_budget=64))
        admit(resumed, "job", job(), resume_from=tmp_path / f"{stop}")
        while not resumed.idle:
            resumed.tick()

        assert state_bytes(resumed, "job") == uninterrupted.vectors


def test_adafactor_reduces_the_loss(load):
    long = replace(config(rank=3, batch_size=2, num_steps=25), optimizer=job().config.optimizer)

    events = run_alone(load("llama"), Submission(config=long, train=dataset(3, [14, 9]))).events

    losses = [event.loss for event in events if isinstance(event, JobStepped)]
    assert losses[-1] < 0.5 * losses[0]
