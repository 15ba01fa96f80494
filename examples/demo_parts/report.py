"""Everything that the demo prints."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import TYPE_CHECKING, Any

from python_docstrings import Function
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from demo_parts.word_overlap import mean_f1

if TYPE_CHECKING:
    from demo_parts.sizing import Size
    from demo_parts.training import Outcome
    from lorry.models import Model

_NUM_SHOWN = 3
_STEPS_A_LINE = 10
_SECONDS_A_LINE = 10

console = Console(highlight=False, width=None if sys.stdout.isatty() else 100)


class DemoFailed(Exception):
    """The demo can't continue. Its text is a sentence for the user."""


def heading(number: int, text: str) -> None:
    console.print(f"\n[bold]{number}. {text}")


def failed(why: str) -> None:
    console.print(Text(why, style="bold red"))


def data_set(train: Sequence[Function], held_out: Sequence[Function]) -> None:
    modules = {f.module for f in train}, {f.module for f in held_out}
    console.print(f"{len(train)} training rows from {len(modules[0])} modules")
    console.print(f"up to {len(held_out)} validation rows from {len(modules[1])} other modules, for example")
    console.print(Text(f"  {held_out[0].question()}\n  {held_out[0].sentence}", style="dim"))


def chosen(size: Size, seconds: float) -> None:
    console.print(
        f"Each job trains {size.steps} steps of {size.batch_size} rows and evaluates {size.held_out_rows} validation "
        f"rows before and after: about {seconds:.0f} s for all three. The loss of a step is that of "
        f"{size.batch_size} rows, so it varies. The results compare the validation losses."
    )


def bars() -> Progress:
    return Progress(
        TextColumn("{task.description:>8}"),
        BarColumn(bar_width=30),
        TextColumn("{task.fields[facts]}"),
        TimeElapsedColumn(),
        console=console,
    )


@contextmanager
def waiting(what: str) -> Generator[None]:
    """Show a spinner with the elapsed time; without a terminal, print a line every ten seconds."""
    if console.is_terminal:
        columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        with Progress(*columns, console=console, transient=True) as progress:
            progress.add_task(what, total=None)
            yield
        return
    console.print(f"{what} …", soft_wrap=True)
    done = Event()
    printer = Thread(target=_print_elapsed, args=(done,), daemon=True)
    printer.start()
    try:
        yield
    finally:
        done.set()
        printer.join()


def _print_elapsed(done: Event) -> None:
    started = time.monotonic()
    while not done.wait(_SECONDS_A_LINE):
        console.print(f"  … {time.monotonic() - started:.0f} s")


def draw(progress: Progress, task: TaskID, job: Mapping[str, Any]) -> None:
    """Update the job's bar; without a terminal, print a line for each state and every ten steps."""
    now: Mapping[str, Any] = job.get("progress") or {}
    facts, step = _facts(job), now.get("step", 0)
    mark = f"{job['status']} {step // _STEPS_A_LINE}"
    if not console.is_terminal and mark != progress.tasks[task].fields.get("mark"):
        console.print(f"{job.get('suffix') or job['id']}: {facts}")
    progress.update(task, completed=step, total=now.get("num_steps"), facts=facts, mark=mark)


def _facts(job: Mapping[str, Any]) -> str:
    """Return step, loss, tokens/s and time left, if known."""
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
    """Print a column for the base model and one for each adapter, at most 80 characters wide."""
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
    labels = ("", "rank", "learning rate", "validation loss", "perplexity", "parameters", "of the base model", "size")
    drawn = Table(show_header=False)
    for index in range(len(columns) + 1):
        drawn.add_column(justify="right" if index else "left", style=None if index else "bold")
    for row in zip((*labels, "of the base model", "steps", "tokens", "trained for"), *columns, strict=True):
        drawn.add_row(*row)
    console.print(drawn)
    names = {o.job.id: str(o.job.suffix) for o in outcomes}
    for o in outcomes:
        for attempt in o.attempts:
            packmates = " and ".join(names.get(job, job) for job in attempt.packmates) or "no other job"
            console.print(f"{o.job.suffix} trained in {attempt.trainer_id} together with {packmates}", soft_wrap=True)


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
    """Print three answers, chosen by their position in the file, and the word overlap of all answers."""
    by_question = {one["question"]: one for one in found}
    console.print(
        f"The base model and {best.job.suffix} answered questions about the first {len(asked)} validation functions. "
        f"Here is one function from each of the first {_NUM_SHOWN} modules:"
    )
    for function in shown(asked):
        one = by_question[function.question()]
        drawn = Table.grid(padding=(0, 2))
        drawn.add_row("", Text(function.question(), style="bold"))
        drawn.add_row("Python", Text(function.sentence))
        drawn.add_row("base", Text(_one_line(one["base"]), style="dim"))
        drawn.add_row(str(best.job.suffix), Text(_one_line(one["adapter"])))
        console.print(drawn)
    base, adapter = (
        mean_f1((by_question[f.question()][who]["text"], f.sentence) for f in asked) for who in ("base", "adapter")
    )
    console.print(
        f"Word overlap with Python's own sentence (F1, mean of {len(asked)}): "
        f"base {base:.2f}, {best.job.suffix} {adapter:.2f} (1: the same words)"
    )
    console.print(
        "From a few hundred rows, a model of 135 million parameters learns the style of such a sentence. "
        "It can only guess from the name what the function does."
    )


def shown(asked: Sequence[Function]) -> list[Function]:
    """Return the first function of each of the first modules, in the order of the file."""
    first: dict[str, Function] = {}
    for function in asked:
        first.setdefault(function.module, function)
    return list(first.values())[:_NUM_SHOWN]


def agreement(checked: Mapping[str, Any], best: Outcome) -> None:
    console.print(f"Downloaded {best.name} to {checked['folder']} and verified every digest")
    largest, tolerance = float(checked["max_abs_logit"]), float(checked["tolerance"])
    console.print(
        f"PEFT's logits differ from the training logits by at most {checked['max_abs_diff']:.4f} "
        f"(tolerance {tolerance:.4f}): {'they agree' if checked['agrees'] else '[bold red]they do not agree'}"
    )
    console.print(
        f"The difference is rounding: PEFT adds the same numbers in another order, in bfloat16, where numbers near "
        f"{largest:.0f} are {_bfloat16_spacing(largest):g} apart. Rounding alone changes logits by up to "
        f"{checked['rounding']:.2g} here, and the tolerance is three times that. The adapter itself moves logits by up "
        f"to {checked['max_abs_effect']:.1f}."
    )


def _bfloat16_spacing(value: float) -> float:
    """Return the distance of neighboring bfloat16 numbers at `value`, which has 8 significant bits."""
    return 2.0 ** (math.floor(math.log2(value)) - 7)


def lineage(answer: Mapping[str, Any]) -> None:
    """Print the main facts of the lineage record. `lorry adapters lineage` shows the whole record."""
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


def _one_line(answer: Mapping[str, Any]) -> str:
    """Return the answer as one line. It ends with a note if generation reached the token limit."""
    one_line = " ".join(str(answer["text"]).split())
    return one_line if answer["ended"] else f"{one_line} … (token limit)"


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.1f} MB"
