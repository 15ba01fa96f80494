"""Exports of adapters."""

from __future__ import annotations

from dataclasses import dataclass, field

from lorry.models.jobs import JobFailure, Verification, View


@dataclass(frozen=True, kw_only=True)
class ExportCost(View):
    """Median time of a forward pass over `num_tokens` tokens, of the base model and of the merged model."""

    base_seconds: float = 0.0
    merged_seconds: float = 0.0
    num_tokens: int = 0
    same_operations: bool | None = None


@dataclass(frozen=True, kw_only=True)
class AdapterExport(View):
    """An export of an adapter in the format of a serving engine."""

    id: str = ""
    adapter: str = ""
    """Id of the adapter or checkpoint."""
    adapter_name: str = ""
    format: str = ""
    quantization: str | None = None
    hub_repository: str | None = None
    status: str = ""
    """queued, running, succeeded, failed or cancelled."""
    created_at: int = 0
    started_at: int | None = None
    finished_at: int | None = None
    error: JobFailure | None = field(default=None, metadata={"view": JobFailure})
    artifact: str | None = None
    """Digest of the manifest of its files."""
    bytes: int = 0
    verification: Verification = field(default_factory=Verification, metadata={"view": Verification})
    """Difference between the logits of the exported files and those of the adapted model."""
    cost: ExportCost | None = field(default=None, metadata={"view": ExportCost})
    hub_url: str | None = None

    @property
    def is_final(self) -> bool:
        """Whether its status is succeeded, failed or cancelled."""
        return self.status in ("succeeded", "failed", "cancelled")
