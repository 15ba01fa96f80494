# pyright: basic
"""A job's unit of work: one optimizer step or one pass over the validation set, cut into slices (micro-batches)."""

from collections.abc import Iterable
from dataclasses import dataclass

from lora_core.config import JobConfig, Kind
from lora_core.data.token_dataset import TokenDataset, cut_slices, rows_of_examples


@dataclass(frozen=True, kw_only=True, slots=True)
class Unit:
    """An optimizer step or an evaluation: its slices (tuples of row numbers in `dataset`) and its total counts.

    The loss is a mean over `num_terms` labels, pairs or single answers. Token accuracy is a mean over
    `num_accuracy_labels`: all labels, or those of the chosen answers of pairs. `measures_point` marks the pass that
    measures KTO's reference point before a step or evaluation (kto_pairs.py). Its loss is not accumulated.
    """

    kind: Kind
    dataset: TokenDataset
    slices: tuple[tuple[int, ...], ...]
    tokens_of_slices: tuple[int, ...]
    num_labels: int
    num_tokens: int
    num_terms: int
    num_accuracy_labels: int
    measures_point: bool = False


def make_unit(kind: Kind, dataset: TokenDataset, examples: Iterable[int], config: JobConfig) -> Unit:
    """Cut the examples, in order, into slices. An example is a row, or a pair of rows that is never split."""
    width = config.objective.rows_per_example
    lengths, examples = dataset.row_lengths(), list(examples)
    cuts = cut_slices(examples, lengths.reshape(-1, width).sum(axis=1), slice_tokens=config.slice_tokens)
    slices = tuple(rows_of_examples(cut, width) for cut in cuts)
    grades = config.objective.grades_sequences  # each row has exactly one label then
    labels = [1 if grades else int(dataset.row(row)[1].sum()) for part in slices for row in part]
    tokens_of_slices = tuple(int(lengths[list(part)].sum()) for part in slices)
    return Unit(
        kind=kind,
        dataset=dataset,
        slices=slices,
        tokens_of_slices=tokens_of_slices,
        num_labels=sum(labels),
        num_tokens=sum(tokens_of_slices),
        num_terms=len(examples) if config.objective.is_preference else sum(labels),
        num_accuracy_labels=sum(labels[::width]),
    )
