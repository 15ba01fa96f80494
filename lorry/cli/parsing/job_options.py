"""The options of `lorry jobs submit` and `lorry plans create` and their groups in the help."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from lorry.cli.parsing.option_values import (
    Keep,
    Loss,
    Method,
    OptimizerName,
    Overflow,
    Precision,
    Priority,
    Quantization,
    ScheduleName,
)

ARGUMENTS, ADAPTER, TRAINING, WATCHING, RUN = "Arguments", "Adapter", "Training", "Evaluation and checkpoints", "Job"


def option(group: str, help_text: str, *names: str, metavar: str | None = None) -> Any:
    return typer.Option(*names, help=help_text, rich_help_panel=group, metavar=metavar)


Base = Annotated[
    str | None,
    typer.Argument(metavar="MODEL", help="Name of a base model, or of an adapter to continue.", show_default=False),
]
Training = Annotated[
    str | None,
    typer.Argument(metavar="TRAIN", help="Path of a JSONL file, or ID of an uploaded file.", show_default=False),
]
ModelOption = Annotated[
    str | None, option(ARGUMENTS, "Same as MODEL, as in OpenAI's CLI.", "--model", "-m", metavar="MODEL")
]
TrainingOption = Annotated[
    str | None, option(ARGUMENTS, "Same as TRAIN, as in OpenAI's CLI.", "--training-file", "-F", metavar="TRAIN")
]
Planned = Annotated[
    str | None,
    option(
        RUN, "Create the job from an existing plan, unchanged. Can't be combined with other options.", metavar="PLAN"
    ),
]
Methods = Annotated[
    Method | None,
    option(
        TRAINING,
        "Training method: answers (supervised), preference pairs (dpo, orpo, simpo) or labels (kto); default: "
        "supervised.",
    ),
]
Held = Annotated[
    Quantization | None,
    option(TRAINING, "Load the base model in 4 or 8 bits (nf4, int8; default: none).", "--quantization"),
]
Parent = Annotated[
    str | None,
    option(
        ADAPTER,
        "Continue this adapter, by name, ID or suffix; rank and targets are taken from it (default: a new adapter).",
        metavar="ADAPTER",
    ),
]
Targets = Annotated[
    list[str] | None,
    option(
        ADAPTER,
        "Linear layer to adapt (repeatable), or re:PATTERN for whole paths (default: all except the output head).",
        metavar="NAME",
    ),
]
Layers = Annotated[
    list[int] | None,
    option(ADAPTER, "Adapt only this block, numbered from 0 (repeatable; default: all blocks).", metavar="NUMBER"),
]
RankPattern = Annotated[
    list[str] | None,
    option(ADAPTER, "Different rank for layers whose path ends in KEY (repeatable).", metavar="KEY=RANK"),
]
AlphaPattern = Annotated[
    list[str] | None,
    option(ADAPTER, "Different alpha for layers whose path ends in KEY (repeatable).", metavar="KEY=ALPHA"),
]
Smoothing = Annotated[
    float | None,
    option(TRAINING, "Label smoothing, 0 <= x < 0.5 (default: 0). For dpo: assumed fraction of mislabeled pairs."),
]
Neftune = Annotated[
    float | None, option(TRAINING, "NEFTune noise scale (supervised only). Typical: 5. Default: 0 (off).")
]
LossOption = Annotated[
    Loss | None,
    option(TRAINING, "Chat messages to train on: every assistant message or only the last one (default: assistant)."),
]
OverflowOption = Annotated[
    Overflow | None,
    option(TRAINING, "Handling of rows longer than --max-length; split works only for plain text (default: truncate)."),
]
Warmup = Annotated[float | None, option(TRAINING, "Warm-up fraction of all steps, 0 to 1 (default: 0.03).")]
EvaluateEvery = Annotated[int | None, option(WATCHING, "Evaluate every N steps (default: 10 times over the job).")]
KeepOption = Annotated[
    Keep | None,
    option(
        WATCHING,
        "Weights to export: best (lowest validation loss) or last (default: last; best with --patience).",
    ),
]
Patience = Annotated[
    int | None,
    option(
        WATCHING,
        "Early stopping: stop after N evaluations without improvement in validation loss (default: never).",
    ),
]
Tags = Annotated[list[str] | None, option(RUN, "Tag to find the job by with `lorry jobs list --tag` (repeatable).")]
Metadata = Annotated[
    list[str] | None, option(RUN, "Metadata to store with the job (repeatable, at most 16).", metavar="KEY=VALUE")
]
Deadline = Annotated[
    str | None,
    option(
        RUN,
        "Time by which the job should finish: 12h from now, or a local time such as 2026-12-01T08:00 (default: none).",
        metavar="WHEN",
    ),
]
Others = Annotated[
    list[str] | None,
    option(
        RUN,
        "Any other field of the API, such as optimizer.beta1=0.95; the value is JSON or text (repeatable).",
        "--set",
        metavar="PATH=VALUE",
    ),
]
Rank = Annotated[int | None, option(ADAPTER, "Rank of the adapter, 1 to 256 (default: 16).")]
Alpha = Annotated[float | None, option(ADAPTER, "Scaling: updates are multiplied by alpha / rank (default: 2 * rank).")]
Rslora = Annotated[bool, option(ADAPTER, "Use rank-stabilized LoRA: scale by alpha / sqrt(rank).", "--rslora")]
Dropout = Annotated[float | None, option(ADAPTER, "Dropout probability of LoRA inputs, 0 to 0.9 (default: 0).")]
Dora = Annotated[bool, option(ADAPTER, "Use DoRA (train weight magnitudes).", "--dora")]
Init = Annotated[
    str | None, option(ADAPTER, "Weight initialization: default, gaussian, pissa, pissa_niter_N or olora.")
]
Beta = Annotated[
    float | None, option(TRAINING, "Beta of the preference loss (dpo, orpo, simpo, kto; default: 0.1, simpo: 2).")
]
Gamma = Annotated[float | None, option(TRAINING, "Target reward margin (simpo only; default: beta / 2).")]
LearningRate = Annotated[
    float | None,
    option(
        TRAINING,
        "Peak learning rate, above 0 to 1 (default: 2e-4; 2e-5 for preference methods).",
        "--learning-rate",
        "--lr",
    ),
]
LoraPlusRatio = Annotated[
    float | None, option(TRAINING, "LoRA+: learning rate of B divided by that of A (default: 1).")
]
ScheduleOption = Annotated[
    ScheduleName | None, option(TRAINING, "Learning rate schedule after the warm-up (default: cosine).")
]
Decay = Annotated[
    float | None,
    option(TRAINING, "Fraction of steps spent decaying the learning rate (wsd schedule only; default: 0.2)."),
]
OptimizerOption = Annotated[
    OptimizerName | None, option(TRAINING, "Optimizer; sgd and adafactor require --learning-rate (default: adamw).")
]
WeightDecay = Annotated[float | None, option(TRAINING, "Weight decay, 0 to 1 (default: 0).")]
Epochs = Annotated[int | None, option(TRAINING, "Passes over the training file, 1 to 100 (default: 3).")]
MaxSteps = Annotated[int | None, option(TRAINING, "Stop after N optimizer steps (default: all epochs).")]
BatchSize = Annotated[
    int | None, option(TRAINING, "Sequences or pairs per optimizer step (default: 0.5% of the rows, 4 to 32).")
]
MaxLength = Annotated[
    int | None, option(TRAINING, "Maximum tokens per row (default: the base model's limit, at most 4096).")
]
PrecisionOption = Annotated[
    Precision | None, option(TRAINING, "Precision of the base model's weights (default: auto).")
]
Seed = Annotated[int | None, option(TRAINING, "Random seed; the same seed gives the same adapter (default: random).")]
Valid = Annotated[str | None, option(WATCHING, "Validation file: a path or the ID of an uploaded file.")]
CheckpointEvery = Annotated[int | None, option(WATCHING, "Write a checkpoint every N steps (default: 50).")]
Suffix = Annotated[
    str | None,
    option(
        RUN,
        "Suffix of the adapter's name: any text of up to 64 characters. Characters other than ASCII letters, digits, "
        "dots, underscores and hyphens become hyphens; accents are dropped.",
    ),
]
MustServeOn = Annotated[
    str | None,
    option(
        RUN,
        "Reject the job unless its adapter can run there: vllm, or a serving endpoint (default: not checked).",
        metavar="ENDPOINT",
    ),
]
PriorityOption = Annotated[Priority | None, option(RUN, "Priority in the queue (default: normal).")]
