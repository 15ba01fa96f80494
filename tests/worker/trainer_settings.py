"""The settings with which a worker starts a trainer, for trainers that a test or a benchmark starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def trainer_settings(base_dir: Path, **changes: Any) -> dict[str, Any]:
    """Return the content of trainer.json for one process on the CPU."""
    settings = {
        "trainer_id": "trainer-1",
        "base_dir": str(base_dir),
        "dtype": "float32",
        "quantization": "none",
        "strategy": "replicated",
        "device": "cpu",
        "batch_invariant": True,
        "idle_seconds": None,
    }
    return settings | changes
