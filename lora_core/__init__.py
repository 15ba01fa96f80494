# pyright: strict
"""Train many LoRA adapters concurrently on one frozen base model; see docs/internals/engine.md. No torch here."""

import logging

UNUSED_KERNEL = "Failed to load CPU gemm_4bit_forward"


def _is_relevant(record: logging.LogRecord) -> bool:
    """Drop the warning of bitsandbytes, which PEFT imports, about a 4-bit CPU kernel that Lorry does not use."""
    return not str(record.msg).startswith(UNUSED_KERNEL)


logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_is_relevant)
