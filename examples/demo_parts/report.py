"""All output of the demo."""

from __future__ import annotations

import math
import sys
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from python_docstrings import Function
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Table
from rich.text import Text

from demo_parts.word_overlap import mean_f1

if TYPE_CHECKING:
    from demo_parts.training import Outcome
    from lorry.models.jobs import Model

_NUM_SHOWN = 3
_STEPS_A_LINE = 10

console = Console(highlight=False, width=None if sys.stdout.isatty() else 100)


class DemoFailed(Exception):
    """The reason of the failure, as a sentence."""


def heading(number: int, text: str) -> None:
    console.print(f"\n[bold]{number}. {text}")


def failed(why: str) -> None:
    console.print(Text(why, style="bold red"))


def data_set(train: Sequence[Function], held_out: Sequence[Function]) -> None:
    modules = {f.module for f in train}, {f.module for f in held_out}
    console.print(f"{len(train)} training rows from {len(modules[0])} modules")
    console.print(f"{len(held_out)} validation rows from {len(modules[1])} other modules, for example")
    console.print(Text(f"  {held_out[0].question()}\n  {held_out[0].sentence}", style="dim"))


def bars() -> Progress:
    return Progress(
        TextColumn("{task.description:>8}"),
        BarColumn(bar_width=30),
        TextColumn("{task.fields[facts]}"),
        console=console,
    )


@contextmanager
def waiting(what: str) -> Generator[None]:
    """Show a spinner during slow work; without a terminal, print a line."""
    if not console.is_terminal:
        console.print(f"{what} …", soft_wrap=True)
        yield
        return
    with console.status(what):
        yield


def draw(progress: Progress, task: TaskID, job: Mapping[str, Any]) -> None:
    """Update the job's bar; without a terminal, print a line per state and every ten steps."""
    now: Mapping[str, Any] = job.get("progress") or {}
    facts, step = _facts(job), now.get("step", 0)
    mark = f"{job['status']} {step // _STEPS_A_LINE}"
    if not console.is_terminal and mark != progress.tasks[task].fields.get("mark"):
        console.print(f"{job.get('suffix') or job['id']}: {facts}")
    progress.update(task, completed=step, total=now.get("num_steps"), facts=facts, mark=mark)


def _facts(job: Mapping[str, Any]) -> str:
    """Return step, loss, tokens/s and remaining time, as far as they are known."""
    now: Mapping[str, Any] = job.get("progress") or {}
    is_running = job["status"] == "running"
    parts = [str(job["status"]), f"step {now.get('step', 0)}/{now.get('num_steps') or '?'}"]
    if now.get("loss") is not None:
        parts.append(f"loss {now['loss']:.3f}")
    if is_running and now.get("tokens_per_second"):
        parts.append(f"{now['tokens_per_second']:,.0f} tokens/s")
    if is_running and now.get("seconds_left") is not None:
        parts.append(f"{now['seconds_left']:.0f} s left")
    return "  ".join(parts)


def table(outcomes: Sequence[Outcome], base: Model) -> None:
    """Print the base model and the adapters side by side, one column each, so that 80 characters suffice."""
    base_bytes = sum(path.stat().st_size for path in Path(base.local_path or ".").glob("*.safetensors"))
    base_parameters = int((base.description or {}).get("num_parameters") or 0)
    columns = [
        (
            base.id,
            "",
            "",
            *_losses(outcomes[0].base_loss),
            f"{base_parameters:,}",
            "",
            _size(base_bytes),
            "",
            "",
            "",
            "",
        ),
        *(_column(outcome, base_parameters, base_bytes) for outcome in outcomes),
    ]
    labels = ("", "rank", "learning rate", "validation loss", "perplexity", "parameters", "% of base model", "size")
    drawn = Table(show_header=False)
    for index in range(len(columns) + 1):
        drawn.add_column(justify="right" if index else "left", style=None if index else "bold")
    for row in zip((*labels, "% of base model", "steps", "tokens", "training time"), *columns, strict=True):
        drawn.add_row(*row)
    console.print(drawn)
    names = {o.job.id: str(o.job.suffix) for o in outcomes}
    for o in outcomes:
        for attempt in o.attempts:
            beside = " and ".join(names.get(job, job) for job in attempt.packmates) or "no other job"
            console.print(f"{o.job.suffix} trained in {attempt.trainer_id} together with {beside}", soft_wrap=True)


