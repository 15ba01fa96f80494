"""Serving endpoints: OpenAI-compatible servers that load adapters at run time, and the adapters deployed on them."""

from __future__ import annotations

from sqlalchemy import ForeignKey, Index, Integer, Text
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
    """The server's API key, encrypted; see catalog/sealing.py. None: the server requires none."""
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
