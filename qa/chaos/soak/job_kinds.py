"""The jobs of a soak: a few kinds, each with several seeds, and the expected bytes of their adapters.

A job's bytes depend on its kind and seed only, and not on packmates or interruptions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qa.chaos.service import FaultSite
from tests import tiny_base

NUM_ROWS = 40
VALID_ROWS = 8
EPOCHS = 100
"""More than any job needs, so that max_steps ends it."""
Writer = Callable[[Path, int], object]


@dataclass(frozen=True, kw_only=True, slots=True)
class Kind:
    """A job's request body, except its files and seed."""

    name: str
    body: Mapping[str, Any]
    is_preference: bool = False
    has_validation: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """A kind with a seed, which determine the bytes of the adapter."""

    kind: Kind
    seed: int

    @property
    def name(self) -> str:
        return f"{self.kind.name}-{self.seed}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Files:
    """Ids of the kinds' data files, in one project."""

    chats: str
    pairs: str
    valid: str


def _sft(batch_size: int, **numbers: Any) -> dict[str, Any]:
    return {"hyperparameters": {"batch_size": batch_size, "n_epochs": EPOCHS, **numbers}}


def _dpo(batch_size: int, **numbers: Any) -> dict[str, Any]:
    given = {"batch_size": batch_size, "n_epochs": EPOCHS, **numbers}
    return {"method": {"type": "dpo", "dpo": {"hyperparameters": given}}}


KINDS = (
    Kind(
        name="sft",
        body={**_sft(4), "lora": {"rank": 8}, "max_steps": 240, "checkpoint_every_steps": 20},
    ),
    Kind(
        name="sft-dropout",
        body={
            **_sft(4),
            "lora": {"rank": 4, "dropout": 0.1, "target_modules": ["q_proj", "v_proj"]},
            "schedule": {"type": "cosine"},
            "max_steps": 300,
            "checkpoint_every_steps": 20,
        },
    ),
    Kind(
        name="sft-validated",
        body={
            **_sft(4),
            "lora": {"rank": 16},
            "evaluation": {"every_steps": 50, "keep": "best"},
            "max_steps": 200,
            "checkpoint_every_steps": 20,
        },
        has_validation=True,
    ),
    Kind(
        name="sft-short",
        body={**_sft(8), "lora": {"rank": 32}, "max_length": 32, "max_steps": 160, "checkpoint_every_steps": 20},
    ),
    Kind(
        name="dpo",
        body={**_dpo(4), "lora": {"rank": 8}, "max_steps": 150, "checkpoint_every_steps": 20},
        is_preference=True,
    ),
    Kind(
        name="dpo-ipo",
        body={**_dpo(2, loss_type="ipo"), "lora": {"rank": 4}, "max_steps": 200, "checkpoint_every_steps": 20},
        is_preference=True,
    ),
)


@dataclass(kw_only=True, slots=True)
class Undisturbed:
    """The digest of each work's adapter without packmates and faults, and the training time in seconds."""

    digests: dict[str, str] = field(default_factory=dict[str, str])
    seconds: dict[str, float] = field(default_factory=dict[str, float])


def works(seeds: int) -> list[Work]:
    """Return all works, with alternating kinds."""
    return [Work(kind=kind, seed=seed) for seed in range(1, seeds + 1) for kind in KINDS]


def upload(site: FaultSite) -> Files:
    """Upload the data files over HTTP, as a user would."""

    def send(name: str, write: Writer, rows: int) -> str:
        path = site.folder / name
        write(path, rows)
        answer = site.ask("POST", "/v1/files", data={"purpose": "fine-tune"}, files={"file": path.open("rb")})
        assert answer.status_code == 200, answer.text
        return answer.json()["id"]

    return Files(
        chats=send("chats.jsonl", tiny_base.write_chat, NUM_ROWS),
        pairs=send("pairs.jsonl", tiny_base.write_pairs, NUM_ROWS),
        valid=send("valid.jsonl", lambda path, rows: tiny_base.write_chat(path, rows, seed=1), VALID_ROWS),
    )


def fields(work: Work, files: Files) -> dict[str, Any]:
    """Return the job's request body, except the fields that `FaultSite.post_job` adds."""
    validation = {"validation_file": files.valid} if work.kind.has_validation else {}
    return {**work.kind.body, **validation, "seed": work.seed}


def train_alone(site: FaultSite, every: list[Work]) -> Undisturbed:
    """Train each work without packmates and faults."""
    site.start_api()
    files, found = upload(site), Undisturbed()
    ids: dict[str, str] = {}
    for work in every:
        training_file = files.pairs if work.kind.is_preference else files.chats
        answer = site.post_job(training_file, idempotency_key=work.name, **fields(work, files))
        assert answer.status_code == 200, answer.text
        ids[work.name] = answer.json()["id"]
    site.work_until_done(LORRY_MAX_JOBS_PER_TRAINER="1", LORRY_IDLE_SECONDS="2")
    for name, job_id in ids.items():
        assert site.reasons(job_id) == ["completed"], site.attempts_text(job_id)
        (attempt,) = site.attempts(job_id)
        found.digests[name] = site.weights_digest(job_id)
        found.seconds[name] = attempt.ended_at - attempt.started_at
    return found
