"""Everything that the demo prints."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from python_docstrings import Function
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from demo_parts.training import Outcome
    from lorry.models import Model

console = Console(highlight=False)


class DemoFailed(Exception):
    """What went wrong, as a sentence."""


def heading(number: int, text: str) -> None:
    console.print(f"\n[bold]{number}. {text}")


def data_set(train: Sequence[Function], held_out: Sequence[Function]) -> None:
    modules = {f.module for f in train}, {f.module for f in held_out}
    console.print(f"{len(train)} rows of {len(modules[0])} modules to train on")
    console.print(f"{len(held_out)} rows of {len(modules[1])} other modules held out, such as")
    console.print(Text(f"  {held_out[0].question()}\n  {held_out[0].sentence}", style="dim"))


def bars() -> Progress:
    return Progress(
        TextColumn("{task.description:>8}"),
        BarColumn(bar_width=30),
        TextColumn("{task.fields[facts]}"),
        console=console,
    )


def draw(progress: Progress, task: TaskID, job: Mapping[str, Any]) -> None:
    """Step, loss, tokens/s and time left, as far as they are known."""
    now: Mapping[str, Any] = job.get("progress") or {}
    is_running = job["status"] == "running"
    parts = [str(job["status"]), f"step {now.get('step', 0)}/{now.get('num_steps') or '?'}"]
    if now.get("loss") is not None:
        parts.append(f"loss {now['loss']:.3f}")
    if is_running and now.get("tokens_per_second"):
        parts.append(f"{now['tokens_per_second']:,.0f} tokens/s")
    if is_running and now.get("seconds_left") is not None:
        parts.append(f"{now['seconds_left']:.0f} s left")
    progress.update(task, completed=now.get("step", 0), total=now.get("num_steps"), facts="  ".join(parts))


def table(outcomes: Sequence[Outcome], base: Model) -> None:
    """Base and adapters, side by side."""
    base_bytes = sum(path.stat().st_size for path in Path(base.local_path or ".").glob("*.safetensors"))
    base_parameters = int((base.description or {}).get("num_parameters") or 0)
    drawn = Table()
    for column in ("", "rank", "rate", "held-out loss", "perplexity", "trainable", "size", "steps", "tokens", "time"):
        drawn.add_column(column, justify="left" if column == "" else "right")
    loss = outcomes[0].base_loss
    drawn.add_row(base.id, "", "", f"{loss:.4f}", f"{math.exp(loss):.2f}", f"{base_parameters:,}", _size(base_bytes))
    for o in outcomes:
        part = o.adapter.num_parameters / base_parameters if base_parameters else math.nan
        drawn.add_row(
            str(o.job.suffix),
            str(o.adapter.rank),
            f"{o.job.optimizer['learning_rate']:g}",
            f"{o.loss:.4f}",
            f"{math.exp(o.loss):.2f}",
            f"{o.adapter.num_parameters:,} ({part:.2%})",
            f"{_size(o.adapter.bytes)} ({o.adapter.bytes / base_bytes:.1%})",
            str(o.job.progress.step),
            f"{o.job.trained_tokens or 0:,}",
            f"{o.seconds:.0f} s",
        )
    console.print(drawn)
    trainers = sorted({o.trainer_id for o in outcomes})
    console.print(f"Trained in {'one trainer' if len(trainers) == 1 else 'several trainers'}: {', '.join(trainers)}")


def examples(held_out: Sequence[Function]) -> list[Function]:
    """Three held-out functions, each of another module."""
    return list({f.module: f for f in reversed(held_out)}.values())[-3:]


def answers(found: Sequence[Mapping[str, str]], held_out: Sequence[Function], best: Outcome) -> None:
    wanted = {f.question(): f.sentence for f in held_out}
    for one in found:
        drawn = Table.grid(padding=(0, 2))
        drawn.add_row("", Text(one["question"], style="bold"))
        drawn.add_row("Python", Text(wanted[one["question"]]))
        drawn.add_row("base", Text(_short(one["base"]), style="dim"))
        drawn.add_row(str(best.job.suffix), Text(_short(one["adapter"])))
        console.print(drawn)


def agreement(checked: Mapping[str, Any], best: Outcome) -> None:
    console.print(f"Pulled {best.name} into {checked['folder']}, every digest checked")
    console.print(
        f"PEFT's logits differ from training's by {checked['max_abs_diff']:.4f} at most "
        f"(logits go up to {checked['max_abs_logit']:.1f}, the adapter moves them by up to "
        f"{checked['max_abs_effect']:.1f}, rounding explains {checked['tolerance']:.4f}): "
        f"{'they agree' if checked['agrees'] else '[bold red]they do not agree'}"
    )


def lineage(answer: Mapping[str, Any]) -> None:
    """The record, to two levels; long values are cut."""
    console.print(f"Lineage record {answer['lineage_id']}")
    drawn = Table.grid(padding=(0, 2))
    for name, value in answer["lineage"].items():
        shown = ", ".join(f"{k} {_value(v)}" for k, v in value.items()) if isinstance(value, dict) else _value(value)
        drawn.add_row(Text(f"  {name}", style="bold"), Text(_short(shown, 300)))
    console.print(drawn)


def _value(value: object) -> str:
    text = str(value)
    is_digest = len(text) == 64 and text.isalnum()
    return f"{text[:12]}…" if is_digest else _short(text, 80)


def _short(text: str, most: int = 220) -> str:
    one_line = " ".join(text.split())
    return one_line if len(one_line) <= most else f"{one_line[: most - 1]}…"


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.1f} MiB"
