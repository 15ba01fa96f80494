"""Real out-of-memory conditions on a CPU: ticks are halved, and a job that is too large fails alone."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from lora_core.errors import OutOfMemory
from lora_core.runtime.device_errors import is_device_fault, shortage_named

ROOT = Path(__file__).parents[3]


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space, which only Linux enforces")
def test_out_of_memory_halves_ticks_and_fails_only_the_large_job(base_dirs):
    child = subprocess.run(
        [sys.executable, "-m", "tests.lora_core.limited_memory", str(base_dirs["llama"])],
        check=False,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=800,
    )

    assert child.returncode == 0, child.stderr
    assert json.loads(child.stdout) == {"refused": ["large"], "was_bisected": True, "unchanged": True}


@pytest.mark.parametrize("allocate", [torch.empty, np.empty])
def test_failures_of_all_allocators_raise_one_error(allocate):
    with pytest.raises(torch.OutOfMemoryError), shortage_named():
        allocate(2**57)


@pytest.mark.parametrize(
    "error",
    [
        torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    ],
)
def test_memory_errors_of_gpu_libraries_are_not_device_faults(error):
    with pytest.raises(torch.OutOfMemoryError), shortage_named():
        raise error

    assert not is_device_fault(error)


@pytest.mark.parametrize(
    "error",
    [
        torch.AcceleratorError("an illegal memory access was encountered"),
        RuntimeError("CUDA error: device-side assert triggered"),
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx(handle, opa, opb)`"),
        RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
    ],
)
def test_device_faults_are_not_out_of_memory_errors(error):
    assert is_device_fault(error)
    with pytest.raises(type(error)) as caught, shortage_named():
        raise error
    assert caught.value is error


@pytest.mark.parametrize(
    "error", [RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ValueError("CUDA error"), KeyError("lora_A")]
)
def test_errors_of_a_job_are_not_device_faults(error):
    assert not is_device_fault(error)


def test_remedy_for_a_large_slice_names_a_field_of_the_job():
    remedy = OutOfMemory("j", num_tokens=4096).remedy

    assert "max_length" in remedy
    assert "slice_tokens" not in remedy


def test_other_errors_are_unchanged():
    with pytest.raises(RuntimeError, match="shape") as caught, shortage_named():
        _ = torch.zeros(2, 3) @ torch.zeros(2, 3)
    assert type(caught.value) is RuntimeError
