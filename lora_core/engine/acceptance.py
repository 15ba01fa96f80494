# pyright: basic
"""What a job must be for the base that it asks for. Refused here, before anything of it is made."""

from lora_core.base_model.model import BaseModel
from lora_core.config import JobConfig
from lora_core.data.kto_pairs import check_unpaired
from lora_core.data.token_dataset import TokenDataset, check_examples, check_labels
from lora_core.errors import BadDataset, ConfigError
from lora_core.forward.classification import refuse_other_task


def check_job(base: BaseModel, config: JobConfig, train: TokenDataset, valid: TokenDataset | None) -> None:
    """Raises ConfigError where the base can't train what the job does, or the job needs a held-out set and has none;
    BadDataset."""
    refuse_other_task(base, config.objective)
    if valid is None and config.needs_evaluation:
        raise ConfigError(
            "Early stopping and keeping the best weights need a held-out set, and the job has none.",
            remedy="Give one, or leave early_stopping out and keep the last weights.",
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
            f"The data holds token {largest}, but the base model has {base.vocab_size} tokens.",
            remedy="Tokenise the data with this base model's tokenizer.",
        )
    _check_types(dataset, base)
    if base.max_positions is not None and longest > base.max_positions:
        raise BadDataset(
            f"A row has {longest} tokens, but the base model takes {base.max_positions}.",
            remedy="Shorten or split the long rows.",
        )


def _check_types(dataset: TokenDataset, base: BaseModel) -> None:
    """Of tokens, as encoders tell the two sentences of a pair apart."""
    if dataset.token_types is None:
        return
    largest, num_types = int(dataset.token_types.max()), getattr(base.model.config, "type_vocab_size", None) or 0
    if num_types and largest >= num_types:
        raise BadDataset(
            f"The data holds token type {largest}, but the base model has {num_types}.",
            remedy="Tokenise the data with this base model's tokenizer, or leave the token types out.",
        )
