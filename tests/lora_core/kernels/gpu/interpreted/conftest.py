"""These tests run in Triton's interpreter. tests/lora_core/kernels/gpu/test_triton_kernels.py starts them."""

from __future__ import annotations

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]
