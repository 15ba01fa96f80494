"""Typed response for a batch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lorry.models.jobs import View


@dataclass(frozen=True, kw_only=True)
class Batch(View):
    """A file of inference requests that are answered at low priority."""

    id: str = ""
    status: str = ""
    """validating, in_progress, finalizing, cancelling, completed, failed, cancelled or expired."""
    endpoint: str = ""
    input_file_id: str = ""
    output_file_id: str | None = None
    """File with the responses, once the batch has ended."""
    error_file_id: str | None = None
    """File with the requests that have no response, once the batch has ended."""
    errors: dict[str, Any] = field(default_factory=dict[str, Any])
    """`data`: why the batch failed, for each invalid line."""
    request_counts: dict[str, int] = field(default_factory=dict[str, int])
    """total, completed and failed."""
    usage: dict[str, Any] = field(default_factory=dict[str, Any])
    """input_tokens, output_tokens and total_tokens."""
    metadata: dict[str, str] = field(default_factory=dict[str, str])
    created_at: int = 0
    expires_at: int = 0
