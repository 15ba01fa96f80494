"""The switches of torch that a device needs."""

from collections.abc import Iterator

import pytest
import torch

from lora_core.kernels.selection import prepare_device


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
