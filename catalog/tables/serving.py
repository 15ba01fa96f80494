"""Inference: serving endpoints with the adapters deployed on them, base models that requests wait for, and batches."""

from __future__ import annotations

from typing import Any

from sqlalchemy import JSON, Boolean, ForeignKey, Index, Integer, Text
from sqlalchemy.orm import Mapped, mapped_column

from catalog.tables.table import Json, Table


class ServingEndpoint(Table):
    """An inference server for one base model. One API process at a time keeps it in step with its deployments."""

    __tablename__ = "serving_endpoints"
    id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    kind: Mapped[str]
    """vllm."""
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    """The project of the operator who registered it. The reference answer of the base model is requested in its
    name."""
    base_model: Mapped[str] = mapped_column(ForeignKey("base_models.name"))
    base_digest: Mapped[str]
    """Digest of the base model at registration. Adapters of other digests are not deployed here."""
    url: Mapped[str] = mapped_column(Text)
    """Address without a trailing slash and without /v1."""
    sealed_key: Mapped[str | None] = mapped_column(Text)
    """The server's API key, encrypted; see catalog/pepper.py. None: the server requires none."""
    adapter_folder: Mapped[str] = mapped_column(Text)
    """Absolute path of a folder under which API servers and the inference server see the same files."""
    max_rank: Mapped[int] = mapped_column(Integer)
    """Highest rank that the server loads: vLLM's --max-lora-rank."""
    state: Mapped[str]
    """pending, ready, unreachable, rejected or failed."""
    last_error: Mapped[str | None] = mapped_column(Text)
    served_model: Mapped[str | None] = mapped_column(Text)
    """The server's name of the base model."""
    served_root: Mapped[str | None] = mapped_column(Text)
    """The path or id from which the server has loaded the base model."""
    reference: Mapped[Json | None]
    """The built-in engine's answer of the base model to the probe prompt; see catalog/serving/probes.py."""
    verification: Mapped[Json | None]
    """Comparison of the server's answer with the reference."""
    checked_at: Mapped[float | None]
    created_at: Mapped[float]
    deleted_at: Mapped[float | None]
    """Its adapters are unloaded, and then the row is deleted."""


class Deployment(Table):
    """An adapter that is to be loaded on an endpoint. Only the process that holds the endpoint's lease changes its
    state, except to request the removal or another attempt."""

    __tablename__ = "deployments"
    id: Mapped[str] = mapped_column(primary_key=True)
    endpoint_id: Mapped[str] = mapped_column(ForeignKey("serving_endpoints.id"))
    adapter_id: Mapped[str] = mapped_column(ForeignKey("adapters.id"))
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    """The project of the adapter."""
    state: Mapped[str]
    """pending, ready, failed or removing."""
    last_error: Mapped[str | None] = mapped_column(Text)
    """Shown to the project. It contains no text of the server, which may name paths and addresses."""
    operator_error: Mapped[str | None] = mapped_column(Text)
    """Shown to operators in place of `last_error`, unless None."""
    reference: Mapped[Json | None]
    """The built-in engine's answer of the adapter to the probe prompt. It is computed once."""
    verification: Mapped[Json | None]
    num_failures: Mapped[int] = mapped_column(Integer)
    """Failed attempts in a row."""
    next_try_at: Mapped[float]
    """When the next attempt is due, unless the adapter is ready."""
    created_at: Mapped[float]
    updated_at: Mapped[float]
    __table_args__ = (
        Index(None, "endpoint_id", "adapter_id", unique=True),
        Index(None, "adapter_id"),
        Index(None, "project_id"),
    )


class WantedBase(Table):
    """A base model that requests wait for, because no worker has it loaded. Its task `load` is claimed by the worker
    that loads it. API servers extend `wanted_until` while requests wait."""

    __tablename__ = "wanted_bases"
    pack_key: Mapped[str] = mapped_column(primary_key=True)
    """The trainers that can answer the requests."""
    base_model: Mapped[str] = mapped_column(ForeignKey("base_models.name"))
    base_digest: Mapped[str]
    wanted_since: Mapped[float]
    wanted_until: Mapped[float]
    clients_until: Mapped[float]
    """Until when clients want it. Earlier than `wanted_until` if only batches do."""
    error: Mapped[Json | None] = mapped_column(JSON(none_as_null=True))
    """Why it could not be loaded."""
    failed_at: Mapped[float | None]
    """Requests that arrived before this time fail with `error`."""


class Batch(Table):
    """A file of inference requests. An API process submits them and stores the answers."""

    __tablename__ = "batches"
    id: Mapped[str] = mapped_column(primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    created_at: Mapped[float]
    created_by: Mapped[str]
    """Id of the API key."""
    endpoint: Mapped[str]
    """Path of the route that each of its requests is for."""
    input_file: Mapped[str] = mapped_column(ForeignKey("files.id"))
    labels: Mapped[Json | None] = mapped_column(JSON(none_as_null=True))
    """`metadata` in the API."""
    lifetime_seconds: Mapped[int | None]
    """Lifetime of its output files. None: they are kept until a user deletes them."""
    status: Mapped[str]
    """A `BatchStatus`."""
    expires_at: Mapped[float]
    errors: Mapped[list[Any] | None] = mapped_column(JSON(none_as_null=True))
    """Why it failed: {code, message, param, line} for each invalid line, up to a maximum."""
    num_lines: Mapped[int] = mapped_column(default=0)
    num_completed: Mapped[int] = mapped_column(default=0)
    num_failed: Mapped[int] = mapped_column(default=0)
    prompt_tokens: Mapped[int] = mapped_column(default=0)
    completion_tokens: Mapped[int] = mapped_column(default=0)
    output_file: Mapped[str | None] = mapped_column(ForeignKey("files.id"))
    error_file: Mapped[str | None] = mapped_column(ForeignKey("files.id"))
    in_progress_at: Mapped[float | None]
    finalizing_at: Mapped[float | None]
    cancelling_at: Mapped[float | None]
    finished_at: Mapped[float | None]
    """When it was completed, failed, cancelled or expired."""
    __table_args__ = (Index(None, "project_id", "created_at", "id"),)


class BatchLine(Table):
    """The result of one request of a batch. It is deleted after the output files of the batch are stored."""

    __tablename__ = "batch_lines"
    batch_id: Mapped[str] = mapped_column(ForeignKey("batches.id"), primary_key=True)
    number: Mapped[int] = mapped_column(Integer, primary_key=True)
    """Line of the input file, from 1."""
    is_failed: Mapped[bool] = mapped_column(Boolean)
    result: Mapped[Json]
    """The line of the output file, or of the error file if the request failed."""
