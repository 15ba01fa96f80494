"""What an operator may set, by environment (LORRY_…): one class, read once at start."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, SecretStr, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

HALF_LIFE_SECONDS = 86_400.0
PROMOTE_AFTER_SECONDS = 3_600.0
LEASE_SECONDS = 60.0
PREEMPT_AFTER_SECONDS = 30.0
SPARED_SECONDS = 300.0
MAX_PREEMPTIONS = 3


class Settings(BaseSettings):
    """Everything has a default that suits one machine; a cluster names a database, a broker and a store."""

    model_config = SettingsConfigDict(env_prefix="LORRY_", extra="ignore", frozen=True)

    data_dir: Path = Field(
        default=Path.home() / ".lorry", description="Folder of the database, the store and the caches."
    )
    database_url: SecretStr | None = Field(
        default=None, description="SQLAlchemy URL. Default: SQLite in the data folder."
    )
    redis_url: SecretStr | None = Field(
        default=None, description="Broker of the doorbell. Default: none, workers poll."
    )
    store_url: str | None = Field(default=None, description="file:///…, s3://bucket/prefix …. Default: a local folder.")
    pepper: SecretStr | None = Field(
        default=None, description="Key of the HMAC over API keys, at least 32 bytes. Default: a file in data_dir."
    )
    previous_pepper: SecretStr | None = Field(
        default=None, description="Replaced pepper, whose API keys and webhook secrets stay valid while this is set."
    )

    max_file_bytes: int = Field(default=512 * 2**20, description="Largest uploaded file.")
    max_line_bytes: int = Field(default=8 * 2**20, description="Longest line of a data set.")
    max_rows: int = Field(default=5_000_000, description="Most rows of a data set.")
    max_open_uploads: int = Field(default=100, ge=1, description="Of a project: uploads whose parts may still come.")
    max_open_upload_bytes: int = Field(
        default=16 * 2**30,
        ge=1,
        description="Of a project: bytes announced by its open uploads, and in parts of those that are over.",
    )

    lease_seconds: float = Field(
        default=LEASE_SECONDS, gt=1, description="How long a claim is good for without a heartbeat."
    )
    heartbeat_seconds: float = Field(default=10, gt=0, description="Between two heartbeats of a worker.")
    poll_seconds: float = Field(
        default=1,
        gt=0,
        description="Between two looks at the queue: of a trainer with room, and of an idle worker that has no Redis.",
    )
    idle_seconds: float = Field(default=300, ge=0, description="How long a trainer keeps an idle base resident.")
    standby_trainer: bool = Field(
        default=True, description="A worker that has nothing to train keeps a trainer ready that has imported torch."
    )
    cpu_processes: int = Field(
        default=1, ge=1, le=64, description="Of a trainer on a CPU. More are for trying what several GPUs do."
    )
    strategy: Literal["auto", "replicated", "fsdp2", "zero3", "fsdp2_offload", "zero3_offload"] = Field(
        default="auto",
        description="How a trainer of several devices holds its base: each the whole of it, or a share of every block.",
    )
    cpu_offload_bytes: int | None = Field(
        default=None,
        ge=0,
        description="Of a base that a worker with GPUs may keep in its host's memory. Default: by what the host has.",
    )
    gang: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z0-9][\w.-]{0,63}$",
        description="Name that workers of several nodes have in common, which train together as one.",
    )
    gang_size: int = Field(default=2, ge=1, le=64, description="Workers of a gang.")
    gang_min_size: int | None = Field(
        default=None, ge=1, le=64, description="So few of a gang train where the others are away. Default: all."
    )
    gang_wait_seconds: float = Field(
        default=120, ge=0, description="How long a gang waits for those that are away before fewer of them train."
    )
    gang_join_seconds: float = Field(
        default=900, gt=0, description="Within which each of a gang has the base model and joins; else all give up."
    )
    advertise_address: str | None = Field(
        default=None, description="IPv4 address of this node at which others of its gang reach it, and it listens."
    )
    max_slowdown: float = Field(
        default=4, ge=1, description="How many times as slow as alone a job may become for the sake of jobs that join."
    )
    share_half_life_seconds: float = Field(
        default=HALF_LIFE_SECONDS, ge=60, description="After how long what a project has used of devices counts half."
    )
    priority_aging_seconds: float = Field(
        default=PROMOTE_AFTER_SECONDS,
        ge=60,
        description="How long a class waits with none of it claimed until its first job counts as a class higher.",
    )
    preempt_after_seconds: float = Field(
        default=PREEMPT_AFTER_SECONDS,
        ge=0,
        description="How long an urgent job waits before jobs of lower classes are asked to leave for it.",
    )
    preemption_min_runtime_seconds: float = Field(
        default=SPARED_SECONDS, ge=0, description="A job that trains for less is not asked to leave for an urgent one."
    )
    max_preemptions: int = Field(
        default=MAX_PREEMPTIONS, ge=0, description="How often a job is asked to leave for urgent ones. 0: never."
    )
    max_jobs_per_trainer: int = Field(default=16, ge=1, description="Adapters trained together at most.")
    prefix_disk_bytes: int = Field(
        default=2 * 2**30, ge=0, description="Disk of a trainer for what frozen blocks gave. 0: nothing is kept."
    )

    integrations: str = Field(
        default="wandb,mlflow,tensorboard,trackio",
        description="Trackers, separated by commas, that jobs may have their curves written to, where installed.",
    )
    mlflow_tracking_uri: SecretStr | None = Field(
        default=None, description="MLflow's server or database. Default: SQLite in the data folder."
    )
    tensorboard_dir: Path | None = Field(default=None, description="Of event files. Default: in the data folder.")
    trackio_dir: Path | None = Field(default=None, description="Of Trackio's databases. Default: in the data folder.")

    batch_invariant: bool = Field(
        default=True, description="On a CPU with AMX: have bf16 products that packmates can't change, a tenth slower."
    )

    @field_validator("gang_min_size")
    @classmethod
    def _can_begin(cls, fewest: int | None, info: ValidationInfo) -> int | None:
        size = info.data.get("gang_size", 64)
        if fewest is not None and fewest > size:
            raise ValueError(
                f"LORRY_GANG_SIZE is {size}, so no trainer would ever begin. Set {size} at most, or nothing."
            )
        return fewest

    def resolved_database_url(self) -> str:
        """In plain text: it may hold a password, so it never goes into a log or a message."""
        named = self.database_url
        return named.get_secret_value() if named else f"sqlite:///{self.data_dir / 'lorry.db'}"

    def resolved_redis_url(self) -> str | None:
        """In plain text, like the database's; None where there is no broker."""
        return self.redis_url.get_secret_value() if self.redis_url else None

    def resolved_store_url(self) -> str:
        return self.store_url or (self.data_dir / "store").absolute().as_uri()

    def named_integrations(self) -> frozenset[str]:
        return frozenset(part.strip() for part in self.integrations.split(",") if part.strip())

    def resolved_mlflow_tracking_uri(self) -> str:
        named = self.mlflow_tracking_uri
        return named.get_secret_value() if named else f"sqlite:///{(self.data_dir / 'mlflow.db').absolute()}"

    def bases_dir(self) -> Path:
        """Folder of imported base models: one per digest."""
        return self.data_dir / "bases"

    def work_dir(self) -> Path:
        """Folder of trainers' directories; safe to delete while nothing runs."""
        return self.data_dir / "work"

    def bell_path(self) -> Path:
        """What the api touches where there is work and no broker, and workers on this data folder look at."""
        return self.work_dir() / "bell"
