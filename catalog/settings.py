"""Operator settings from the environment (LORRY_…), read once at start, and variables that nothing reads: misspelled,
or of another version.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, SecretStr, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from catalog.errors import LorryError

HALF_LIFE_SECONDS = 86_400.0
PROMOTE_AFTER_SECONDS = 3_600.0
LEASE_SECONDS = 60.0
PREEMPT_AFTER_SECONDS = 30.0
SPARED_SECONDS = 300.0
MAX_PREEMPTIONS = 3
HUB_PATTERN = re.compile(r"[A-Za-z0-9*][A-Za-z0-9._*-]*/[A-Za-z0-9*][A-Za-z0-9._*-]*")
"""ORG/NAME, where `*` stands for any characters."""
PREFIX = "LORRY_"
OF_API_SERVER = frozenset(
    {
        "ALLOWED_HOSTS",
        "PUBLIC_URL",
        "TRUSTED_PROXIES",
        "MAX_BODY_BYTES",
        "REQUESTS_PER_MINUTE",
        "JOBS_PER_DAY",
        "WEBHOOK_ALLOWED_NETWORKS",
        "WEBHOOK_ALLOW_HTTP",
        "STREAM_POLL_SECONDS",
        "STREAM_HEARTBEAT_SECONDS",
        "SHUTDOWN_SECONDS",
    }
)
"""The fields of api.settings, which workers may see too."""
OF_OTHERS = frozenset(
    {
        "DEVICE",
        "LOG_FORMAT",
        "URL",
        "API_KEY",
        "TRACEBACK",
        "GROUPS",
        "LISTEN",
        "MODELS_DIR",
        "SUBNET",
        "VERSION",
        "DEMO_DIR",
    }
)
"""Read by workers, by clients, by the Compose file and by the demo."""
OF_TESTS = "TEST_"
LINKED_SERVICE = re.compile(r"(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP)(_\w+)?)")
"""Variables that Kubernetes sets for a Service whose name begins with `lorry`."""


class InvalidSettings(LorryError):
    """A setting has an invalid value. The message names the setting, and contains no secret."""


class EnvironmentSettings(BaseSettings):
    """Reads its fields from variables LORRY_…. Raises InvalidSettings."""

    model_config = SettingsConfigDict(env_prefix="LORRY_", extra="ignore", frozen=True)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            found = [
                _finding(each["loc"], each["msg"]) for each in error.errors(include_input=False, include_url=False)
            ]
        else:
            return
        raise InvalidSettings("invalid_settings", problems=" ".join(found))


def _finding(path: tuple[int | str, ...], message: str) -> str:
    """Return a sentence about the field at `path`, or about several fields if it is empty."""
    text = message.removeprefix("Value error, ").rstrip(".") + "."
    return f"LORRY_{str(path[0]).upper()} is invalid. {text}" if path else text


class Settings(EnvironmentSettings):
    """Settings of API servers and workers. The defaults suit one machine; clusters set a database, broker and store."""

    data_dir: Path = Field(
        default=Path.home() / ".lorry", description="Folder for the database, the store and the caches."
    )
    database_url: SecretStr | None = Field(
        default=None, description="SQLAlchemy URL. Default: SQLite in the data folder."
    )
    redis_url: SecretStr | None = Field(
        default=None, description="Redis URL for wake-up notifications. Default: none, workers poll."
    )
    store_url: str | None = Field(default=None, description="file:///…, s3://bucket/prefix …. Default: a local folder.")
    pepper: SecretStr | None = Field(
        default=None, description="Secret key for HMACs of API keys, at least 32 bytes. Default: a file in data_dir."
    )
    previous_pepper: SecretStr | None = Field(
        default=None, description="Replaced pepper. Its API keys and webhook secrets stay valid while this is set."
    )

    max_file_bytes: int = Field(default=512 * 2**20, description="Maximum size of an uploaded file.")
    max_line_bytes: int = Field(default=8 * 2**20, description="Maximum length of a line of a data set.")
    max_rows: int = Field(default=5_000_000, description="Maximum number of rows of a data set.")
    max_open_uploads: int = Field(default=100, ge=1, description="Maximum number of open uploads per project.")
    max_open_upload_bytes: int = Field(
        default=16 * 2**30,
        ge=1,
        description="Maximum bytes per project: announced by open uploads, plus undeleted parts of finished ones.",
    )

    lease_seconds: float = Field(
        default=LEASE_SECONDS, gt=1, description="Validity of a claim without a heartbeat, in seconds."
    )
    heartbeat_seconds: float = Field(
        default=10,
        gt=0,
        le=20,  # a third of SILENT_SECONDS (catalog/tables/fleet.py), after which a worker is shown as lost
        description="Interval between heartbeats of a worker: at most a third of a lease.",
    )
    poll_seconds: float = Field(
        default=1,
        gt=0,
        description="Queue poll interval of a trainer with free memory, and of an idle worker without Redis.",
    )
    idle_seconds: float = Field(
        default=1800,
        ge=0,
        description="Time that a trainer without jobs keeps its base model loaded, in seconds. Other work unloads it.",
    )
    standby_trainer: bool = Field(
        default=True, description="Keep a warm standby trainer, with torch imported, while the worker is idle."
    )
    cpu_processes: int = Field(
        default=1, ge=1, le=64, description="Processes of a trainer on a CPU. Set more to try multi-GPU behavior."
    )
    inference_address: str = Field(
        default="",
        pattern=r"^([\w.-]*:\d{1,5})?$",
        description="HOST:PORT, or :PORT, at which API servers reach this worker for inference. Further workers on the "
        "machine use the next ports. Default: the address from which it reaches the database, and any free port.",
    )
    strategy: Literal["auto", "replicated", "fsdp2", "zero3", "fsdp2_offload", "zero3_offload"] = Field(
        default="auto",
        description="Placement of the base model on several devices: replicated, sharded or CPU-offloaded.",
    )
    cpu_offload_bytes: int | None = Field(
        default=None,
        ge=0,
        description="Maximum host memory for an offloaded base model. Default: derived from the host's memory.",
    )
    gang: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z0-9][\w.-]{0,63}$",
        description="Name shared by workers on several nodes that train together as one gang.",
    )
    gang_size: int = Field(default=2, ge=1, le=64, description="Number of workers of a gang.")
    gang_min_size: int | None = Field(
        default=None, ge=1, le=64, description="Minimum number of workers that a gang trains with. Default: all."
    )
    gang_wait_seconds: float = Field(
        default=120,
        ge=0,
        description="Time that a gang waits for absent workers, in seconds. Then it trains without them.",
    )
    gang_join_seconds: float = Field(
        default=900, gt=0, description="Time limit for all workers of a gang to fetch the base model and join."
    )
    advertise_address: str | None = Field(
        default=None, description="IPv4 address on which this node listens for the other nodes of its gang."
    )
    max_slowdown: float = Field(
        default=4, ge=1, description="Maximum slowdown of a job by its packmates, relative to training alone."
    )
    share_half_life_seconds: float = Field(
        default=HALF_LIFE_SECONDS, ge=60, description="Half-life of a project's device usage in fair-share scheduling."
    )
    priority_aging_seconds: float = Field(
        default=PROMOTE_AFTER_SECONDS,
        ge=60,
        description="Priority aging: after this time without a claim, a class's first job counts as one class higher.",
    )
    preempt_after_seconds: float = Field(
        default=PREEMPT_AFTER_SECONDS,
        ge=0,
        description="Time that an urgent job waits before it preempts jobs of lower priority, in seconds.",
    )
    preemption_min_runtime_seconds: float = Field(
        default=SPARED_SECONDS, ge=0, description="A job that has trained for less time is not preempted."
    )
    max_preemptions: int = Field(
        default=MAX_PREEMPTIONS, ge=0, description="Maximum number of preemptions of one job. 0 disables preemption."
    )
    max_jobs_per_trainer: int = Field(default=16, ge=1, description="Maximum number of adapters in one trainer.")

    integrations: str = Field(
        default="wandb,mlflow,tensorboard",
        description="Trackers that jobs may write their curves to, if installed; separated by commas.",
    )
    mlflow_tracking_uri: SecretStr | None = Field(
        default=None, description="MLflow server or database. Default: SQLite in the data folder."
    )
    tensorboard_dir: Path | None = Field(
        default=None, description="Folder for TensorBoard event files. Default: in the data folder."
    )

    hub_repositories: str = Field(
        default="",
        description="Repositories of the Hugging Face Hub to which exports may be uploaded, such as my-org/name or "
        "my-org/*; separated by commas.",
    )

    gguf_converter: Path | None = Field(
        default=None,
        description="Path of llama.cpp's convert_hf_to_gguf.py, for GGUF exports of more architectures. "
        "Default: none. Set it on workers.",
    )

    batch_invariant: bool = Field(
        default=True,
        description="Batch-invariant bf16 matmuls on CPUs with AMX: packmates can't change bits. 10% slower.",
    )

    @field_validator("gang_min_size")
    @classmethod
    def _can_begin(cls, fewest: int | None, info: ValidationInfo) -> int | None:
        size = info.data.get("gang_size", 64)
        if fewest is not None and fewest > size:
            raise ValueError(
                f"LORRY_GANG_SIZE is {size}: no trainer could start with a larger minimum. "
                f"Set at most {size}, or unset it."
            )
        return fewest

    @field_validator("hub_repositories")
    @classmethod
    def _are_repositories(cls, text: str) -> str:
        for pattern in _parts(text):
            if not HUB_PATTERN.fullmatch(pattern):
                raise ValueError(f"{pattern!r} is not a repository. Write ORG/NAME or ORG/*, separated by commas.")
        return text

    @model_validator(mode="after")
    def _keeps_its_leases(self) -> Self:
        if self.heartbeat_seconds > self.lease_seconds / 3:
            raise ValueError(
                f"LORRY_HEARTBEAT_SECONDS is {self.heartbeat_seconds:g}, more than a third of LORRY_LEASE_SECONDS "
                f"({self.lease_seconds:g}), so a few failed heartbeats would cost a worker its jobs. "
                f"Set LORRY_HEARTBEAT_SECONDS to at most {self.lease_seconds / 3:g}, or a longer lease."
            )
        return self

    def resolved_database_url(self) -> str:
        """The database URL in plain text. It may contain a password: never log it or put it in a message."""
        named = self.database_url
        return named.get_secret_value() if named else f"sqlite:///{self.data_dir / 'lorry.db'}"

    def resolved_redis_url(self) -> str | None:
        """The broker's URL in plain text; it may contain a password. None without a broker."""
        return self.redis_url.get_secret_value() if self.redis_url else None

    def resolved_store_url(self) -> str:
        return self.store_url or (self.data_dir / "store").absolute().as_uri()

    def named_integrations(self) -> frozenset[str]:
        return frozenset(_parts(self.integrations))

    def named_hub_repositories(self) -> tuple[str, ...]:
        """Patterns of the repositories to which exports may be uploaded; catalog.exports.formats."""
        return tuple(_parts(self.hub_repositories))

    def resolved_mlflow_tracking_uri(self) -> str:
        named = self.mlflow_tracking_uri
        return named.get_secret_value() if named else f"sqlite:///{(self.data_dir / 'mlflow.db').absolute()}"

    def bases_dir(self) -> Path:
        """Folder for imported base models: one subfolder per digest."""
        return self.data_dir / "bases"

    def work_dir(self) -> Path:
        """Folder for the trainers' directories. It is safe to delete while no worker runs."""
        return self.data_dir / "work"

    def notification_path(self) -> Path:
        """Wake-up file without a broker: API servers touch it, and workers on the same data folder watch it."""
        return self.work_dir() / "notification"


def _parts(text: str) -> list[str]:
    """Return the parts between commas that are not blank."""
    return [part.strip() for part in text.split(",") if part.strip()]


def unknown_variables(given: Mapping[str, str]) -> list[str]:
    """Return a warning for each variable LORRY_… that is set and has no effect. Values do not appear."""
    known = {name.upper() for name in Settings.model_fields} | OF_API_SERVER | OF_OTHERS
    warnings: list[str] = []
    for variable in sorted(given):
        name = variable.upper().removeprefix(PREFIX)
        if not variable.upper().startswith(PREFIX) or name in known or not given[variable]:
            continue
        if name.startswith(OF_TESTS) or LINKED_SERVICE.fullmatch(name) or given[variable].startswith("tcp://"):
            continue
        similar = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.7)
        fix = f"Did you mean {PREFIX}{similar[0]}?" if similar else "Unset it, or see the reference of settings."
        warnings.append(f"{variable} is not a setting of this version of Lorry, so it has no effect. {fix}")
    return warnings
