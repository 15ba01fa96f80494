"""The kernels that a device gets, and the reason where it does not get the fastest."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from lora_core.base_model.model import BaseModel
from lora_core.base_model.patching import Attachment
from lora_core.kernels import selection
from lora_core.kernels.selection import AttentionHeads, Kernels, choose_kernels, prepare_device

CUDA = torch.device("cuda:0")


@pytest.fixture
def against(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The reasons by family against the kernels of a device. Those without a reason agree with their references."""
    reasons: dict[str, str] = {}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(selection, "reason_against", lambda family, *_, **__: reasons.get(family))
    monkeypatch.setattr(selection, "varlen_parameters", lambda: selection.VARLEN_PARAMETERS)
    return reasons


def test_cpu_uses_the_loop_and_compares_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "reason_against", lambda *_, **__: pytest.fail("a CPU was compared"))

    assert choose_kernels(torch.device("cpu"), torch.bfloat16) == Kernels(lora="loop", reasons=())


def test_gpu_uses_the_fastest_kernels_if_they_agree(against: dict[str, str]) -> None:
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
    against: dict[str, str], dtype: torch.dtype, heads: AttentionHeads, is_needed: bool
) -> None:
    agreeing = choose_kernels(CUDA, dtype, heads)
    against["attention"] = "attention differs"
    differing = choose_kernels(CUDA, dtype, heads)

    assert agreeing.tiled_head_size == (heads.size if is_needed else None)
    assert not any(reason.startswith("attention") for reason in agreeing.reasons)
    assert differing.tiled_head_size is None
    assert ("attention differs" in differing.reasons) is is_needed


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("size", "is_capped"), [(128, False), (256, True), (36, False)])
def test_generated_tokens_get_a_triton_kernel_that_agrees(
    against: dict[str, str], dtype: torch.dtype, size: int, is_capped: bool
) -> None:
    heads = AttentionHeads(size=size, is_capped=is_capped)

    agreeing = choose_kernels(CUDA, dtype, heads)
    against["decoding"] = "decoding differs"
    differing = choose_kernels(CUDA, dtype, heads)

    assert (agreeing.decoding_head_size, differing.decoding_head_size) == (size, None)
    assert ("decoding differs" in agreeing.reasons, "decoding differs" in differing.reasons) == (False, True)


def test_lora_runs_segment_by_segment_if_its_kernels_differ(against: dict[str, str]) -> None:
    against["lora"] = "dA differs"

    chosen = choose_kernels(CUDA, torch.bfloat16)

    assert (chosen.lora, chosen.reasons) == ("loop", ("dA differs",))


def test_reason_for_slower_norms_is_logged_when_the_engine_attaches(
    against: dict[str, str], caplog: pytest.LogCaptureFixture, load: Callable[..., BaseModel]
) -> None:
    against["elementwise"] = "RMSNorm differs"

    chosen = choose_kernels(CUDA, torch.bfloat16)
    Attachment(load("llama").model, Kernels(reasons=chosen.reasons)).detach()

    assert chosen.elementwise == "eager"
    assert "RMSNorm differs" in caplog.text


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
