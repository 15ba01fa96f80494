"""Request and response schemas: one module per resource, with its models and the functions that build responses.

Here: the fields that several resources have, each with its description, and helpers for `json_schema_extra`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from pydantic import Field

ObjectId = Annotated[str, Field(description="ID of the object.")]
CreatedAt = Annotated[int, Field(description="Creation time, in Unix seconds.")]
UpdatedAt = Annotated[int, Field(description="Time of the last change, in Unix seconds.")]
Deleted = Annotated[bool, Field(description="Always true: the object is deleted.")]
AdapterId = Annotated[str, Field(description="ID of the adapter, `adapter-…`.")]
AdapterName = Annotated[str, Field(description="Name of the adapter, `ft:…`.")]
LineageId = Annotated[str, Field(description="SHA-256 of the lineage record's canonical JSON (RFC 8785).")]
JobId = Annotated[str, Field(description="ID of the fine-tuning job.")]
ProjectId = Annotated[str, Field(description="ID of the owning project, `proj-…`.")]
ProjectDisplayName = Annotated[str, Field(description="Name of the key's project.")]
KeyName = Annotated[str, Field(description="Display name of the API key.")]
IsOperator = Annotated[bool, Field(description="Whether the key may act beyond its project.")]
BaseName = Annotated[str, Field(description="Name of the base model.")]
BaseDigest = Annotated[str, Field(description="Digest of the base model's files; equal digests mean equal bytes.")]
MaxAbsDiff = Annotated[float, Field(description="Largest absolute difference, in logits.")]
ErrorCode = Annotated[str, Field(description="Stable name of the error or warning, for programs.")]
ErrorMessage = Annotated[str, Field(description="The problem, as text for users.")]
Remedy = Annotated[str, Field(description="How to fix the problem.")]


def changes_schema(example: dict[str, Any]) -> Callable[[dict[str, Any]], None]:
    """Return `json_schema_extra` for a request body in which omitted fields stay unchanged: no field has a default."""

    def extend(schema: dict[str, Any]) -> None:
        for field in schema["properties"].values():
            field.pop("default", None)
        schema["example"] = example

    return extend
