"""Parents of trainers never import torch. A trainer imports PEFT only when it needs it."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "lora_core", "peft", "accelerate")


@pytest.mark.parametrize(
    "module",
    [
        "worker.supervisor",
        "worker.entrypoints.loop",
        "worker.entrypoints.celery_tasks",
        "worker.entrypoints.celery_app",
    ],
)
def test_parents_of_trainers_import_no_heavy_libraries(module: str) -> None:
    program = f"import sys, {module}; print([name for name in {HEAVY!r} if name in sys.modules])"

    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)

    assert found.stdout.strip() == "[]"


def test_a_trainer_starts_without_peft_and_database_libraries() -> None:
    """The import of PEFT, with bitsandbytes, takes as long as that of torch."""
    late = ("peft", "bitsandbytes", "sqlalchemy")
    program = f"import sys, worker.children.trainer.main; print([name for name in {late!r} if name in sys.modules])"

    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)

    assert found.stdout.strip() == "[]"