def _column(o: Outcome, base_parameters: int, base_bytes: int) -> tuple[str, ...]:
    return (
        str(o.job.suffix),
        str(o.adapter.rank),
        f"{o.job.optimizer['learning_rate']:g}",
        *_losses(o.loss),
        f"{o.adapter.num_parameters:,}",
        f"{o.adapter.num_parameters / max(1, base_parameters):.2%}",
        _size(o.adapter.bytes),
        f"{o.adapter.bytes / max(1, base_bytes):.1%}",
        str(o.job.progress.step),
        f"{o.job.trained_tokens or 0:,}",
        f"{o.seconds:.0f} s",
    )


def _losses(loss: float) -> tuple[str, str]:
    return f"{loss:.4f}", f"{math.exp(loss):.2f}"


def answers(found: Sequence[Mapping[str, Any]], asked: Sequence[Function], best: Outcome) -> None:
    """Print a few answers, chosen by their position in the file alone, and the mean score of all answers."""
    by_question = {one["question"]: one for one in found}
    console.print(
        f"Answers of the base model and of {best.job.suffix} to the first {len(asked)} validation functions. "
        f"Shown: the first function of each of the first {_NUM_SHOWN} modules:"
    )
    for function in shown(asked):
        one = by_question[function.question()]
        drawn = Table.grid(padding=(0, 2))
        drawn.add_row("", Text(function.question(), style="bold"))
        drawn.add_row("Python", Text(function.sentence))
        drawn.add_row("base", Text(_said(one["base"]), style="dim"))
        drawn.add_row(str(best.job.suffix), Text(_said(one["adapter"])))
        console.print(drawn)
    base, adapter = (
        mean_f1((by_question[f.question()][who]["text"], f.sentence) for f in asked) for who in ("base", "adapter")
    )
    console.print(
        f"Word overlap with Python's own sentence, mean F1 over all {len(asked)}: "
        f"base {base:.2f}, {best.job.suffix} {adapter:.2f} (1 means the same words)"
    )
    console.print(
        "With so few rows, a model of 135 million parameters learns the style of such a sentence. It can only guess "
        "from the name what the function does."
    )


def shown(asked: Sequence[Function]) -> list[Function]:
    """Return the first function of each of the first modules, in the order of the file."""
    first: dict[str, Function] = {}
    for function in asked:
        first.setdefault(function.module, function)
    return list(first.values())[:_NUM_SHOWN]


def agreement(checked: Mapping[str, Any], best: Outcome) -> None:
    console.print(f"Pulled {best.name} into {checked['folder']}; every digest is verified")
    console.print(
        f"Largest difference between PEFT's logits and those of training: {checked['max_abs_diff']:.4f} "
        f"(largest logit {checked['max_abs_logit']:.1f}, largest effect of the adapter "
        f"{checked['max_abs_effect']:.1f}, tolerance for rounding {checked['tolerance']:.4f}): "
        f"{'they agree' if checked['agrees'] else '[bold red]they do not agree'}"
    )


def lineage(answer: Mapping[str, Any]) -> None:
    """Print the most important fields of the record. `lorry adapters lineage` shows all of them."""
    record = answer["lineage"]
    lora, optimizer = (record["config"]["resolved"][part] for part in ("lora", "optimizer"))
    evaluation, verification = (record["results"][part] for part in ("evaluation", "verification"))
    facts = [
        ("record", answer["lineage_id"]),
        ("adapter", f"manifest {_cut(record['outputs']['artifact'])}, {record['outputs']['num_bytes']:,} bytes"),
        ("base", f"{record['base']['name']}, files {_cut(record['base']['digest'])}"),
        *((f"{data['role']} data", f"{data['file']}, sha256 {_cut(data['digest'])}") for data in record["data"]),
        ("config", f"rank {lora['rank']}, alpha {lora['alpha']:g}, learning rate {optimizer['learning_rate']:g}"),
        *((f"attempt {a['number']}", f"{a['worker']}, {a['trainer']}") for a in record["attempts"]),
        ("code", ", ".join(f"{name} {version}" for name, version in record["code"].items() if name != "python")),
        ("losses", f"base {evaluation['base_loss']:.4f}, adapter {evaluation['loss']:.4f}"),
        ("verified", f"by PEFT, largest difference {verification['max_abs_diff']:.4f}"),
    ]
    drawn = Table.grid(padding=(0, 2))
    for label, value in facts:
        drawn.add_row(Text(f"  {label}", style="bold"), Text(value))
    console.print(drawn)


def _cut(digest: str) -> str:
    return f"{digest[:16]}…"


def _said(answer: Mapping[str, Any]) -> str:
    """Return the answer on one line, with a note if it was stopped at the limit."""
    one_line = " ".join(str(answer["text"]).split())
    return one_line if answer["ended"] else f"{one_line} … (stopped at the limit)"


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.1f} MB"
