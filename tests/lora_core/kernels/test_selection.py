"""The kernels that a device gets, and the reason where it does not get the fastest."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from itertools import product

import pytest
import torch

from lora_core.base_model.model import BaseModel
from lora_core.base_model.patching import Attachment
from lora_core.kernels import drawing, selection
from lora_core.kernels.gpu import attention_trial, decoding_trial, elementwise_trial, random_numbers_trial, trials
from lora_core.kernels.gpu.tables import WIDTHS, class_of
from lora_core.kernels.gpu.trials import TRIED
from lora_core.kernels.selection import AttentionHeads, Kernels, choose_kernels, prepare_device

CUDA = torch.device("cuda:0")


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device whose kernels agree with the references."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(trials, "why_lora_differs", lambda device, dtype: None)
    monkeypatch.setattr(decoding_trial, "why_decoding_differs", lambda device, dtype, *, size, is_capped: None)
    monkeypatch.setattr(selection, "why_not_elementwise", lambda device: None)
    monkeypatch.setattr(random_numbers_trial, "why_not_drawn", lambda device: None)
    monkeypatch.setattr(selection, "varlen_parameters", lambda: selection.VARLEN_PARAMETERS)


def test_cpu_uses_the_loop_and_tries_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "why_not_elementwise", lambda device: pytest.fail("a CPU was tried"))
    monkeypatch.setattr(selection, "why_not_tiled", lambda device, dtype: pytest.fail("a CPU was tried"))

    assert choose_kernels(torch.device("cpu"), torch.bfloat16) == Kernels(lora="loop", reasons=())


def test_gpu_uses_the_fastest_kernels_if_they_agree(hopper: None) -> None:
    assert choose_kernels(CUDA, torch.bfloat16) == Kernels(lora="tiled", attention="varlen", elementwise="compiled")


@pytest.mark.parametrize(
    ("dtype", "heads", "is_needed"),
    [
        (torch.bfloat16, AttentionHeads(size=128, is_capped=False), False),
        (torch.bfloat16, AttentionHeads(size=128, is_capped=True), True),
        (torch.bfloat16, AttentionHeads(size=36, is_capped=False), True),
        (torch.float32, AttentionHeads(size=64, is_capped=False), True),
    ],
)
def test_attention_without_flash_attention_gets_triton_kernels_that_agree(
    hopper: None, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, heads: AttentionHeads, is_needed: bool
) -> None:
    tried: list[tuple[int, bool]] = []
    disagreements: list[str | None] = [None, "attention differs"]

    def differs(_device: torch.device, _dtype: torch.dtype, *, size: int, is_capped: bool) -> str | None:
        tried.append((size, is_capped))
        return disagreements[len(tried) - 1]

    monkeypatch.setattr(attention_trial, "why_attention_differs", differs)

    chosen = [choose_kernels(CUDA, dtype, heads) for _ in disagreements]

    assert tried == [(heads.size, heads.is_capped)] * (2 * is_needed)
    assert [each.tiled_head_size for each in chosen] == ([heads.size, None] if is_needed else [None, None])
    found = [[reason for reason in each.reasons if reason.startswith("attention")] for each in chosen]
    assert [bool(reasons) for reasons in found] == [False, is_needed]
    assert not is_needed or found[1][-1] == "attention differs"


@pytest.mark.parametrize(
    ("dtype", "size", "capability", "reason"),
    [
        (torch.float32, 256, (9, 0), "do not take heads of 256 features in torch.float32"),
        (torch.bfloat16, 512, (9, 0), "do not take heads of 512 features"),
        (torch.float16, 64, (9, 0), "do not take heads of 64 features in torch.float16"),
        (torch.bfloat16, 64, (7, 5), "need compute capability 8.0, not 7.5"),
    ],
)
def test_reason_against_triton_attention_names_the_heads_or_the_device(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, size: int, capability: tuple[int, int], reason: str
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(attention_trial, "why_attention_differs", lambda *_, **__: pytest.fail("it was tried"))

    found = attention_trial.why_not_in_tiles(CUDA, dtype, size=size, is_capped=True)

    assert found is not None
    assert reason in found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("size", "is_capped"), [(128, False), (256, True), (36, False)])
def test_generated_tokens_get_a_triton_kernel_that_agrees(
    hopper: None, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, size: int, is_capped: bool
) -> None:
    heads, tried = AttentionHeads(size=size, is_capped=is_capped), list[tuple[torch.dtype, int, bool]]()
    monkeypatch.setattr(attention_trial, "why_attention_differs", lambda *_, **__: None)

    def differs(_device: torch.device, dtype: torch.dtype, *, size: int, is_capped: bool) -> str | None:
        tried.append((dtype, size, is_capped))
        return None if len(tried) == 1 else "decoding differs"

    monkeypatch.setattr(decoding_trial, "why_decoding_differs", differs)

    agreeing, differing = (choose_kernels(CUDA, dtype, heads) for _ in range(2))

    assert tried == [(dtype, size, is_capped)] * 2
    assert (agreeing.decoding_head_size, differing.decoding_head_size) == (size, None)
    assert "decoding differs" not in agreeing.reasons
    assert "decoding differs" in differing.reasons


@pytest.mark.parametrize(
    ("dtype", "size", "capability", "reason"),
    [
        (torch.bfloat16, 512, (9, 0), "does not take heads of 512 features in torch.bfloat16"),
        (torch.float16, 64, (9, 0), "does not take heads of 64 features in torch.float16"),
        (torch.bfloat16, 64, (7, 5), "needs compute capability 8.0, not 7.5"),
    ],
)
def test_reason_against_decoding_by_triton_names_the_heads_or_the_device(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, size: int, capability: tuple[int, int], reason: str
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(decoding_trial, "why_decoding_differs", lambda *_, **__: pytest.fail("it was tried"))

    found = decoding_trial.why_not_decoded(CUDA, dtype, size=size, is_capped=False)

    assert found is not None
    assert found.startswith("attention of generated tokens runs answer by answer: ")
    assert reason in found


@pytest.mark.parametrize(
    ("capability", "dtype", "disagreement", "lora", "reason"),
    [
        ((8, 0), torch.bfloat16, None, "tiled", None),
        ((12, 0), torch.bfloat16, None, "tiled", None),
        ((7, 5), torch.bfloat16, None, "loop", "compute capability 8.0, not 7.5"),
        ((9, 0), torch.float32, None, "loop", "bfloat16"),
        ((9, 0), torch.bfloat16, "dA differs", "loop", "dA differs"),
    ],
)
def test_lora_is_tiled_if_the_kernels_agree_or_a_reason_is_reported(
    hopper: None,
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    dtype: torch.dtype,
    disagreement: str | None,
    lora: str,
    reason: str | None,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(trials, "why_lora_differs", lambda device, dtype: disagreement)
    monkeypatch.setattr(selection, "_why_no_varlen", lambda capability, dtype: None)

    chosen = choose_kernels(CUDA, dtype)

    assert chosen.lora == lora
    assert [reason in given for given in chosen.reasons] == [True] if reason else not chosen.reasons


def test_reason_for_slower_norms_is_logged_when_the_engine_attaches(
    hopper: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, load: Callable[..., BaseModel]
) -> None:
    monkeypatch.setattr(selection, "why_not_elementwise", lambda device: "RMSNorm differs")

    chosen = choose_kernels(CUDA, torch.bfloat16)
    Attachment(load("llama").model, Kernels(reasons=chosen.reasons)).detach()

    assert chosen.elementwise == "eager"
    assert "RMSNorm differs" in caplog.text


def test_gpu_that_draws_no_random_numbers_reports_why(hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random_numbers_trial, "why_not_drawn", lambda device: "numbers differ")

    assert choose_kernels(CUDA, torch.bfloat16).reasons == ("numbers differ",)


def test_kernels_that_another_rank_cannot_use_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elementwise_trial, "_refused", {})
    monkeypatch.setattr(elementwise_trial, "why_trial_failed", lambda device: None)

    elementwise_trial.agree_on_elementwise(CUDA, lambda own: [own, None])
    assert elementwise_trial.why_not_elementwise(CUDA) is None
    elementwise_trial.agree_on_elementwise(CUDA, lambda own: [own, "no C compiler", None])
    assert elementwise_trial.why_not_elementwise(CUDA) == "no C compiler, on another rank"


def test_device_does_not_draw_if_that_of_another_rank_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise one rank would complete an initialization before the others, and wait in another collective."""
    monkeypatch.setattr(drawing, "_refused", {})
    monkeypatch.setattr(random_numbers_trial, "why_not_drawn", lambda device: None)

    drawing.agree_on_drawing(CUDA, lambda own: [own, None])
    assert drawing.draws(CUDA)
    drawing.agree_on_drawing(CUDA, lambda own: [own, "no C compiler", None])
    assert not drawing.draws(CUDA)
    assert drawing.why_host_draws(CUDA) == "no C compiler, on another rank"


