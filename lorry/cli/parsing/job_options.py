"""The options of `lorry jobs submit` and `lorry plan` that take more than a line to say, and their groups."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from lorry.cli.parsing.option_values import Keep, Loss, Method, Overflow, Quantization

ADAPTER, TRAINING, WATCHING, RUN = "Adapter", "Training", "Evaluation and checkpoints", "The job"


def option(group: str, help_text: str, *names: str, metavar: str | None = None) -> Any:
    return typer.Option(*names, help=help_text, rich_help_panel=group, metavar=metavar)


Base = Annotated[
    str | None,
    typer.Argument(metavar="MODEL", help="A base model's name, or an adapter's to continue.", show_default=False),
]
Training = Annotated[
    str | None,
    typer.Argument(metavar="TRAIN", help="A JSONL file's path, or the id of an uploaded one.", show_default=False),
]
Planned = Annotated[
    str | None, option(RUN, "Create the job that this plan has planned, just so; nothing else is said.", metavar="PLAN")
]
Methods = Annotated[
    Method | None,
    option(
        TRAINING,
        "Learn from answers (supervised, the default), from pairs of a better and a worse one, or from labels (kto).",
    ),
]
Held = Annotated[
    Quantization | None,
    option(TRAINING, "Hold the base model in 4 or 8 bits.", "--quantization"),
]
Parent = Annotated[
    str | None,
    option(
        ADAPTER,
        "Continue this adapter of the same base model: its id or name. Its shape is then the parent's.",
        metavar="ADAPTER",
    ),
]
Targets = Annotated[
    list[str] | None,
    option(
        ADAPTER,
        "Linear layer to adapt; may be repeated. Or one re:PATTERN, for paths. Default: all but the output head.",
        metavar="NAME",
    ),
]
Layers = Annotated[
    list[int] | None, option(ADAPTER, "Only in the block of this number, from 0; may be repeated.", metavar="NUMBER")
]
RankPattern = Annotated[
    list[str] | None,
    option(ADAPTER, "Another rank for layers whose path ends in KEY; may be repeated.", metavar="KEY=RANK"),
]
AlphaPattern = Annotated[
    list[str] | None, option(ADAPTER, "Another alpha, in the same way; may be repeated.", metavar="KEY=ALPHA")
]
Smoothing = Annotated[
    float | None, option(TRAINING, "Of labels, or of dpo the part of swapped pairs; from 0 to below 0.5.")
]
Neftune = Annotated[
    float | None, option(TRAINING, "Scale of noise on input embeddings, of supervised; 5 is common, 0 is none.")
]
LossOption = Annotated[
    Loss | None, option(TRAINING, "Of a chat: learn every answer (assistant, the default), or only the last one.")
]
OverflowOption = Annotated[
    Overflow | None,
    option(TRAINING, "What becomes of a row above --max-length; only plain texts are split. Default: truncate."),
]
Warmup = Annotated[float | None, option(TRAINING, "Part of all steps in which the rate rises, from 0 to 1.")]
EvaluateEvery = Annotated[
    int | None, option(WATCHING, "Steps between two readings of the held-out file. Default: a tenth of the job.")
]
KeepOption = Annotated[
    Keep | None, option(WATCHING, "Whose weights become the adapter. Default: best with --patience, else last.")
]
Patience = Annotated[
    int | None, option(WATCHING, "End early after so many readings in a row without a fall of the loss.")
]
Tags = Annotated[list[str] | None, option(RUN, "Find the job by it: `lorry jobs list --tag`. Again for more.")]
Metadata = Annotated[list[str] | None, option(RUN, "Kept with the job; may be repeated.", metavar="KEY=VALUE")]
Deadline = Annotated[
    str | None,
    option(RUN, "When it should have ended: 12h from now, or a local time such as 2026-12-01T08:00.", metavar="WHEN"),
]
Others = Annotated[
    list[str] | None,
    option(
        RUN,
        "Any other field, such as optimizer.beta1=0.95; the value is JSON or text. May be repeated.",
        "--set",
        metavar="PATH=VALUE",
    ),
]
