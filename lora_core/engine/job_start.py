# pyright: basic
"""A job as an engine takes it in: its row on the base, where it resumes, what it continues and compares with."""

from pathlib import Path

import torch

from lora_core.adapter.flat_adapter import AdapterRow
from lora_core.base_model.model import BaseModel
from lora_core.base_model.patching import choose_targets, frozen_weights
from lora_core.config import JobConfig
from lora_core.data.token_dataset import TokenDataset, data_digest
from lora_core.distributed.ranks import Ranks
from lora_core.engine import checkpoint
from lora_core.engine.acceptance import check_job
from lora_core.engine.job import Job, Progress
from lora_core.forward.classification import trained_tensors
from lora_core.peft_format.load_parent import begin_from, refuse_other_start
from lora_core.runtime.device_errors import shortage_of


def job_on(
    base: BaseModel,
    name: str,
    config: JobConfig,
    train: TokenDataset,
    valid: TokenDataset | None,
    *,
    resume_from: Path | str | None,
    parent: Path | str | None,
    ranks: Ranks,
) -> Job:
    """It may still have to start. Raises as Engine.admit does."""
    check_job(base, config, train, valid)
    if parent is not None:
        refuse_other_start(config.lora)
    with shortage_of(name):
        row, parent_sha256, progress = _new_row(base, config), None, Progress()
        if parent is not None:
            row.begin_in_full(config.seed)
            parent_sha256 = begin_from(row, Path(parent), base)
        reference = _reference(base, row, config, has_parent=parent is not None)
        best = torch.zeros_like(row.p) if config.keep == "best" else None
        if resume_from is not None:
            data = data_digest(train, valid)
            expected = checkpoint.belonging(base, config, data_digest=data, parent_sha256=parent_sha256)
            progress = checkpoint.load_checkpoint(Path(resume_from), row=row, best=best, expected=expected)
        return Job(
            name,
            config,
            row=row,
            train=train,
            valid=valid,
            progress=progress,
            best=best,
            is_started=parent is not None or resume_from is not None,
            reference=reference,
            parent_sha256=parent_sha256,
            ranks=ranks,
        )


def _new_row(base: BaseModel, config: JobConfig, *, is_trained: bool = True) -> AdapterRow:
    assert base.attachment is not None
    linears = base.attachment.linears
    targets = choose_targets(linears, config.lora)
    return AdapterRow(
        targets,
        config.lora,
        dtype=base.dtype,
        device=base.device,
        frozen=frozen_weights(linears, targets, config.lora),
        trained=trained_tensors(base, config),
        optimizer=config.optimizer.kind,
        is_trained=is_trained,
    )


def _reference(base: BaseModel, row: AdapterRow, config: JobConfig, *, has_parent: bool) -> AdapterRow | None:
    """What the objective compares with: the adapter that `row` begins with, or none on the base model."""
    if not config.objective.needs_reference:
        return None
    if not has_parent:
        return AdapterRow((), config.lora, dtype=base.dtype, device=base.device, is_trained=False)
    reference = _new_row(base, config, is_trained=False)
    reference.p.copy_(row.p)
    reference.refresh_compute()
    return reference
