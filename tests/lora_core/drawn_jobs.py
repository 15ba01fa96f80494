"""Small random jobs by number. Each mixes the options that a job can have, over a few short rows.

The first six jobs together cover every option that changes the computation. All options of later jobs are random. Two
of every eight jobs diverge: the first pass of one gives NaN, and the learning rate of the other ruins it after a step.
"""

from dataclasses import replace
from random import Random

from lora_core.config import (
    EarlyStoppingConfig,
    JobConfig,
    LoraConfig,
    ObjectiveConfig,
    OptimizerConfig,
    ScheduleConfig,
)
from lora_core.data.token_dataset import TokenDataset
from tests.lora_core.scenarios import Submission, dataset, rated

NUM_PLANNED = 6
NAN_AT_ONCE, ABSURD = 6, 7  # values of a number's last three bits
TARGETS = {
    "llama": ("all-linear", ("q_proj", "v_proj"), "down_proj", "layers.1.self_attn.o_proj", r"re:.*\.1\.mlp\..*"),
    "gpt2": ("all-linear", ("c_attn",), "mlp.c_fc", "h.1.attn.c_proj", r"re:.*\.1\.mlp\..*"),
}
OBJECTIVES = (
    ObjectiveConfig(),
    ObjectiveConfig(kind="dpo", beta=0.5, label_smoothing=0.1),
    ObjectiveConfig(label_smoothing=0.1),
    ObjectiveConfig(kind="orpo"),
    ObjectiveConfig(kind="kto", beta=0.4, desirable_weight=1.5),
    ObjectiveConfig(kind="simpo", beta=2.0, gamma=1.0),
    ObjectiveConfig(),
    ObjectiveConfig(kind="dpo", loss_type="ipo", beta=0.3),
)
STARTS = ("default", "gaussian", "pissa", "default", "olora", "pissa_niter_2")
SCHEDULES = ("constant", "linear", "cosine", "wsd")
OPTIMIZERS = ("adamw", "sgd", "adafactor")
HEAD = {"modules_to_save": ("lm_head",)}
TOKENS = {"trainable_token_indices": (300, 2, 17, *range(100, 140))}
IN_FULL = {  # with tied head and embeddings, a job trains only one of them
    "llama": ({}, HEAD, TOKENS, {}, HEAD | TOKENS),
    "gpt2": ({}, HEAD, TOKENS, {}, TOKENS),
}
KEEPS = ("best", "last", "last")
STOPPED_EARLY = (False, False, True, False)
NOISES = (5.0, 0.0)
STEPS = (3, 2, 3, 1, 2)
BATCH_SIZES = (3, 1, 4, 2)
SLICES = (1, 30, 1024)
"""Tokens of a slice. With 1, each row or pair is a separate slice; with three slices, their order is visible."""


def drawn_job(family: str, number: int) -> Submission:
    """Return a job of one to three steps. The same number gives the same job."""
    draw = Random(number)
    num_steps = take(draw, STEPS, number)
    longest = draw.choice([5, 25])
    lengths = [draw.randint(2, longest) for _ in range(draw.choice([4, 6]))]
    objective, keep = take(draw, OBJECTIVES, number), take(draw, KEEPS, number)
    early_stopping = _early_stopping(draw) if take(draw, STOPPED_EARLY, number) else None
    needs_validation = keep == "best" or early_stopping is not None
    fewest = 2 if objective.kind == "kto" else 1
    config = JobConfig(
        lora=_lora(draw, family, number),
        optimizer=_optimizer(draw, number, keep),
        schedule=_schedule(draw, num_steps, number),
        batch_size=max(fewest, take(draw, BATCH_SIZES, number)),
        num_steps=num_steps,
        seed=draw.randrange(1000),
        evaluate_every_steps=1 if needs_validation else draw.choice([None, 1, 2]),
        slice_tokens=take(draw, SLICES, number),
        objective=objective,
        early_stopping=early_stopping,
        keep=keep,
        neftune_alpha=0.0 if objective.is_preference else take(draw, NOISES, number),
    )
    train = dataset(number, lengths)
    valid = dataset(number + 1, lengths[:2]) if needs_validation or draw.random() < 0.4 else None
    if objective.kind == "kto":
        train, valid = _rated(draw, train), None if valid is None else _rated(draw, valid)
    submission = Submission(config=config, train=train, valid=valid)
    return _ruined(submission, number) if number % 8 in (NAN_AT_ONCE, ABSURD) else submission


def _ruined(submission: Submission, number: int) -> Submission:
    """Make the job diverge: in training if it has no validation set, like the first two, else in an evaluation."""
    config = submission.config
    if number % 8 == NAN_AT_ONCE:
        config = replace(config, lora=replace(config.lora, alpha=1e40))
    else:
        schedule = ScheduleConfig(kind="constant", warmup_steps=0, num_steps=3)
        absurd = OptimizerConfig(learning_rate=1e30, weight_decay=0.1)
        config = replace(config, optimizer=absurd, schedule=schedule, num_steps=3)
    if number < 8:
        return replace(submission, config=replace(config, keep="last", early_stopping=None), valid=None)
    return replace(submission, config=config)


def take(draw: Random, choices: tuple, number: int):
    return choices[number % len(choices)] if number < NUM_PLANNED else draw.choice(choices)


def _lora(draw: Random, family: str, number: int) -> LoraConfig:
    return LoraConfig(
        rank=draw.choice([1, 3, 4, 8]),
        alpha=draw.choice([4.0, 9.0]),
        dropout=draw.choice([0.0, 0.0, 0.25]),
        target_modules=draw.choice(TARGETS[family]),
        use_rslora=draw.choice([False, True]),
        use_dora=draw.choice([False, False, True]),
        init_lora_weights=take(draw, STARTS, number),
        **take(draw, IN_FULL[family], number),
    )


def _optimizer(draw: Random, number: int, keep: str) -> OptimizerConfig:
    kind = take(draw, OPTIMIZERS, number)
    return OptimizerConfig(
        kind=kind,
        learning_rate=draw.choice([1e-3, 3e-2]) if keep == "last" else 0.1,  # overshoots soon
        lora_plus_ratio=draw.choice([1.0, 8.0]),
        beta2=draw.choice([0.99, 0.999]),
        momentum=draw.choice([0.5, 0.9]) if kind == "sgd" else 0.0,
        weight_decay=draw.choice([0.0, 0.1]),
        max_grad_norm=draw.choice([None, 0.5]),
    )


def _schedule(draw: Random, num_steps: int, number: int) -> ScheduleConfig:
    kind = take(draw, SCHEDULES, number)
    warmup_steps = draw.randint(0, 1)
    decay_steps = draw.randint(0, num_steps - warmup_steps) if kind == "wsd" else 0
    return ScheduleConfig(kind=kind, warmup_steps=warmup_steps, decay_steps=decay_steps, num_steps=num_steps)


def _early_stopping(draw: Random) -> EarlyStoppingConfig:
    return EarlyStoppingConfig(patience=1, min_delta=draw.choice([0.0, 5.0]))


def _rated(draw: Random, answers: TokenDataset) -> TokenDataset:
    """Rate answers randomly, except the first as desirable and the last as undesirable."""
    marks = "".join(draw.choices("01", k=answers.num_rows - 2))
    return rated(answers, f"1{marks}0")
