"""The hand-written gradients match the formula, checked by finite differences in float64."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lora_core.adapter.flat_adapter import MagnitudeViews, SiteViews, weight_norms
from lora_core.layers.lora_linear import PackedDelta, PackedLinear, Piece, PlainWeight
from lora_core.packing.packed_batch import DropoutKey

T, D, OUT, R = 7, 5, 6, 3


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def piece(start: int, stop: int, a_RD: Tensor, b_OR: Tensor, dropout: float, seed: int) -> Piece:
    views = SiteViews(
        a_RD=a_RD, b_OR=b_OR, grad_a_RD=torch.zeros_like(a_RD), grad_b_OR=torch.zeros_like(b_OR), scale=0.7
    )
    key = DropoutKey(probability=dropout, seed=seed, step=0, slice_index=0) if dropout else None
    return Piece(start=start, stop=stop, views=views, module="layer", dropout=key)


def dora_piece(start: int, stop: int, adapter: list[Tensor], dropout: float, norm_O: Tensor) -> Piece:
    plain = piece(start, stop, adapter[0], adapter[1], dropout, seed=start)
    m_O = adapter[2]
    magnitude = MagnitudeViews(m_O=m_O, grad_O=torch.zeros_like(m_O), norm_O=norm_O, factor_O=m_O / norm_O)
    return replace(plain, views=replace(plain.views, magnitude=magnitude))


class ThroughAutograd(torch.autograd.Function):
    """The packed linear as a function of x and all adapters, so that gradcheck covers every gradient."""

    @staticmethod
    def forward(ctx, make, x, *adapters):
        with torch.enable_grad():
            ctx.x = x.detach().requires_grad_()
            ctx.pieces, ctx.y = make(ctx.x, [adapter.detach() for adapter in adapters])
        return ctx.y.detach()

    @staticmethod
    def backward(ctx, *grad_outputs):
        (dx,) = torch.autograd.grad(ctx.y, ctx.x, grad_outputs[0], retain_graph=True)
        held = [gradient for part in ctx.pieces for gradient in gradients_of(part)]
        gradients = [gradient.clone() for gradient in held]
        for gradient in held:
            gradient.zero_()
        return None, dx, *gradients


def gradients_of(part: Piece) -> tuple[Tensor, ...]:
    magnitude = part.views.magnitude
    return part.views.grad_a_RD, part.views.grad_b_OR, *((magnitude.grad_O,) if magnitude else ())


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("fused", [True, False])
def test_gradients_of_input_and_adapters_pass_gradcheck_in_float64(fused, dropout):
    torch.manual_seed(1)
    weight_OD, bias_O = numbers(OUT, D), numbers(OUT)
    leaf = torch.zeros((), dtype=torch.float64, requires_grad=True)

    def make(x, adapters):
        pieces = (
            piece(0, 3, adapters[0], adapters[1], dropout, seed=1),
            piece(3, 6, adapters[2], adapters[3], dropout, seed=2),  # row 6 has no adapter
        )
        if fused:
            return pieces, PackedLinear.apply(x, leaf, PlainWeight(weight_OD=weight_OD, bias_O=bias_O), pieces)
        return pieces, PackedDelta.apply(x @ weight_OD.T + bias_O, x, leaf, pieces)

    inputs = [numbers(T, D), numbers(R, D), numbers(OUT, R), numbers(R, D), numbers(OUT, R)]
    inputs = [tensor.requires_grad_() for tensor in inputs]
    assert torch.autograd.gradcheck(lambda *args: ThroughAutograd.apply(make, *args), inputs)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("with_bias", [True, False])
def test_gradients_with_magnitudes_pass_gradcheck_at_a_fixed_norm(with_bias, dropout):
    torch.manual_seed(3)
    weight_OD, norms = numbers(OUT, D), [1 + numbers(OUT).abs() for _ in range(2)]
    plain = PlainWeight(weight_OD=weight_OD, bias_O=numbers(OUT) if with_bias else None)
    leaf = torch.zeros((), dtype=torch.float64, requires_grad=True)

    def make(x, adapters):
        pieces = (
            dora_piece(0, 3, adapters[:3], dropout, norms[0]),
            dora_piece(3, 5, adapters[3:6], dropout, norms[1]),
            piece(5, 6, adapters[6], adapters[7], dropout, seed=3),
        )
        return pieces, PackedLinear.apply(x, leaf, plain, pieces)

    adapter = [numbers(R, D), numbers(OUT, R), numbers(OUT)]
    inputs = [numbers(T, D), *adapter, *(numbers(*part.shape) for part in adapter), numbers(R, D), numbers(OUT, R)]
    inputs = [tensor.requires_grad_() for tensor in inputs]
    assert torch.autograd.gradcheck(lambda *args: ThroughAutograd.apply(make, *args), inputs)


def test_dora_output_equals_that_of_merged_weights():
    torch.manual_seed(4)
    x, weight_OD, bias_O = numbers(T, D).float(), numbers(OUT, D).float(), numbers(OUT).float()
    a_RD, b_OR, m_O = numbers(R, D).float(), numbers(OUT, R).float(), numbers(OUT).float()
    merged_OD = weight_OD + 0.7 * b_OR @ a_RD
    norm_O = weight_norms(weight_OD, piece(0, T, a_RD, b_OR, 0.0, seed=0).views)
    part = dora_piece(2, 5, [a_RD, b_OR, m_O], 0.0, norm_O)

    y = PackedLinear.apply(x, None, PlainWeight(weight_OD=weight_OD, bias_O=bias_O), (part,))

    expected = x @ weight_OD.T + bias_O
    expected[2:5] = x[2:5] @ (m_O / merged_OD.norm(dim=1) * merged_OD.T) + bias_O
    torch.testing.assert_close(y, expected)


def test_output_matches_the_formula():
    torch.manual_seed(2)
    x, weight_OD, a_RD, b_OR = numbers(T, D), numbers(OUT, D), numbers(R, D), numbers(OUT, R)

    y = PackedLinear.apply(
        x, None, PlainWeight(weight_OD=weight_OD, bias_O=None), (piece(2, 5, a_RD, b_OR, 0.0, seed=0),)
    )

    expected = x @ weight_OD.T
    expected[2:5] += 0.7 * x[2:5] @ a_RD.T @ b_OR.T
    torch.testing.assert_close(y, expected)


def test_gradients_accumulate_over_slices_without_a_weight_gradient():
    weight_OD = numbers(OUT, D).requires_grad_()
    part = piece(0, T, numbers(R, D), numbers(OUT, R), 0.0, seed=0)
    leaf = torch.zeros((), dtype=torch.float64, requires_grad=True)
    x, plain = numbers(T, D), PlainWeight(weight_OD=weight_OD, bias_O=None)

    PackedLinear.apply(x, leaf, plain, (part,)).sum().backward()
    once = part.views.grad_a_RD.clone()
    PackedLinear.apply(x, leaf, plain, (part,)).sum().backward()

    torch.testing.assert_close(part.views.grad_a_RD, 2 * once)
    assert weight_OD.grad is None
    assert leaf.grad is None


def test_dropout_depends_only_on_its_key_and_keeps_the_mean():
    key = DropoutKey(probability=0.25, seed=3, step=4, slice_index=5)
    ones = torch.ones(400, 100)

    keep = key.keep_TD("layer", ones)

    assert torch.equal(keep, key.keep_TD("layer", ones))
    assert not torch.equal(keep, key.keep_TD("other", ones))
    dropped = key.dropped(ones, keep)
    assert dropped.unique().tolist() == pytest.approx([0, 1 / 0.75])
    assert float(dropped.mean()) == pytest.approx(1, abs=0.01)


def test_mask_of_a_piece_is_computed_once_for_forward_and_backward(monkeypatch):
    made = []
    original = DropoutKey.keep_TD
    monkeypatch.setattr(
        DropoutKey, "keep_TD", lambda self, module, like: made.append(module) or original(self, module, like)
    )
    part = piece(0, T, numbers(R, D), numbers(OUT, R), 0.5, seed=0)
    x, leaf = numbers(T, D).requires_grad_(), torch.zeros((), dtype=torch.float64, requires_grad=True)

    PackedLinear.apply(x, leaf, PlainWeight(weight_OD=numbers(OUT, D), bias_O=None), (part,)).sum().backward()

    assert made == ["layer"]
    assert x.grad is not None
    assert x.grad.abs().sum() > 0
