"""Memory that really runs out, on a CPU: ticks are halved, a job that is too large ends alone, no other notices."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from lora_core.errors import OutOfMemory
from lora_core.memory_shortage import shortage_named

ROOT = Path(__file__).parents[2]


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


def test_the_remedy_for_a_large_slice_is_a_field_of_a_job():
    remedy = OutOfMemory("j", num_tokens=4096).remedy

    assert "max_length" in remedy
    assert "slice_tokens" not in remedy


def test_other_errors_stay_what_they_are():
    with pytest.raises(RuntimeError, match="shape") as caught, shortage_named():
        _ = torch.zeros(2, 3) @ torch.zeros(2, 3)
    assert type(caught.value) is RuntimeError
