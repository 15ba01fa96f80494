"""Grouped segments give the results of the loop in one launch for all segments. CPU kernels replace those of a GPU."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lora_core.adapter.flat_adapter import SiteViews
from lora_core.base_model.model import BaseModel
from lora_core.base_model.patching import Attachment
from lora_core.engine.engine import Engine
from lora_core.engine_config import EngineConfig
from lora_core.events import JobStepped
from lora_core.kernels import selection
from lora_core.kernels.selection import Kernels, choose_kernels
from lora_core.layers.grouped_lora import GroupedLora, width_of
from lora_core.layers.lora_linear import PackedDelta, PackedLinear, Piece, PlainWeight
from lora_core.packing.packed_batch import DropoutKey
from tests.lora_core.scenarios import Submission, config, dataset

T, D, OUT = 48, 32, 40
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
GROUPED = Kernels(lora="grouped_mm")


def piece(start: int, stop: int, rank: int, dtype: torch.dtype, *, trained_rank: int | None = None) -> Piece:
    views = SiteViews(
        a_RD=torch.randn(rank, D).to(dtype),
        b_OR=torch.randn(OUT, rank).to(dtype),
        grad_a_RD=torch.zeros(trained_rank or rank, D),
        grad_b_OR=torch.zeros(OUT, trained_rank or rank),
        scale=0.3 + start / T,
    )
    return Piece(start=start, stop=stop, views=views, module="layer", dropout=None)


def mixed(dtype: torch.dtype) -> tuple[Piece, ...]:
    """Return pieces of equal and unequal ranks, one of a high rank, one half frozen, and gaps without an adapter."""
    return (
        piece(2, 9, 4, dtype),
        piece(9, 14, 8, dtype),
        piece(20, 27, 3, dtype),
        piece(27, 30, 16, dtype),
        piece(30, 41, 10, dtype, trained_rank=5),
        piece(41, 46, 64, dtype),
    )


def gradients_of(pieces: tuple[Piece, ...]) -> list[Tensor]:
    return [gradient for part in pieces for gradient in (part.views.grad_a_RD, part.views.grad_b_OR)]


def computed(
    op: GroupedLora, pieces: tuple[Piece, ...], x_TD: Tensor, dy_TO: Tensor, weight_OD: Tensor, *, fused: bool
) -> list[Tensor]:
    """Return y, dx and the gradients of all pieces, which start from zero."""
    for gradient in gradients_of(pieces):
        gradient.zero_()
    x_TD = x_TD.clone().requires_grad_()
    leaf = torch.zeros((), requires_grad=True)
    alone, runs = op.divide("layer", pieces, x_TD)
    if fused:
        y_TO = PackedLinear.apply(x_TD, leaf, PlainWeight(weight_OD=weight_OD, bias_O=None), alone, runs)
    else:
        y_TO = PackedDelta.apply(x_TD @ weight_OD.T, x_TD, leaf, alone, runs)
    y_TO.backward(dy_TO)
    assert x_TD.grad is not None
    return [y_TO.detach(), x_TD.grad, *(gradient.clone() for gradient in gradients_of(pieces))]


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_segments_give_the_output_and_gradients_of_the_loop(dtype: torch.dtype, fused: bool) -> None:
    torch.manual_seed(0)
    pieces, weight_OD = mixed(dtype), torch.randn(OUT, D).to(dtype)
    x_TD, dy_TO = torch.randn(T, D).to(dtype), torch.randn(T, OUT).to(dtype)

    loop = computed(GroupedLora("loop"), pieces, x_TD, dy_TO, weight_OD, fused=fused)
    grouped = computed(GroupedLora("grouped_mm"), pieces, x_TD, dy_TO, weight_OD, fused=fused)

    for expected, found in zip(loop, grouped, strict=True):
        assert float(expected.abs().max()) > 0
        assert float((found - expected).norm() / expected.norm()) < TOLERANCE[dtype]
    untouched = [*range(2), *range(14, 20), *range(46, T)]
    assert torch.equal(grouped[0][untouched], (x_TD @ weight_OD.T)[untouched])


def test_ranks_of_the_same_width_are_grouped_and_single_ones_loop() -> None:
    pieces = mixed(torch.float32)

    alone, runs = GroupedLora("grouped_mm").divide("layer", pieces, torch.zeros(T, D))

    assert [(run.rows, run.stacks.a_GWD.shape) for run in runs] == [
        (slice(2, 27), (4, 8, D)),  # including the gap, whose rows have zeros
        (slice(27, 41), (2, 16, D)),
    ]
    assert alone == pieces[-1:]
    assert [width_of(rank) for rank in (1, 8, 9, 16, 33, 64, 65, 1024)] == [8, 8, 16, 16, 64, 64, 128, 1024]


def test_dropout_and_odd_sizes_stay_in_the_loop() -> None:
    plain = mixed(torch.float32)
    key = DropoutKey(probability=0.5, seed=0, step=0, slice_index=0)
    odd = tuple(
        replace(part, views=replace(part.views, a_RD=torch.randn(len(part.views.a_RD), D - 1))) for part in plain
    )
    op = GroupedLora("grouped_mm")

    alone, runs = op.divide("layer", (plain[0], replace(plain[1], dropout=key), plain[2]), torch.zeros(T, D))

    assert [part.start for part in alone] == [9]
    assert [(group.start, group.stop, group.rank) for group in runs[0].groups] == [(2, 9, 4), (9, 20, 0), (20, 27, 3)]
    assert op.divide("layer", odd, torch.zeros(T, D - 1)) == (odd, ())
    assert GroupedLora("loop").divide("layer", plain, torch.zeros(T, D)) == (plain, ())


@pytest.mark.parametrize("sick", ["x", "dy", "weights"])
def test_nan_values_of_a_job_do_not_reach_rows_of_other_jobs(sick: str) -> None:
    torch.manual_seed(1)
    dtype = torch.bfloat16
    pieces, weight_OD = mixed(dtype)[:3], torch.randn(OUT, D).to(dtype)
    x_TD, dy_TO = torch.randn(T, D).to(dtype), torch.randn(T, OUT).to(dtype)
    op = GroupedLora("grouped_mm")
    healthy = computed(op, pieces, x_TD, dy_TO, weight_OD, fused=True)

    rows = slice(pieces[1].start, pieces[1].stop)
    {"x": x_TD[rows], "dy": dy_TO[rows], "weights": pieces[1].views.a_RD}[sick].fill_(torch.nan)
    found = computed(op, pieces, x_TD, dy_TO, weight_OD, fused=True)

    others = [row for row in range(T) if not rows.start <= row < rows.stop]
    assert any(bool(tensor.isnan().any()) for tensor in found)
    assert torch.equal(found[0][others], healthy[0][others])
    assert torch.equal(found[1][others], healthy[1][others])
    for index in (2, 3, 6, 7):  # dA and dB of the first and the third
        assert torch.equal(found[index], healthy[index])


def test_padded_weights_are_reused_until_weights_change() -> None:
    pieces, x_TD = mixed(torch.float32)[:3], torch.zeros(T, D)
    op = GroupedLora("grouped_mm")
    first = op.divide("layer", pieces, x_TD)[1][0].stacks

    longer = (replace(pieces[0], start=0), *pieces[1:])  # another slice of the same jobs
    again = op.divide("layer", longer, x_TD)[1][0].stacks
    pieces[1].views.b_OR.add_(1)
    changed = op.divide("layer", pieces, x_TD)[1][0].stacks
    fewer = op.divide("layer", pieces[:2], x_TD)[1][0].stacks

    assert again is first
    assert changed is not first
    assert torch.equal(changed.b_GOW[1], pieces[1].views.b_OR)
    assert len(fewer.a_GWD) == 2


def test_cpu_uses_the_loop_and_reports_no_reason() -> None:
    assert choose_kernels(torch.device("cpu"), torch.bfloat16) == Kernels(lora="loop", reasons=())


@pytest.mark.parametrize(
    ("capability", "dtype", "lora", "reason"),
    [
        ((9, 0), torch.bfloat16, "grouped_mm", None),
        ((10, 0), torch.bfloat16, "grouped_mm", None),
        ((10, 3), torch.bfloat16, "grouped_mm", None),
        ((8, 0), torch.bfloat16, "loop", "compute capability"),
        ((12, 0), torch.bfloat16, "loop", "compute capability"),
        ((9, 0), torch.float32, "loop", "bfloat16"),
    ],
)
def test_gpu_groups_if_its_kernel_can_or_reports_a_reason(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], dtype: torch.dtype, lora: str, reason: str | None
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(selection, "why_not", lambda device: None)

    chosen = choose_kernels(torch.device("cuda:0"), dtype)

    assert chosen.lora == lora
    assert any(reason in given for given in chosen.reasons) if reason else not chosen.reasons


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_grouping_engine_trains_like_a_looping_engine(load: Callable[..., BaseModel], dtype: str) -> None:
    losses = {kernel: trained(load("llama", dtype), Kernels(lora=kernel)) for kernel in ("loop", "grouped_mm")}

    assert losses["loop"].keys() == losses["grouped_mm"].keys()
    for step, loss in losses["loop"].items():
        assert losses["grouped_mm"][step] == pytest.approx(loss, rel=1e-4 if dtype == "float32" else 1e-2)


def trained(base: BaseModel, kernels: Kernels) -> dict[tuple[str, int], float]:
    """Return losses by job and step, of jobs that differ in rank and targets."""
    base.attachment = Attachment(base.model, kernels)
    engine = Engine(base, EngineConfig())
    jobs = {
        "four": Submission(config=config(rank=4, seed=1), train=dataset(1, [7, 12, 30])),
        "eight": Submission(config=config(rank=8, seed=2, targets=("q_proj", "v_proj")), train=dataset(2, [9, 21])),
        "three": Submission(config=config(rank=3, seed=3), train=dataset(3, [14, 15, 6])),
    }
    for name, job in jobs.items():
        engine.admit(name, job.config, job.train)
    losses: dict[tuple[str, int], float] = {}
    while not engine.idle:
        losses |= {(event.job, event.step): event.loss for event in engine.tick() if isinstance(event, JobStepped)}
    return losses
