"""Memory that really runs out, on a CPU: ticks are halved, a job that is too large ends alone, no other notices."""

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
def test_a_machine_whose_memory_runs_out_halves_ticks_and_refuses_the_large_job_alone(base_dirs):
    child = subprocess.run(
        [sys.executable, "-m", "tests.lora_core.starved", str(base_dirs["llama"])],
        check=False,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )

    assert child.returncode == 0, child.stderr
    assert json.loads(child.stdout) == {"refused": ["large"], "was_bisected": True, "unchanged": True}


@pytest.mark.parametrize("allocate", [torch.empty, np.empty])
def test_every_allocators_failure_is_one_error(allocate):
    with pytest.raises(torch.OutOfMemoryError), shortage_named():
        allocate(2**57)


@pytest.mark.parametrize(
    "said",
    [
        torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    ],
)
def test_memory_that_a_gpu_lacks_past_torchs_allocator_is_the_same_error_and_no_fault_of_the_device(said):
    with pytest.raises(torch.OutOfMemoryError), shortage_named():
        raise said

    assert not is_device_fault(said)


@pytest.mark.parametrize(
    "said",
    [
        torch.AcceleratorError("an illegal memory access was encountered"),
        RuntimeError("CUDA error: device-side assert triggered"),
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx(handle, opa, opb)`"),
        RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
    ],
)
def test_a_device_that_fails_is_known_for_it_and_is_no_want_of_memory(said):
    assert is_device_fault(said)
    with pytest.raises(type(said)) as caught, shortage_named():
        raise said
    assert caught.value is said


@pytest.mark.parametrize(
    "said", [RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ValueError("CUDA error"), KeyError("lora_A")]
)
def test_a_mistake_in_the_numbers_of_a_job_is_no_fault_of_the_device(said):
    assert not is_device_fault(said)


def test_the_remedy_for_a_large_slice_is_a_field_of_a_job():
    remedy = OutOfMemory("j", num_tokens=4096).remedy

    assert "max_length" in remedy
    assert "slice_tokens" not in remedy


def test_other_errors_stay_what_they_are():
    with pytest.raises(RuntimeError, match="shape") as caught, shortage_named():
        _ = torch.zeros(2, 3) @ torch.zeros(2, 3)
    assert type(caught.value) is RuntimeError
