"""Schemas of exports of adapters."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from api.schemas import AdapterName, CreatedAt, Deleted, ErrorCode, ErrorMessage, MaxAbsDiff, ObjectId, Remedy
from catalog.exports.formats import HUB_REPOSITORY, Format, Quantization
from catalog.spec.model_fields import Strict
from catalog.tables.storage import AdapterExport

ExportStatus = Literal["queued", "running", "succeeded", "failed", "cancelled"]


class ExportRequest(Strict):
    """An export in the format of a serving engine."""

    format: Format = Field(
        description="merged: a folder of safetensors with the merged weights. gguf: a GGUF file of the merged model "
        "for llama.cpp, and a Modelfile for Ollama. gguf-lora: a GGUF file of the adapter alone, which llama.cpp "
        "applies to a GGUF file of the base model. adapter: the adapter's own files, for an upload to the Hub."
    )
    quantization: Quantization | None = Field(
        default=None,
        description="Storage of the matrices for the format gguf. Null: q8_0 for gguf, none for other formats.",
    )
    hub_repository: str | None = Field(
        default=None,
        pattern=HUB_REPOSITORY,
        description="ORG/NAME of a repository on the Hugging Face Hub, to which a worker uploads the files. A "
        "repository that does not exist is created as a private one. Null: no upload.",
    )


class ExportError(BaseModel):
    """The problem of an export."""

    code: ErrorCode
    message: ErrorMessage
    remedy: Remedy


class ExportVerification(BaseModel):
    """Largest difference between the logits of the exported files and those of the adapted model, on pseudo-random
    sequences. `tolerance` is the part that the rounding of the format explains."""

    model_config = ConfigDict(extra="allow")
    max_abs_diff: MaxAbsDiff
    tolerance: float = Field(description="Largest accepted `max_abs_diff`, in logits.")
    max_abs_diff_to_trained: float | None = Field(
        default=None,
        description="For an adapter trained on a quantized base model: difference between the merged model without "
        "quantization and the logits in training.",
    )
    explanation: str | None = Field(
        default=None, description="For a GGUF file of llama.cpp's converter: what was compared, and what was not."
    )


class ExportCost(BaseModel):
    """Fastest of several forward passes of the base model and of the merged model, on a CPU of the worker.

    `same_operations` is whether both run the same operations on tensors of the same shapes and dtypes.
    """

    model_config = ConfigDict(extra="allow")
    base_seconds: float = Field(description="Duration of a pass of the base model, in seconds.")
    merged_seconds: float = Field(description="Duration of a pass of the merged model, in seconds.")
    num_tokens: int = Field(description="Number of tokens in a pass.")
    same_operations: bool = Field(
        description="Whether both models run the same operations on tensors of the same shapes and dtypes."
    )


class ExportObject(BaseModel):
    """An export of an adapter in another format, or to the Hugging Face Hub."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {
                "id": "export-0a1b2c3d4e5f60718293a4b5",
                "object": "adapter.export",
                "adapter": "adapter-0a1b2c3d4e5f60718293a4b5",
                "adapter_name": "ft:smollm2-135m:default:docs:1c0ffee0",
                "format": "gguf",
                "quantization": "q8_0",
                "hub_repository": None,
                "status": "succeeded",
                "created_at": 1790000200,
                "started_at": 1790000201,
                "finished_at": 1790000290,
                "error": None,
                "artifact": "4f53cda18c2baa0c0354bb5f9a3ecbe5ed12ab4d8e11ba873c2f11161202b945",
                "bytes": 144812123,
                "verification": {"max_abs_diff": 0.91, "tolerance": 0.92},
                "cost": {"base_seconds": 0.42, "merged_seconds": 0.42, "num_tokens": 128, "same_operations": True},
                "hub_url": None,
            }
        }
    )
    id: ObjectId
    object: Literal["adapter.export"] = "adapter.export"
    adapter: str = Field(description="ID of the adapter or checkpoint.")
    adapter_name: AdapterName
    format: Format = Field(description="Format of the exported files.")
    quantization: Quantization | None = Field(
        description="Storage of the matrices in a GGUF file; null for other formats."
    )
    hub_repository: str | None = Field(description="Repository on the Hugging Face Hub to upload to; null without one.")
    status: ExportStatus = Field(description="Status of the export.")
    created_at: CreatedAt
    started_at: int | None = Field(description="Time at which a worker took it, in Unix seconds; null before.")
    finished_at: int | None = Field(description="End of the export, in Unix seconds; null before.")
    error: ExportError | None = Field(
        description="Why it has failed. While it is queued: why a worker has not taken it."
    )
    artifact: str | None = Field(description="Digest of the manifest of its files.")
    bytes: int = Field(description="Size of its files, in bytes; 0 until they are stored.")
    verification: ExportVerification | None = Field(
        description="Comparison of the exported files with the adapted model; null until verified."
    )
    cost: ExportCost | None = Field(
        description="Durations of a pass of the base model and the merged model; null unless measured."
    )
    hub_url: str | None = Field(description="Address of the commit on the Hugging Face Hub.")


class ExportDeleted(BaseModel):
    """Confirmation that an export is deleted."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {"id": "export-0a1b2c3d4e5f60718293a4b5", "object": "adapter.export", "deleted": True}
        }
    )
    id: ObjectId
    object: Literal["adapter.export"] = "adapter.export"
    deleted: Deleted = True


def export_object(row: AdapterExport) -> ExportObject:
    verification: dict[str, Any] | None = row.verification
    if verification is not None and (merge := verification.get("merge")) is not None:
        to_trained = merge.get("max_abs_diff_to_trained")
        verification = {**verification, "max_abs_diff_to_trained": to_trained}
    return ExportObject.model_validate(
        {
            "id": row.id,
            "adapter": row.adapter_id,
            "adapter_name": row.adapter_name,
            "format": row.format,
            "quantization": row.quantization,
            "hub_repository": row.hub_repository,
            "status": row.status,
            "created_at": int(row.created_at),
            "started_at": None if row.started_at is None else int(row.started_at),
            "finished_at": None if row.finished_at is None else int(row.finished_at),
            "error": row.error,
            "artifact": row.artifact,
            "bytes": row.num_bytes,
            "verification": verification,
            "cost": row.cost,
            "hub_url": row.hub_url,
        }
    )
