"""Parents of trainers never import torch. A trainer imports PEFT only when it needs it."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "lora_core", "peft", "accelerate")


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("worker.supervisor", HEAVY),
        ("worker.entrypoints.loop", HEAVY),
        ("worker.entrypoints.celery_app", HEAVY),
        # the import of PEFT, with bitsandbytes, takes as long as that of torch
        ("worker.children.trainer.main", ("peft", "bitsandbytes", "sqlalchemy")),
    ],
)
def test_process_starts_without_heavy_libraries(module: str, absent: tuple[str, ...]) -> None:
    program = f"import sys, {module}; print([name for name in {absent!r} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)

    assert found.stdout.strip() == "[]"
