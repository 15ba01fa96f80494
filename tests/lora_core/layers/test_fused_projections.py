"""Linears of one input as one autograd node: exact gradients, and one joint A matrix per adapter where possible."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from lora_core.adapter.flat_adapter import AdaptedModule, FlatAdapter, JointViews, SiteViews
from lora_core.adapter.slice_gradients import with_own_gradient
from lora_core.base_model import patching
from lora_core.config import LoraConfig
from lora_core.engine.engine import Engine
from lora_core.engine_config import EngineConfig
from lora_core.layers.fused_projections import JointPiece, PackedSiblings, Shares, find_siblings
from lora_core.layers.lora_linear import Piece, PlainWeight
from lora_core.packing.packed_batch import DropoutKey
from tests.lora_core.scenarios import Submission, admit, methods, submissions, weights

T, D, OUTS, R = 7, 5, (6, 4), 2
MODULES = ("block.q_proj", "block.k_proj")


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def joint_piece(start: int, stop: int, a_SD: Tensor, b: list[Tensor]) -> JointPiece:
    grad_a_SD = torch.zeros_like(a_SD)
    parts = [
        (
            index,
            slice(index * R, index * R + R),
            SiteViews(
                a_RD=a_SD[index * R :][:R],
                b_OR=b_OR,
                grad_a_RD=grad_a_SD[index * R :][:R],
                grad_b_OR=torch.zeros_like(b_OR),
                scale=0.7,
            ),
        )
        for index, b_OR in enumerate(b)
    ]
    joint = JointViews(a_SD=a_SD, grad_a_SD=grad_a_SD, scale=0.7, parts=tuple(parts))
    return JointPiece(start=start, stop=stop, joint=joint)


def single_piece(start: int, stop: int, a_RD: Tensor, b_OR: Tensor) -> Piece:
    views = SiteViews(
        a_RD=a_RD, b_OR=b_OR, grad_a_RD=torch.zeros_like(a_RD), grad_b_OR=torch.zeros_like(b_OR), scale=0.3
    )
    key = DropoutKey(probability=0.4, seed=1, step=0, slice_index=0)
    return Piece(start=start, stop=stop, views=views, module=MODULES[1], dropout=key)


class ThroughAutograd(torch.autograd.Function):
    """The sibling linears as a function of x and all adapters, so that gradcheck covers every gradient."""

    @staticmethod
    def forward(ctx, linears, x, *adapters):
        a_SD, first_b, second_b, a_RD, b_OR = (adapter.detach() for adapter in adapters)
        joint, single = joint_piece(0, 3, a_SD, [first_b, second_b]), single_piece(3, 6, a_RD, b_OR)
        leaf = torch.zeros((), dtype=torch.float64, requires_grad=True)
        with torch.enable_grad():
            ctx.x = x.detach().requires_grad_()
            shares = Shares(joint=(joint,), single=((1, (single,)),))  # row 6 has no adapter
            ctx.outputs = PackedSiblings.apply(ctx.x, leaf, linears, shares)
        of_parts = [views.grad_b_OR for _, _, views in joint.joint.parts]
        ctx.held = [joint.joint.grad_a_SD, *of_parts, single.views.grad_a_RD, single.views.grad_b_OR]
        return tuple(output.detach() for output in ctx.outputs)

    @staticmethod
    def backward(ctx, *grad_outputs):
        (dx,) = torch.autograd.grad(ctx.outputs, ctx.x, grad_outputs, retain_graph=True)
        gradients = [gradient.clone() for gradient in ctx.held]
        for gradient in ctx.held:
            gradient.zero_()
        return None, dx, *gradients


def test_gradients_of_input_and_adapters_pass_gradcheck_in_float64():
    torch.manual_seed(1)
    linears = tuple(PlainWeight(weight_OD=numbers(out, D), bias_O=numbers(out)) for out in OUTS)
    shapes = [(T, D), (2 * R, D), (OUTS[0], R), (OUTS[1], R), (R, D), (OUTS[1], R)]
    inputs = [numbers(*shape).requires_grad_() for shape in shapes]

    assert torch.autograd.gradcheck(lambda *given: ThroughAutograd.apply(linears, *given), inputs)


def adapter_of(**options) -> FlatAdapter:
    targets = tuple(AdaptedModule(name=name, in_features=8, out_features=6) for name in MODULES)
    frozen = {name: torch.randn(6, 8) for name in MODULES}
    return FlatAdapter(
        targets, LoraConfig(rank=2, alpha=4, **options), dtype=torch.bfloat16, device="cpu", frozen=frozen
    )


def test_joint_views_use_the_vectors_of_the_adapter_and_of_its_twin():
    adapter = adapter_of(rank_pattern=((r"k_proj", 4),), alpha_pattern=((r"k_proj", 8),))
    twin = with_own_gradient(adapter)
    adapter.compute.copy_(torch.arange(adapter.num_parameters))

    joint, of_twin = adapter.joint(MODULES), twin.joint(MODULES)

    assert joint is not None
    assert of_twin is not None
    assert torch.equal(joint.a_SD.flatten(), adapter.compute[: 6 * 8])
    joint.grad_a_SD.fill_(1)
    of_twin.grad_a_SD.fill_(2)
    assert adapter.g[: adapter.num_a].eq(1).all()
    assert twin.g[: adapter.num_a].eq(2).all()
    assert [ranks for _, ranks, _ in joint.parts] == [slice(0, 2), slice(2, 6)]


@pytest.mark.parametrize(
    "options",
    [{"use_dora": True}, {"init_lora_weights": "pissa"}, {"alpha_pattern": ((r"k_proj", 6.0),)}],
    ids=["another norm", "subtracted initialization", "other scales"],
)
def test_adapters_without_a_joint_matrix_run_linear_by_linear(options):
    assert adapter_of(**options).joint(MODULES) is None


def test_only_complete_sets_of_plain_linears_are_siblings():
    names = ("a.q_proj", "a.k_proj", "a.v_proj", "b.q_proj", "b.k_proj", "c.gate_proj", "c.up_proj")
    linears: dict[str, nn.Module] = {name: nn.Linear(4, 4) for name in names}

    assert [siblings.modules for siblings in find_siblings(linears).values()] == [names[:3], names[5:]]


def mixed() -> dict[str, Submission]:
    name, plain = next(iter(submissions("llama").items()))
    attention = replace(plain.config.lora, target_modules=("q_proj", "v_proj", "down_proj"))
    others = {"attention": replace(plain, config=replace(plain.config, lora=attention))}
    return methods() | {name: plain} | others


def test_siblings_train_like_separate_linears(load, monkeypatch):
    ahead = train_all(Engine(load("llama"), EngineConfig(token_budget=4096)))

    monkeypatch.setattr(patching, "find_siblings", lambda _: {})
    one_by_one = train_all(Engine(load("llama"), EngineConfig(token_budget=4096)))

    for name, expected in one_by_one.items():
        torch.testing.assert_close(ahead[name], expected, rtol=1e-4, atol=1e-5, msg=name)


def train_all(engine: Engine) -> dict[str, Tensor]:
    for name, submission in mixed().items():
        admit(engine, name, submission)
    while not engine.idle:
        engine.tick()
    return {name: weights(engine, name).clone() for name in engine.jobs()}