Trial = Callable[[torch.device], str | None]
TRIALS: dict[str, Trial] = {
    "lora": lambda device: trials.why_lora_differs.__wrapped__(device, torch.float32),
    "elementwise": elementwise_trial.why_trial_failed.__wrapped__,
    "attention": lambda device: attention_trial.why_attention_differs.__wrapped__(
        device, torch.float32, size=64, is_capped=True
    ),
    "decoding": lambda device: decoding_trial.why_decoding_differs.__wrapped__(
        device, torch.float32, size=64, is_capped=True
    ),
}
"""They run each time. The engine reads the result of the first time."""


def reasons_of_all(device: torch.device) -> list[str | None]:
    return [trial(device) for trial in TRIALS.values()]


def test_machine_without_triton_reports_that(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    for module in ("attention", "decoding", "segmented_lora", "elementwise", "optimizer"):
        monkeypatch.delitem(sys.modules, f"lora_core.kernels.gpu.{module}", raising=False)
    cpu = torch.device("cpu")

    reasons = reasons_of_all(cpu)

    assert all(reason is not None and "Triton is not installed" in reason for reason in reasons)


class CompilationError(Exception):
    """Like Triton's, which has no base class but Exception."""


def test_kernel_that_does_not_compile_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> None:
        raise CompilationError("at 1:2")

    monkeypatch.setattr(trials, "_worst", refused)
    monkeypatch.setattr(elementwise_trial, "elementwise_results", refused)
    monkeypatch.setattr(attention_trial, "attention_results", refused)
    monkeypatch.setattr(decoding_trial, "decoding_results", refused)
    cpu = torch.device("cpu")

    reasons = reasons_of_all(cpu)

    assert all(reason is not None and "a Triton kernel failed (at 1:2)" in reason for reason in reasons)


def refusing(error: Exception) -> Callable[..., None]:
    def raises(*_: object, **__: object) -> None:
        raise error

    return raises


@pytest.mark.parametrize("trial", TRIALS.values(), ids=TRIALS)
def test_fault_of_the_device_in_a_trial_is_no_reason_for_the_loop(
    monkeypatch: pytest.MonkeyPatch, trial: Trial
) -> None:
    faulted = refusing(torch.AcceleratorError("CUDA error: misaligned address"))
    monkeypatch.setattr(trials, "_differences", faulted)
    monkeypatch.setattr(elementwise_trial, "elementwise_results", faulted)
    monkeypatch.setattr(attention_trial, "attention_results", faulted)
    monkeypatch.setattr(decoding_trial, "decoding_results", faulted)
    monkeypatch.setattr(torch.cuda, "synchronize", faulted)

    with pytest.raises(torch.AcceleratorError, match="misaligned address"):
        trial(CUDA)

    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)  # the error was of this launch alone
    reason = trial(CUDA)
    assert reason is not None
    assert "a Triton kernel failed (CUDA error: misaligned address)" in reason


