# pyright: basic
"""Creates a job for an engine: its adapter, its checkpoint, the parent that it continues, and its reference model."""

from pathlib import Path

import torch

from lora_core.adapter.flat_adapter import FlatAdapter
from lora_core.adapter.modules_to_save import TrainedTensors
from lora_core.base_model.model import BaseModel
from lora_core.base_model.patching import choose_targets, frozen_weights
from lora_core.config import JobConfig, LoraConfig, ObjectiveConfig, OptimizerKind
from lora_core.data.kto_pairs import check_unpaired
from lora_core.data.token_dataset import TokenDataset, check_examples, check_labels, data_digest
from lora_core.distributed.ranks import Ranks
from lora_core.engine import checkpoint
from lora_core.engine.job import TrainingJob, TrainingProgress
from lora_core.errors import BadDataset, ConfigError
from lora_core.forward.classification import refuse_other_task, trained_tensors
from lora_core.peft_format.load_parent import begin_from, lora_config_of, refuse_other_start
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
) -> TrainingJob:
    """Create the job. Its adapter may still have to be initialized. Raises the same errors as Engine.admit."""
    check_job(base, config, train, valid)
    if parent is not None:
        refuse_other_start(config.lora)
    with shortage_of(name):
        adapter, parent_sha256, progress = _new_adapter(base, config), None, TrainingProgress()
        if parent is not None:
            adapter.begin_in_full(config.seed)
            parent_sha256 = begin_from(adapter, Path(parent), base)
        reference = _reference(base, adapter, config, has_parent=parent is not None)
        best = torch.zeros_like(adapter.p) if config.keep == "best" else None
        if resume_from is not None:
            data = data_digest(train, valid)
            expected = checkpoint.fingerprint(base, config, data_digest=data, parent_sha256=parent_sha256)
            progress = checkpoint.load_checkpoint(Path(resume_from), adapter=adapter, best=best, expected=expected)
        return TrainingJob(
            name,
            config,
            adapter=adapter,
            train=train,
            valid=valid,
            progress=progress,
            best=best,
            is_started=parent is not None or resume_from is not None,
            reference=reference,
            parent_sha256=parent_sha256,
            ranks=ranks,
        )


def _new_adapter(base: BaseModel, config: JobConfig, *, is_trained: bool = True) -> FlatAdapter:
    trained, optimizer = trained_tensors(base, config.lora, config.objective), config.optimizer.kind
    return _adapter_on(base, config.lora, trained, optimizer=optimizer, is_trained=is_trained)


def _adapter_on(
    base: BaseModel, lora: LoraConfig, trained: TrainedTensors, *, optimizer: OptimizerKind, is_trained: bool
) -> FlatAdapter:
    assert base.attachment is not None
    linears = base.attachment.linears
    targets = choose_targets(linears, lora)
    return FlatAdapter(
        targets,
        lora,
        dtype=base.dtype,
        device=base.device,
        frozen=frozen_weights(linears, targets, lora),
        trained=trained,
        optimizer=optimizer,
        is_trained=is_trained,
    )


def load_adapter(base: BaseModel, directory: Path) -> FlatAdapter:
    """Load an adapter of a causal language model in PEFT's layout, for inference.

    Raises BadParent, NoTargets and ConfigError if it does not belong to the base model.
    """
    lora = lora_config_of(directory)
    trained = trained_tensors(base, lora, ObjectiveConfig())
    adapter = _adapter_on(base, lora, trained, optimizer="adamw", is_trained=False)
    begin_from(adapter, directory, base)
    return adapter


def _reference(base: BaseModel, adapter: FlatAdapter, config: JobConfig, *, has_parent: bool) -> FlatAdapter | None:
    """Return the objective's reference model: a copy of the parent adapter, or the base model without an adapter."""
    if not config.objective.needs_reference:
        return None
    if not has_parent:
        return empty_adapter(base)
    reference = _new_adapter(base, config, is_trained=False)
    reference.p.copy_(adapter.p)
    reference.refresh_compute()
    return reference


def empty_adapter(base: BaseModel) -> FlatAdapter:
    """Return an adapter without layers, which stands for the base model."""
    return FlatAdapter((), LoraConfig(rank=1, alpha=1), dtype=base.dtype, device=base.device, is_trained=False)


def check_job(base: BaseModel, config: JobConfig, train: TokenDataset, valid: TokenDataset | None) -> None:
    """Check that the base model can train the job.

    Raises ConfigError if the base model does not support the objective, or if the job needs a validation set and has
    none. Raises BadDataset if the data doesn't fit the base model or the objective.
    """
    refuse_other_task(base, config.objective)
    if valid is None and config.needs_evaluation:
        raise ConfigError(
            "Early stopping and keeping the best weights need a validation set, but the job has none.",
            remedy="Provide a validation set, or omit early_stopping and set keep to 'last'.",
        )
    for dataset in filter(None, (train, valid)):
        _check_fits(dataset, base)
        check_examples(dataset, config.objective.rows_per_example)
        if config.objective.kind == "classification":
            check_labels(dataset, config.objective.num_labels)
        if config.objective.kind == "kto":
            check_unpaired(dataset)


def _check_fits(dataset: TokenDataset, base: BaseModel) -> None:
    largest, longest = int(dataset.input_ids.max()), int(dataset.row_lengths().max())
    if largest >= base.vocab_size:
        raise BadDataset(
            f"The data contains the token ID {largest}, but the base model's largest ID is {base.vocab_size - 1}.",
            remedy="Tokenize the data with this base model's tokenizer.",
        )
    _check_types(dataset, base)
    if base.max_positions is not None and longest > base.max_positions:
        raise BadDataset(
            f"A row has {longest} tokens, but the base model supports at most {base.max_positions}.",
            remedy="Shorten or split the long rows, or lower max_length.",
        )


def _check_types(dataset: TokenDataset, base: BaseModel) -> None:
    """Check token types, by which encoders distinguish the two sentences of a pair."""
    if dataset.token_types is None:
        return
    largest, num_types = int(dataset.token_types.max()), getattr(base.model.config, "type_vocab_size", None) or 0
    if num_types and largest >= num_types:
        raise BadDataset(
            f"The data contains the token type {largest}, but the base model's largest token type is {num_types - 1}.",
            remedy="Tokenize the data with this base model's tokenizer, or omit the token types.",
        )
