"""Small jobs by number: each a mixture of whatever a job may ask for, over a few short rows."""

from random import Random

from lora_core.config import JobConfig, LoraConfig, ObjectiveConfig, OptimizerConfig, ScheduleConfig
from tests.lora_core.scenarios import Submission, dataset

TARGETS = {
    "llama": ("all-linear", ("q_proj", "v_proj"), "down_proj", "layers.1.self_attn.o_proj", r"re:.*\.1\.mlp\..*"),
    "gpt2": ("all-linear", ("c_attn",), "mlp.c_fc", "h.1.attn.c_proj", r"re:.*\.1\.mlp\..*"),
}
OBJECTIVES = (
    ObjectiveConfig(),
    ObjectiveConfig(),
    ObjectiveConfig(),
    ObjectiveConfig(kind="dpo", beta=0.5, label_smoothing=0.1),
    ObjectiveConfig(kind="dpo", loss_type="ipo", beta=0.3),
    ObjectiveConfig(kind="orpo"),
    ObjectiveConfig(kind="simpo", beta=2.0, gamma=1.0),
)


def drawn_job(family: str, number: int) -> Submission:
    """A job of one to three steps; the same number gives the same job."""
    draw = Random(number)
    num_steps = draw.randint(1, 3)
    longest = draw.choice([5, 25])
    lengths = [draw.randint(2, longest) for _ in range(draw.choice([4, 6]))]
    config = JobConfig(
        lora=_lora(draw, family),
        optimizer=_optimizer(draw),
        schedule=_schedule(draw, num_steps),
        batch_size=draw.randint(1, 3),
        num_steps=num_steps,
        seed=draw.randrange(1000),
        evaluate_every_steps=draw.choice([None, 1, 2]),
        slice_tokens=draw.choice([1, 30, 1024]),
        objective=draw.choice(OBJECTIVES),
    )
    valid = dataset(number + 1, lengths[:2]) if draw.random() < 0.4 else None
    return Submission(config=config, train=dataset(number, lengths), valid=valid)


def _lora(draw: Random, family: str) -> LoraConfig:
    return LoraConfig(
        rank=draw.choice([1, 3, 4, 8]),
        alpha=draw.choice([4.0, 9.0]),
        dropout=draw.choice([0.0, 0.0, 0.25]),
        target_modules=draw.choice(TARGETS[family]),
        use_rslora=draw.choice([False, True]),
        use_dora=draw.choice([False, False, True]),
    )


def _optimizer(draw: Random) -> OptimizerConfig:
    return OptimizerConfig(
        learning_rate=draw.choice([1e-3, 3e-2]),
        lora_plus_ratio=draw.choice([1.0, 8.0]),
        beta2=draw.choice([0.99, 0.999]),
        weight_decay=draw.choice([0.0, 0.1]),
        max_grad_norm=draw.choice([None, 0.5]),
    )


def _schedule(draw: Random, num_steps: int) -> ScheduleConfig:
    return ScheduleConfig(
        kind=draw.choice(["constant", "linear", "cosine"]), warmup_steps=draw.randint(0, 1), num_steps=num_steps
    )
