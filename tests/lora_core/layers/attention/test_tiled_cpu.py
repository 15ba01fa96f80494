"""Query-chunked attention equals textbook attention: values, gradients, saved tensors and peak memory."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from lora_core.kernels.numba_jit import compiled, hyperbolic_tangent
from lora_core.layers.attention import tiled_cpu
from lora_core.layers.attention.dense_cpu import UNLIMITED
from lora_core.layers.attention.packed import NAME, attend, register
from lora_core.layers.attention.tiled_cpu import Scoring, attend_in_strips, strips
from tests.tiny_models import HEADS, save
from tests.worker.session.test_counted_memory import measured_peak

SIGHTS = {"causal": (True, None), "window": (True, 20), "narrow": (True, 1), "both ways": (False, None)}
SIGHTS |= {"window both ways": (False, 7)}
GROUPS = {"grouped": (6, 2), "equal": (3, 3), "one key head": (4, 1)}
CPU = torch.device("cpu")


def written_down(q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> Tensor:
    """Textbook attention in float64, differentiated by torch."""
    q, k, v = q.double(), *(part.double().repeat_interleave(len(q) // len(k), 0) for part in (k, v))
    scores = scoring.scale * q @ k.transpose(1, 2)
    if scoring.softcap is not None:
        scores = scoring.softcap * torch.tanh(scores / scoring.softcap)
    position = torch.arange(q.shape[1])
    distance = position[:, None] - position
    hidden = distance.abs() >= scoring.window
    return scores.masked_fill(hidden | (distance < 0) if scoring.causal else hidden, float("-inf")).softmax(-1) @ v


def inputs(groups: str, num_tokens: int, dtype: torch.dtype, size: int = 8) -> list[Tensor]:
    """Return the heads of one sequence, and the gradient of the output."""
    generator = torch.Generator().manual_seed(1)
    num_heads, num_key_heads = GROUPS[groups]
    sizes = (num_heads, size), (num_key_heads, size), (num_key_heads, size + 4), (num_heads, size + 4)
    rows = [torch.randn(num_tokens, heads, width, generator=generator).to(dtype) for heads, width in sizes]
    return [*(row.transpose(0, 1).requires_grad_() for row in rows[:3]), rows[3].transpose(0, 1)]


def with_gradients(attended, tensors: list[Tensor], scoring: Scoring) -> list[Tensor]:
    *heads, received = tensors
    output = attended(*heads, scoring)
    return [output.detach(), *torch.autograd.grad(output, heads, received.to(output.dtype))]


@pytest.fixture(params=[1, 1 << 21], ids=["many chunks", "one chunk"])
def strip_numbers(request, monkeypatch) -> int:
    monkeypatch.setitem(tiled_cpu.STRIP_NUMBERS, "cpu", request.param)
    return request.param


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("num_tokens", [1, 17, 70])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("sees", SIGHTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_values_and_gradients_equal_those_of_torch(strip_numbers, dtype, sees, softcap, num_tokens, groups):
    causal, window = SIGHTS[sees]
    scoring = Scoring(scale=0.4, causal=causal, window=window or UNLIMITED, softcap=softcap)
    tensors = inputs(groups, num_tokens, dtype)

    found = with_gradients(attend_in_strips, tensors, scoring)

    allowed = 1e-12 if dtype == torch.float64 else 2e-6
    for ours, exact in zip(found, with_gradients(written_down, tensors, scoring), strict=True):
        torch.testing.assert_close(ours.double(), exact.double(), rtol=10 * allowed, atol=allowed)


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_bfloat16_differs_only_by_rounding(strip_numbers, softcap):
    scoring = Scoring(scale=0.4, causal=True, window=40, softcap=softcap)
    tensors = inputs("grouped", 90, torch.bfloat16)

    found = with_gradients(attend_in_strips, tensors, scoring)

    for ours, exact in zip(found, with_gradients(written_down, tensors, scoring), strict=True):
        assert ours.dtype == torch.bfloat16
        assert float((ours.double() - exact).norm() / exact.double().norm()) < 0.008  # half a unit is 0.002


@pytest.mark.parametrize("causal", [True, False])
def test_gradients_pass_gradcheck_in_float64(monkeypatch, causal):
    monkeypatch.setitem(tiled_cpu.STRIP_NUMBERS, "cpu", 1)
    heads = inputs("grouped", 37, torch.float64, size=3)[:3]
    scoring = Scoring(scale=0.5, causal=causal, window=11, softcap=1.2)

    assert torch.autograd.gradcheck(lambda q, k, v: attend_in_strips(q, k, v, scoring), heads, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_bit_depends_on_the_position_in_a_pack(strip_numbers, dtype):
    scoring = Scoring(scale=0.4, causal=True, window=30, softcap=1.5)
    alone = inputs("grouped", 75, dtype)
    in_pack = [torch.randn(len(part), 203, part.shape[2]).to(dtype) for part in alone]
    for pack, part in zip(in_pack, alone, strict=True):
        pack[:, 61:136] = part.detach()
    inside = [pack[:, 61:136].requires_grad_() for pack in in_pack]

    found = with_gradients(attend_in_strips, inside, scoring)

    for one, other in zip(found, with_gradients(attend_in_strips, alone, scoring), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("options", [{"softcap": 2.0}, {"window": 100}, {"dtype": torch.float64}, {"head": 12}])
def test_saved_tensors_do_not_grow_with_the_square_of_a_row(options):
    """Cases: capped scores, a window, a dtype without compiled loops, and values of a different width than keys."""
    dtype, width = options.get("dtype", torch.bfloat16), options.get("head", 8)
    scores = {"scale": 0.4, "causal": True, "window": options.get("window"), "softcap": options.get("softcap")}

    kept = {}
    for num_tokens in (1056, 2112):
        q, k = (torch.randn(2, num_tokens, 8).to(dtype).requires_grad_() for _ in range(2))
        saved = kept[num_tokens] = {}

        def note(tensor: Tensor, saved=saved) -> Tensor:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            attend(q, k, torch.randn(2, num_tokens, width).to(dtype).requires_grad_(), **scores)

    assert 0 < sum(kept[2112].values()) <= 2 * sum(kept[1056].values())


@pytest.mark.parametrize("window", [UNLIMITED, 64])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_pass_needs_a_few_times_the_memory_of_one_chunk(monkeypatch, dtype, window):
    num_numbers, num_heads, num_tokens = 1 << 16, 4, 1024
    monkeypatch.setitem(tiled_cpu.STRIP_NUMBERS, "cpu", num_numbers)
    q, k, v = (torch.randn(num_heads, num_tokens, 8).to(dtype).requires_grad_() for _ in range(3))
    scoring = Scoring(scale=0.4, causal=True, window=window, softcap=2.0)

    peak = measured_peak(lambda: attend_in_strips(q, k, v, scoring).sum().backward())

    rows = 20 * q.numel() * torch.promote_types(torch.float32, dtype).itemsize
    assert peak < 8 * 2 * num_numbers * dtype.itemsize + rows
    assert peak < 0.7 * num_heads * num_tokens**2 * dtype.itemsize


def test_chunks_cover_every_query_once_and_every_key_that_it_sees(strip_numbers):
    for num_tokens in (1, 16, 17, 250):
        for causal, window in SIGHTS.values():
            scoring = Scoring(scale=1.0, causal=causal, window=window or UNLIMITED)
            found = list(strips(num_tokens, 4, scoring, CPU))
            assert [token for strip in found for token in range(strip.start, strip.stop)] == list(range(num_tokens))
            for strip in found:
                reach = min(window or num_tokens, num_tokens)
                assert strip.first <= max(0, strip.start - reach + 1)
                assert strip.last >= (strip.stop if causal else min(num_tokens, strip.stop - 1 + reach))


def test_hyperbolic_tangent_is_off_by_at_most_four_units_and_keeps_nan():
    @compiled
    def each(numbers, found):
        for index in range(numbers.size):
            found[index] = hyperbolic_tangent(numbers[index])

    x = torch.cat([torch.logspace(-20, 1.5, 20_001), torch.tensor([0.0, float("inf"), float("nan")])])
    x = torch.cat([x, -x])
    found = torch.empty_like(x)

    each(x.numpy(), found.numpy())

    exact = torch.tanh(x.double())
    assert torch.equal(found.isnan(), x.isnan())
    is_number = ~x.isnan()
    assert bool(((found.double() - exact).abs()[is_number] <= 4 * 2**-23 * exact.abs()[is_number]).all())


@pytest.fixture(scope="module")
def gemma2(tmp_path_factory) -> Path:
    """A Gemma 2 base with a window in one of two layers, and scores large enough for the cap."""
    options = HEADS | {"sliding_window": 40, "query_pre_attn_scalar": 1, "attn_logit_softcapping": 1.5}
    return save("gemma2", tmp_path_factory.mktemp("gemma2") / "base", **options)


def test_gemma_2_gives_the_logits_and_gradients_of_transformers(gemma2, strip_numbers):
    ours, theirs = (AutoModelForCausalLM.from_pretrained(gemma2, attn_implementation="eager").eval() for _ in range(2))
    register()
    ours.set_attn_implementation(NAME)
    assert theirs.config.layer_types == ["sliding_attention", "full_attention"]
    ids = torch.randint(3, 300, (1, 150), generator=torch.Generator().manual_seed(3))
    table = theirs.get_input_embeddings().weight[ids].detach()  # pyright: ignore[reportIndexIssue]

    found = []
    for model in (ours, theirs):
        embedded = table.clone().requires_grad_()
        logits = model(inputs_embeds=embedded, use_cache=False).logits
        found.append((logits.detach(), *torch.autograd.grad(logits.square().mean(), embedded)))

    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()))
