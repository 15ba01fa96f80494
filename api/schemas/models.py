"""Schemas of models: base models, adapters and checkpoints."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from api.schemas import Deleted
from api.schemas.errors import StoredError
from catalog.datasets.chat_templates import TEMPLATES
from catalog.error_texts import ErrorText
from catalog.inference.requests import InferenceState
from catalog.registry import checkpoints
from catalog.registry.base_models import SOURCE_PATTERN
from catalog.spec.model_fields import LABEL_PATTERN, Strict
from catalog.tables.storage import Adapter, BaseModelRow


class AddModelRequest(Strict):
    """A base model to import. The worker that imports it must be able to read the source."""

    model_config = ConfigDict(
        json_schema_extra={"example": {"name": "smollm2-135m", "kind": "folder", "source": "/models/smollm2-135m"}},
    )
    name: str = Field(
        min_length=1,
        max_length=64,
        description="Name of letters, digits, '.', '_' and '-'.",
        json_schema_extra={"pattern": LABEL_PATTERN},
    )
    kind: Literal["hub", "folder", "gguf"] = Field(
        description="Where `source` is: `hub` (Hugging Face Hub), `folder` or `gguf` (on the worker's disk)."
    )
    source: str = Field(
        min_length=1,
        max_length=4096,
        description="Hugging Face Hub ID, folder with safetensors files, or GGUF file.",
        json_schema_extra={"pattern": SOURCE_PATTERN},
    )
    revision: str | None = Field(default=None, max_length=255, description="Commit, for a Hub ID. Null: the newest.")
    chat_template: str | None = Field(
        default=None,
        min_length=1,
        max_length=65_536,
        description=f"Chat template that replaces those of the source: {', '.join(TEMPLATES)}, or the text of a Jinja "
        "template. null: the source's own.",
    )


class ModelError(StoredError):
    """The error of a failed import."""

    remedy: str = Field(default="", description="How to fix the problem; may be empty.")


class ModelObject(BaseModel):
    """A model: OpenAI's four fields, then Lorry's."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {
                "id": "smollm2-135m",
                "object": "model",
                "created": 1790000000,
                "owned_by": "lorry",
                "kind": "base",
                "state": "ready",
                "inference": "loaded",
                "base": None,
                "digest": "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
            }
        }
    )
    id: str = Field(description="Name of the model, which requests use.")
    object: Literal["model"] = "model"
    created: int = Field(description="Creation time, in Unix seconds.")
    owned_by: str = Field(description="`lorry` for base models, else the ID of the project that trained it.")
    kind: Literal["base", "adapter", "checkpoint"] = Field(
        description="`base`: a base model. `adapter`: the result of a job. `checkpoint`: an adapter of an earlier step."
    )
    state: Literal["importing", "ready", "failed"] = Field(
        default="ready", description="Import of a base model: in progress, done or failed. Adapters are always `ready`."
    )
    inference: InferenceState = Field(
        default="unavailable",
        description="`loaded`: a worker or a serving endpoint answers requests to the model at once. `loadable`: a "
        "worker must load the base model first. `unavailable`: the base model is not ready or was replaced, or no "
        "worker accepts requests and no serving endpoint is ready for the model.",
    )
    base: str | None = Field(default=None, description="Base model of an adapter.")
    digest: str | None = Field(default=None, description="Digest of the manifest; equal digests mean equal bytes.")
    description: dict[str, Any] | None = Field(
        default=None, description="Architecture, parameters and shapes of a base model."
    )
    source: str | None = Field(default=None, description="Source of a base model. Only operators see a path.")
    revision: str | None = Field(
        default=None, description="Requested commit of a Hub model; null if none was requested."
    )
    local_path: str | None = Field(
        default=None, description="Folder of a base model on the API server's machine. Only operators see it."
    )
    error: ModelError | None = Field(
        default=None,
        description="Why the import failed, or why its last attempt failed and another one follows. Only operators see "
        "details.",
    )


class ModelDeleted(BaseModel):
    """Confirmation that a model is deleted."""

    id: str = Field(description="Name of the model.")
    object: Literal["model"] = "model"
    deleted: Deleted = True


def base_object(row: BaseModelRow, *, local_path: str | None, shows_paths: bool) -> ModelObject:
    return ModelObject.model_validate(
        {
            "id": row.name,
            "created": int(row.created_at),
            "owned_by": "lorry",
            "kind": "base",
            "state": row.state,
            "digest": row.digest,
            "description": row.description,
            "source": row.source if shows_paths or row.kind == "hub" else None,
            "revision": row.revision,
            "local_path": local_path if shows_paths else None,
            "error": row.error if shows_paths or row.error is None else _without_paths(row.name, row.error),
        }
    )


def _without_paths(name: str, error: dict[str, Any]) -> dict[str, Any]:
    """Return a generic error, because the import's own message may quote paths and logs of the service's machine."""
    text = ErrorText.of("import_failed_elsewhere", name=name)
    return {**text.report(), "code": error.get("code", text.code)}


def adapter_model(row: Adapter) -> ModelObject:
    return ModelObject(
        id=row.name,
        created=int(row.created_at),
        owned_by=row.project_id,
        kind="checkpoint" if checkpoints.step_of(row) is not None else "adapter",
        base=row.base_model,
        digest=row.artifact,
    )
