"""Tiny random base models of each classification family, and jobs on them."""

from dataclasses import replace
from pathlib import Path

import numpy as np
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForPreTraining

from lora_core.base_model.model import BaseModel, load_base
from lora_core.config import ObjectiveConfig
from lora_core.data.token_dataset import TokenDataset
from tests import tiny_models
from tests.lora_core.scenarios import VOCAB, Submission, config, dataset

FAMILIES = {
    "llama": {},
    "gpt2": {"n_positions": 256},
    "bert": {},
    "roberta": {"pad_token_id": 1, "max_position_embeddings": 130},
    "xlm-roberta": {"pad_token_id": 1, "max_position_embeddings": 130},
    "modernbert": {"local_attention": 16, "global_attn_every_n_layers": 2, "classifier_pooling": "mean"},
}


def save(family: str, folder: Path) -> Path:
    """Save a typical checkpoint: a causal or masked language model, or BERT's pretraining model, which has a pooler."""
    kinds = {"llama": AutoModelForCausalLM, "gpt2": AutoModelForCausalLM, "bert": AutoModelForPreTraining}
    return tiny_models.save(family, folder, kind=kinds.get(family, AutoModelForMaskedLM), **FAMILIES[family])


def classifier(family: str, folder: Path, dtype: str = "float32") -> BaseModel:
    if not folder.exists():
        save(family, folder)
    return load_base(folder, dtype=dtype, device="cpu", task="sequence-classification")  # pyright: ignore[reportArgumentType]


def classified(seed: int, lengths: list[int], *, num_labels: int, with_types: bool = False) -> TokenDataset:
    """Return rows whose second token determines the class. Targets of a regression lie between -1 and 1."""
    rows = dataset(seed, lengths)
    ids, starts = rows.input_ids.copy(), rows.row_offsets[:-1]
    random = np.random.default_rng(seed)
    ids[ids < 3] += 3  # no padding token within a row
    labels = random.integers(0, num_labels, len(lengths)) if num_labels > 1 else random.uniform(-1, 1, len(lengths))
    ids[starts + 1] = 10 + labels.astype(np.int32) if num_labels > 1 else ids[starts + 1]
    types = (rows.loss_mask if with_types else np.zeros_like(rows.loss_mask)).astype(np.uint8)
    return TokenDataset(
        input_ids=ids,
        loss_mask=np.zeros_like(rows.loss_mask),
        row_offsets=rows.row_offsets,
        labels=labels.astype(np.float32),
        token_types=types if with_types else None,
    )


def classification_jobs(*, with_types: bool = False) -> dict[str, Submission]:
    """Return jobs with different numbers of classes, a regression and a reward model, each with its own head."""
    three = ObjectiveConfig(kind="classification", num_labels=3)
    many = ObjectiveConfig(kind="classification", num_labels=17)
    number = ObjectiveConfig(kind="classification", num_labels=1)
    reward = ObjectiveConfig(kind="reward", center_rewards_coefficient=0.05)
    pairs = dataset(34, [9, 14, 31, 22, 5, 40])
    plain = config(rank=3, num_steps=2, seed=32, learning_rate=3e-3)
    tokens = replace(plain, objective=many, lora=replace(plain.lora, trainable_token_indices=(10, 11, 200)))
    return {
        "three": Submission(
            config=config(
                dropout=0.1,
                batch_size=3,
                num_steps=3,
                seed=31,
                slice_tokens=40,
                evaluate_every_steps=2,
                objective=three,
            ),
            train=classified(31, [12, 25, 9, 31, 17, 2], num_labels=3, with_types=with_types),
            valid=classified(41, [11, 20, 6], num_labels=3, with_types=with_types),
        ),
        "many": Submission(config=tokens, train=classified(32, [30, 8, 19], num_labels=17)),
        "number": Submission(
            config=config(rank=2, batch_size=3, num_steps=2, seed=33, objective=number),
            train=classified(33, [7, 13, 40, 26], num_labels=1),
        ),
        "reward": Submission(
            config=config(num_steps=2, seed=34, slice_tokens=30, evaluate_every_steps=2, objective=reward),
            train=replace(pairs, input_ids=np.maximum(pairs.input_ids, 3)),
            valid=dataset(44, [12, 25]),
        ),
    }


__all__ = ["FAMILIES", "VOCAB", "classification_jobs", "classified", "classifier", "save"]
