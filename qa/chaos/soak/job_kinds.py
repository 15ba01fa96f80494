"""The jobs of a soak: a few kinds, each with several seeds, and the expected bytes of their adapters.

A job's bytes depend on its kind and seed only, and not on packmates or interruptions.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from catalog.states import EndReason
from qa.chaos.service import FaultSite
from tests import tiny_base
from tests.worker_site import BASE

NUM_ROWS = 40
VALID_ROWS = 8
EPOCHS = 100
"""More than any job needs, so that max_steps ends it."""
Body = dict[str, Any]


def _sft(batch_size: int, **fields: Any) -> Body:
    return {"training_file": "chats", "hyperparameters": {"batch_size": batch_size, "n_epochs": EPOCHS}, **fields}


def _dpo(batch_size: int, *, loss_type: str, **fields: Any) -> Body:
    given = {"batch_size": batch_size, "n_epochs": EPOCHS, "loss_type": loss_type}
    return {"training_file": "pairs", "method": {"type": "dpo", "dpo": {"hyperparameters": given}}, **fields}


KINDS: dict[str, Body] = {
    "sft": _sft(4, lora={"rank": 8}, max_steps=240),
    "sft-dropout": _sft(
        4,
        lora={"rank": 4, "dropout": 0.1, "target_modules": ["q_proj", "v_proj"]},
        schedule={"type": "cosine"},
        max_steps=300,
    ),
    "sft-validated": _sft(
        4,
        validation_file="valid",
        evaluation={"every_steps": 50, "keep": "best"},
        lora={"rank": 16},
        max_steps=200,
    ),
    "sft-short": _sft(8, lora={"rank": 32}, max_length=32, max_steps=160),
    "dpo": _dpo(4, loss_type="sigmoid", lora={"rank": 8}, max_steps=150),
    "dpo-ipo": _dpo(2, loss_type="ipo", lora={"rank": 4}, max_steps=200),
}
"""The request bodies, with names of files instead of ids."""


def works(seeds: int) -> dict[str, Body]:
    """Return the request bodies of all works by their names, with alternating kinds."""
    same = {"model": BASE, "precision": "float32", "checkpoint_every_steps": 20}
    return {f"{name}-{seed}": {**same, **KINDS[name], "seed": seed} for seed in range(1, seeds + 1) for name in KINDS}


def with_ids(body: Body, files: Mapping[str, str]) -> Body:
    """Replace the names of files by their ids."""
    return {**body, **{name: files[body[name]] for name in ("training_file", "validation_file") if name in body}}


def upload(site: FaultSite) -> dict[str, str]:
    """Upload the data files over HTTP, as a user would. Returns their ids by name."""
    ids: dict[str, str] = {}
    for name, write in (
        ("chats", partial(tiny_base.write_chat, count=NUM_ROWS)),
        ("pairs", partial(tiny_base.write_pairs, count=NUM_ROWS)),
        ("valid", partial(tiny_base.write_chat, count=VALID_ROWS, seed=1)),
    ):
        path = write(site.folder / f"{name}.jsonl")
        answer = site.ask("POST", "/v1/files", data={"purpose": "fine-tune"}, files={"file": path.open("rb")})
        assert answer.status_code == 200, answer.text
        ids[name] = answer.json()["id"]
    return ids


def train_alone(site: FaultSite, every: Mapping[str, Body]) -> dict[str, str]:
    """Train each work without packmates and faults. Returns the digests of their weights."""
    site.start_api()
    files, ids = upload(site), dict[str, str]()
    for name, body in every.items():
        answer = site.post_job(idempotency_key=name, **with_ids(body, files))
        assert answer.status_code == 200, answer.text
        ids[name] = answer.json()["id"]
    site.work_until_done(LORRY_MAX_JOBS_PER_TRAINER="1", LORRY_IDLE_SECONDS="2")
    for job_id in ids.values():
        site.assert_attempts(job_id, EndReason.COMPLETED)
    return {name: site.weights_digest(job_id) for name, job_id in ids.items()}
