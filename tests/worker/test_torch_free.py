"""The worker's parents never load torch, and a trainer no PEFT before it needs it: a child interpreter says so."""

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
def test_a_parent_of_trainers_imports_nothing_heavy(module: str) -> None:
    program = f"import sys, {module}; print([name for name in {HEAVY!r} if name in sys.modules])"

    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)

    assert found.stdout.strip() == "[]"


def test_a_trainer_is_ready_before_it_has_imported_peft_and_knows_no_database() -> None:
    """PEFT's import, with bitsandbytes, takes as long as torch's."""
    late = ("peft", "bitsandbytes", "sqlalchemy")
    program = f"import sys, worker.children.trainer.main; print([name for name in {late!r} if name in sys.modules])"

    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)

    assert found.stdout.strip() == "[]"
