"""Jobs that differ in everything that can differ in one pack, and helpers that run them."""

import random
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from torch import Tensor

from lora_core.base_model.model import BaseModel
from lora_core.config import (
    EarlyStoppingConfig,
    JobConfig,
    LoraConfig,
    ObjectiveConfig,
    OptimizerConfig,
    ScheduleConfig,
)
from lora_core.data.token_dataset import TokenDataset
from lora_core.distributed.ranks import ALONE, Ranks
from lora_core.engine.engine import Engine
from lora_core.engine_config import EngineConfig
from lora_core.events import Event, JobFinished

VOCAB = 320


def dataset(seed: int, lengths: list[int]) -> TokenDataset:
    """Return rows of the given lengths with random ids. The second half of each row is supervised."""
    numbers = np.random.default_rng(seed)
    masks = [np.arange(length) >= max(1, length // 2) for length in lengths]
    return TokenDataset(
        input_ids=numbers.integers(0, VOCAB, sum(lengths), dtype=np.int32),
        loss_mask=np.concatenate(masks).astype(np.uint8),
        row_offsets=np.cumsum([0, *lengths]),
    )


def config(
    *,
    rank: int = 4,
    targets: str | tuple[str, ...] = "all-linear",
    dropout: float = 0.0,
    learning_rate: float = 1e-2,
    batch_size: int = 2,
    num_steps: int = 4,
    seed: int = 0,
    evaluate_every_steps: int | None = None,
    slice_tokens: int = 1024,
    objective: ObjectiveConfig | None = None,
) -> JobConfig:
    return JobConfig(
        lora=LoraConfig(rank=rank, alpha=2 * rank, dropout=dropout, target_modules=targets),
        optimizer=OptimizerConfig(learning_rate=learning_rate, weight_decay=0.01),
        schedule=ScheduleConfig(kind="cosine", warmup_steps=1, num_steps=num_steps),
        batch_size=batch_size,
        num_steps=num_steps,
        seed=seed,
        evaluate_every_steps=evaluate_every_steps,
        slice_tokens=slice_tokens,
        objective=objective or ObjectiveConfig(),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Submission:
    config: JobConfig
    train: TokenDataset
    valid: TokenDataset | None = None
    parent: Path | None = None


def submissions(family: str) -> dict[str, Submission]:
    """Return jobs with mixed ranks, targets, dropout, lengths (at least 2 tokens), batch sizes, slices, evaluations."""
    attention = {"llama": ("q_proj", "v_proj"), "gpt2": ("c_attn",)}[family]
    feed_forward = {"llama": "down_proj", "gpt2": "mlp.c_fc"}[family]
    top = {"llama": "layers.1.self_attn.o_proj", "gpt2": "h.1.attn.c_proj"}[family]
    return {
        "plain": Submission(config=config(seed=1), train=dataset(1, [7, 12, 30, 5, 18])),
        "dropout": Submission(
            config=config(rank=8, targets=attention, dropout=0.25, batch_size=3, seed=2, slice_tokens=40),
            train=dataset(2, [33, 21, 9, 2, 50]),
        ),
        "tiny": Submission(
            config=config(rank=1, targets=feed_forward, batch_size=1, seed=3), train=dataset(3, [2, 3, 4])
        ),
        "top_only": Submission(
            config=config(rank=3, targets=top, batch_size=4, num_steps=3, seed=4, evaluate_every_steps=2),
            train=dataset(4, [16, 17, 64, 1 + 14, 40]),
            valid=dataset(40, [11, 23, 6]),
        ),
        "wide": Submission(
            config=config(rank=16, dropout=0.1, batch_size=5, num_steps=2, seed=5, slice_tokens=70),
            train=dataset(5, [80, 13, 27, 44, 8, 19]),
            valid=dataset(50, [90, 31]),
        ),
        **preferences(),
        **methods(),
        **numbers(),
        **trained_in_full(family),
    }


def preferences() -> dict[str, Submission]:
    """Return jobs on pairs of answers of unequal length, in slices of one or several pairs, and on single answers."""
    return {
        "dpo": Submission(
            config=config(
                batch_size=3,
                seed=6,
                evaluate_every_steps=2,
                slice_tokens=60,
                objective=ObjectiveConfig(kind="dpo", beta=0.5, label_smoothing=0.1),
            ),
            train=dataset(6, [9, 14, 31, 22, 5, 40, 3, 2]),
            valid=dataset(60, [12, 25, 8, 7]),
        ),
        "ipo": Submission(
            config=config(
                dropout=0.2, num_steps=3, seed=7, objective=ObjectiveConfig(kind="dpo", loss_type="ipo", beta=0.3)
            ),
            train=dataset(7, [18, 6, 27, 33]),
        ),
        "simpo": Submission(
            config=config(rank=2, num_steps=2, seed=8, objective=ObjectiveConfig(kind="simpo", beta=2.0, gamma=1.0)),
            train=dataset(8, [11, 21, 16, 4, 35, 36]),
        ),
        "orpo": Submission(
            config=config(batch_size=1, num_steps=2, seed=9, objective=ObjectiveConfig(kind="orpo")),
            train=dataset(9, [20, 13, 8, 30]),
        ),
        "kto": Submission(
            config=config(
                dropout=0.1,
                batch_size=3,
                num_steps=3,
                seed=18,
                evaluate_every_steps=2,
                slice_tokens=40,
                objective=ObjectiveConfig(kind="kto", beta=0.4, desirable_weight=1.5),
            ),
            train=rated(dataset(18, [17, 6, 28, 11, 34]), "10110"),
            valid=rated(dataset(61, [9, 26, 13]), "011"),
        ),
    }


def rated(answers: TokenDataset, marks: str) -> TokenDataset:
    """Return `answers` with their labels: 1 for desirable, else 0."""
    return replace(answers, labels=np.array([float(mark) for mark in marks], np.float32))


def methods() -> dict[str, Submission]:
    """Return jobs with DoRA with and without dropout, LoRA+, ranks by pattern and selected layers, alone and mixed."""
    dora = config(rank=3, num_steps=3, seed=10, slice_tokens=40)
    dropped = config(rank=5, dropout=0.3, batch_size=3, num_steps=2, seed=11)
    uneven = config(rank=4, targets=r"re:.*\d\.(mlp|self_attn|attn)\..*", num_steps=3, seed=12)
    patterns = ((r"1\.\w+\.(down_proj|c_proj)", 2), ("q_proj|c_attn", 7))
    return {
        "dora": Submission(
            config=replace(dora, lora=replace(dora.lora, use_dora=True)), train=dataset(10, [13, 4, 29, 18])
        ),
        "dora_dropout": Submission(
            config=replace(
                dropped,
                lora=replace(dropped.lora, use_dora=True, layers_to_transform=(1,)),
                optimizer=replace(dropped.optimizer, lora_plus_ratio=4.0),
            ),
            train=dataset(11, [7, 22, 15]),
        ),
        "uneven_ranks": Submission(
            config=replace(
                uneven,
                lora=replace(uneven.lora, rank_pattern=patterns, alpha_pattern=((".*0.*", 3.0),)),
                optimizer=replace(uneven.optimizer, lora_plus_ratio=16.0),
            ),
            train=dataset(12, [17, 9, 26]),
        ),
        **starts(),
    }


def numbers() -> dict[str, Submission]:
    """Return jobs with other optimizers and schedules, noise on embeddings, smoothed labels, and early stopping.

    The job with early stopping keeps the weights of an earlier evaluation.
    """
    sgd = config(rank=6, dropout=0.1, batch_size=3, num_steps=5, seed=13, slice_tokens=50)
    factored = config(rank=3, dropout=0.1, batch_size=3, num_steps=5, seed=17, slice_tokens=40)
    momentum = OptimizerConfig(kind="sgd", learning_rate=0.5, momentum=0.9, weight_decay=0.01, lora_plus_ratio=2.0)
    return {
        "sgd_wsd": Submission(
            config=replace(
                sgd,
                optimizer=momentum,
                schedule=ScheduleConfig(kind="wsd", warmup_steps=1, decay_steps=2, num_steps=5),
            ),
            train=dataset(13, [24, 10, 41, 6]),
        ),
        "adafactor": Submission(
            config=replace(
                factored,
                lora=replace(factored.lora, use_dora=True),
                optimizer=OptimizerConfig(
                    kind="adafactor", learning_rate=0.3, weight_decay=0.01, lora_plus_ratio=2.0, scale_floor=0.05
                ),
            ),
            train=dataset(17, [21, 8, 13, 35]),
        ),
        "noisy_smooth": Submission(
            config=replace(
                config(
                    rank=3,
                    dropout=0.1,
                    batch_size=3,
                    num_steps=3,
                    seed=15,
                    evaluate_every_steps=2,
                    slice_tokens=40,
                    objective=ObjectiveConfig(label_smoothing=0.1),
                ),
                neftune_alpha=5.0,
            ),
            train=dataset(15, [19, 7, 33, 12]),
            valid=dataset(42, [9, 16]),
        ),
        "early_best": Submission(
            config=replace(
                config(rank=2, learning_rate=0.06, num_steps=30, seed=14, evaluate_every_steps=1, slice_tokens=30),
                early_stopping=EarlyStoppingConfig(patience=2, min_delta=0.01),
                keep="best",
            ),
            train=dataset(14, [9, 14, 22]),
            valid=dataset(41, [15, 8]),
        ),
    }


def trained_in_full(family: str) -> dict[str, Submission]:
    """Return jobs that train the output head (also of the tied base), token embeddings, and both on the untied base."""
    lora = {
        "head": {"modules_to_save": ("lm_head",)},
        "tokens": {"trainable_token_indices": (300, 2, 17, *range(100, 140))},
    }
    if family == "llama":
        lora["head_and_tokens"] = lora["head"] | lora["tokens"]
    objectives = {"tokens": ObjectiveConfig(kind="dpo")}
    jobs: dict[str, Submission] = {}
    for index, (name, fields) in enumerate(lora.items()):
        plain = config(
            rank=2, dropout=0.1, num_steps=3, seed=20 + index, slice_tokens=50, objective=objectives.get(name)
        )
        job = replace(
            plain, lora=replace(plain.lora, **fields), optimizer=replace(plain.optimizer, lora_plus_ratio=2.0)
        )
        jobs[name] = Submission(config=job, train=dataset(20 + index, [14, 31, 9, 22]))
    return jobs


def starts() -> dict[str, Submission]:
    """Return jobs initialized from base weights (PiSSA, OLoRA): with ranks by pattern, and with DoRA and dropout."""
    pissa = config(num_steps=3, seed=15, slice_tokens=20, learning_rate=2e-3)
    olora = config(rank=2, dropout=0.2, num_steps=3, seed=16, slice_tokens=16, learning_rate=2e-3)
    return {
        "pissa": Submission(
            config=replace(
                pissa,
                lora=replace(
                    pissa.lora, init_lora_weights="pissa_niter_2", use_rslora=True, rank_pattern=(("q_proj|c_attn", 3),)
                ),
            ),
            train=dataset(15, [14, 31, 8, 22]),
        ),
        "olora_dora": Submission(
            config=replace(olora, lora=replace(olora.lora, init_lora_weights="olora", use_dora=True)),
            train=dataset(16, [19, 6, 12]),
        ),
    }


def admit(engine: Engine, name: str, submission: Submission, **options) -> None:
    engine.admit(name, submission.config, submission.train, submission.valid, parent=submission.parent, **options)


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """The result of a job: the bytes of its weights and optimizer state, and its events."""

    vectors: bytes
    events: tuple[Event, ...]


def state_bytes(engine: Engine, job: str) -> bytes:
    adapter = engine._jobs[job].adapter
    return b"".join(vector.numpy().tobytes() for vector in (adapter.p, adapter.m, adapter.v))


def weights(engine: Engine, job: str) -> Tensor:
    return engine._jobs[job].adapter.p


def run_alone(base: BaseModel, submission: Submission, *, token_budget: int = 4096, **options) -> Outcome:
    engine = Engine(base, EngineConfig(token_budget=token_budget, **options))
    admit(engine, "job", submission)
    events: list[Event] = []
    while not engine.idle:
        events += engine.tick()
    return Outcome(vectors=state_bytes(engine, "job"), events=rename(events, "job"))


def rename(events: list[Event], job: str) -> tuple[Event, ...]:
    """Return the events of `job` under one common name, so that outcomes can be compared."""
    return tuple(replace(event, job="job") for event in events if event.job == job)


def run_elastically(
    base: BaseModel,
    jobs: dict[str, Submission],
    *,
    token_budget: int,
    seed: int,
    victim: str,
    ranks: Ranks = ALONE,
    **options,
) -> dict[str, Outcome]:
    """Admit the jobs in random order at every other tick. Finished jobs leave at once; `victim` leaves after one step.

    options: further options of the engine.
    """
    engine = Engine(base, EngineConfig(token_budget=token_budget, **options), ranks)
    order = sorted(jobs)
    random.Random(seed).shuffle(order)
    events: list[Event] = []
    outcomes: dict[str, Outcome] = {}
    num_ticks = 0
    while order or not engine.idle:
        if order and num_ticks % 2 == 0:
            name = order.pop()
            admit(engine, name, jobs[name])
        new = engine.tick()
        events += new
        num_ticks += 1
        for event in new:
            if isinstance(event, JobFinished):
                vectors = state_bytes(engine, event.job)
                outcomes[event.job] = Outcome(vectors=vectors, events=rename(events, event.job))
                engine.evict(event.job)
        if victim in engine.jobs() and engine.progress(victim)[0] >= 1:
            engine.evict(victim)
    return outcomes


def text_dataset(base_dir) -> TokenDataset:
    """Return a few English sentences, tokenized for the base model. All tokens except the first are supervised."""
    from transformers import AutoTokenizer

    sentences = [
        "The lorry left the harbour before dawn with forty crates of oranges.",
        "Water boils at one hundred degrees Celsius at sea level, and earlier in the mountains.",
        "She counted the change twice, because the first time she had been talking.",
    ]
    tokenizer = AutoTokenizer.from_pretrained(base_dir)
    rows = [np.array(tokenizer(sentence)["input_ids"], np.int32) for sentence in sentences]
    return TokenDataset(
        input_ids=np.concatenate(rows),
        loss_mask=np.concatenate([np.arange(len(row)) > 0 for row in rows]).astype(np.uint8),
        row_offsets=np.cumsum([0, *map(len, rows)]),
    )