def test_trial_of_lora_covers_every_width_with_both_alignments_and_with_and_without_dropout() -> None:
    segments = [segment for pair in TRIED for segment in zip(*pair, strict=True)]
    kinds = [class_of(rank, has_dropout=bool(threshold)) for rank, threshold in segments]

    assert kinds[::2] == kinds[1::2], "the two segments of a run have one class"
    assert {(kind.width, kind.is_aligned) for kind in kinds} == set(product(WIDTHS, (True, False)))
    assert {(kind.width, kind.has_dropout) for kind in kinds} == set(product(WIDTHS, (True, False)))


@pytest.fixture
def switches() -> Iterator[None]:
    cudnn = torch.backends.cuda.cudnn_sdp_enabled()
    reduced = torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
    yield
    torch.backends.cuda.enable_cudnn_sdp(cudnn)
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = reduced


@pytest.mark.parametrize(("device", "expected"), [("cpu", True), ("cuda:0", False)])
def test_a_gpu_uses_neither_cudnn_attention_nor_sums_in_bf16(switches: None, device: str, expected: bool) -> None:
    torch.backends.cuda.enable_cudnn_sdp(True)
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = True

    prepare_device(torch.device(device))

    assert torch.backends.cuda.cudnn_sdp_enabled() is expected
    assert bool(torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction) is expected
