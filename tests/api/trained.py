"""A succeeded job, with its adapter files in the store and its lineage record."""

from __future__ import annotations

import json
from pathlib import Path

from api.deps import Services
from catalog.history import queries
from catalog.lifecycle import recording
from catalog.queue import claims
from catalog.queue.claiming import Claim
from catalog.registry import base_models, lineage
from catalog.registry.lineage import AttemptRecord, DataSource
from catalog.storage.manifest import files_digest
from catalog.tables.storage import Adapter, File
from tests.catalog.world import DESCRIPTION, World, claim_import_of, sha

BASE = "solid"
CONTENT = {"adapter_config.json": b'{"r": 16}', "adapter_model.safetensors": bytes(range(256)) * 40, "README.md": b"x"}
EVALUATION = {"base_loss": 2.0, "loss": 1.0, "base_perplexity": 7.4, "perplexity": 2.7}
VERIFICATION = {"passed": True, "max_abs_diff": 0.0, "tolerance": 0.01}


def solid_base(world: World) -> None:
    """Add a base model whose digest is that of its files, as lineage requires. Repeatable."""
    files = {"files": [{"path": "config.json", "digest": sha("config"), "num_bytes": 6}]}
    if base_models.add(world.db, name=BASE, kind="folder", source="/models/solid").state == "ready":
        return
    claim_id, digest = claim_import_of(world.db, BASE), files_digest(files)
    base_models.finish_import(world.db, claim_id, digest=digest, manifest=files, description=DESCRIPTION)


def stored_weights(services: Services, folder: Path) -> recording.Exported:
    """Store the weights of a checkpoint as an adapter."""
    folder.mkdir()
    for name, content in CONTENT.items():
        (folder / name).write_bytes(content)
    files = services.store.put_folder(folder, kind="adapter")
    record = {"outputs": {"num_parameters": 10, "artifact": files.digest}}
    return recording.Exported(artifact=files, lineage=record, lineage_id="1" * 64)


def trained(services: Services, world: World, folder: Path, *, suffix: str = "docs") -> Adapter:
    """Register a worker and a base model, and complete a job on them."""
    world.worker()
    solid_base(world)
    return complete(services, world, world.running(suffix=suffix, model=BASE), folder)


def complete(
    services: Services,
    world: World,
    claim: Claim,
    folder: Path,
    *,
    weights: bytes = CONTENT["adapter_model.safetensors"],
    trainer: dict[str, str] | None = None,
) -> Adapter:
    """Complete the claimed job with a lineage record as a worker builds it. `trainer` describes its machine."""
    folder.mkdir()
    for name, content in {**CONTENT, "adapter_model.safetensors": weights}.items():
        (folder / name).write_bytes(content)
    manifest = services.store.put_folder(folder, kind="adapter")
    with world.db.read() as session:
        file = session.get_one(File, claim.job.training_file)
    (attempt,) = queries.attempts(world.db, project_id=claim.job.project_id, job_id=claim.job.id)
    record = lineage.build(
        job=claim.job,
        base=base_models.get(world.db, BASE),
        adapter=manifest,
        num_parameters=10,
        data=[DataSource(role="training", file=file, tokens=sha("tokens"), report={})],
        attempts=[AttemptRecord(attempt=attempt, trainer=trainer or {})],
        results={
            "loss_log": sha("losses"),
            "determinism": "bitwise",
            "evaluation": EVALUATION,
            "verification": VERIFICATION,
        },
        code={"lorry": "0.1.0"},
    )
    return claims.complete(
        world.db,
        claim.claim_id,
        artifact=manifest,
        num_parameters=10,
        verification=VERIFICATION,
        evaluation=EVALUATION,
        trained_tokens=500,
        course=claims.Course(steps=3, kept_step=3, stopped_early=None),
        curves=services.store.put_bytes(b"step,train_loss\n"),
        lineage=json.loads(json.dumps(record)),
        lineage_id=lineage.lineage_id(record),
    )
