# pyright: strict
"""Trains many LoRA adapters on one frozen base model; docs/ENGINE.md says how. No torch here."""

import logging

UNUSED_KERNEL = "Failed to load CPU gemm_4bit_forward"


def _is_news(record: logging.LogRecord) -> bool:
    """PEFT imports bitsandbytes, which on some CPUs misses a kernel that no base model here is computed with."""
    return not str(record.msg).startswith(UNUSED_KERNEL)


logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_is_news)
