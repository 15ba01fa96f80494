"""A plan: summary, configuration, data, memory as bars, times, deployment options, warnings and sample rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from lorry.cli.render import output

if TYPE_CHECKING:
    from lorry.models import Estimate, Plan

Json = dict[str, Any]
_BAR_CELLS = 30
_VERDICTS = {"yes": "yes", "with_settings": "yes, with settings", "no": "no"}
_SERVERS = {"peft": "PEFT", "vllm": "vLLM", "merge": "merged"}
_LABEL_CELLS = 22


def draw(plan: Plan) -> None:
    """Print a plan on stdout."""
    output.pairs(_summary(plan), label_width=_LABEL_CELLS)
    if plan.status != "ready":
        return
    output.heading("configuration")
    output.pairs(_configuration(plan.configuration), label_width=_LABEL_CELLS)
    for name, report in ((name, plan.data.get(name)) for name in ("training", "validation")):
        if report:
            output.heading(f"{name} data")
            output.pairs(_data(report), label_width=_LABEL_CELLS)
    _draw_memory(plan)
    output.heading("time")
    output.pairs(_times(plan), label_width=_LABEL_CELLS)
    output.heading("serving")
    for server, answer in plan.servable.items():
        output.pairs([(_SERVERS.get(server, server), _used(answer))], label_width=_LABEL_CELLS)
    _draw_warnings(plan)
    _draw_samples(plan)


def _summary(plan: Plan) -> Iterator[tuple[str, object]]:
    yield "id", plan.id
    yield "status", plan.status
    yield "error", plan.error and f"{plan.error.message} {plan.error.remedy}".strip()
    yield "model", plan.model
    yield "training file", plan.training_file
    yield "validation file", plan.validation_file
    if plan.status != "ready":
        return
    yield "steps", plan.num_steps
    yield "trainable parameters", f"{plan.trainable_parameters or 0:,} in {plan.adapted_layers} layers"
    yield "time", _brief(plan.training_time)
    yield "expected start", _brief(plan.expected_start)
    yield "warnings", len(plan.warnings) or "none"


def _brief(estimate: Estimate) -> str:
    if estimate.seconds is None:
        return "unknown"
    return f"{likely(estimate)} ({estimate.basis_kind})"


def likely(estimate: Estimate) -> str:
    """Return the range of an estimate, or its only value."""
    if estimate.min_seconds is None or estimate.max_seconds is None:
        return output.duration(estimate.seconds)
    return f"{output.duration(estimate.min_seconds)} to {output.duration(estimate.max_seconds)}"


def _configuration(spec: Json) -> Iterator[tuple[str, object]]:
    numbers, lora = spec.get("hyperparameters", {}), spec.get("lora", {})
    yield "continues", spec.get("parent_adapter")
    yield "method", spec.get("method", {}).get("type")
    yield "epochs", numbers.get("n_epochs")
    yield "max steps", spec.get("max_steps")
    yield "batch size", numbers.get("batch_size")
    yield "learning rate", f"{spec.get('optimizer', {}).get('learning_rate'):g}"
    yield "optimizer", spec.get("optimizer", {}).get("type")
    yield "schedule", spec.get("schedule", {}).get("type")
    yield "rank, alpha, dropout", f"{lora.get('rank')}, {lora.get('alpha'):g}, {lora.get('dropout'):g}"
    targets: object = lora.get("target_modules")
    yield "targets", ", ".join(map(str, targets)) if isinstance(targets, list) else targets  # pyright: ignore
    yield "precision", spec.get("precision")
    yield "quantization", spec.get("quantization")
    yield "max length", f"{spec.get('max_length')} tokens"
    yield "seed", spec.get("seed")


def _data(report: Json) -> Iterator[tuple[str, object]]:
    tokens, trained = report["tokens"], report["supervised_tokens"]
    yield "rows", f"{report['rows']:,}, of which {report['usable_rows']:,} are usable"
    yield "tokens", f"{tokens:,}, of which {trained:,} are trained on ({trained / max(1, tokens):.0%})"
    yield "longest row", f"{report['longest_row']:,} tokens"
    lines: Json = report.get("lines") or {}
    cut = {"truncated_rows": "truncated", "dropped_rows": "dropped", "split_rows": "split"}
    for name, handling in cut.items():
        if report.get(name):
            yield "too long", f"{report[name]:,} rows, {handling}{_lines(lines.get('too_long'))}"
    if report.get("empty_rows"):
        yield "no trainable tokens", f"{report['empty_rows']:,} rows{_lines(lines.get('empty'))}"
    if report.get("duplicate_rows"):
        yield "duplicates", f"{report['duplicate_rows']:,} rows{_lines(lines.get('duplicate'))}"


def _lines(numbers: list[int] | None) -> str:
    if not numbers:
        return ""
    shown = ", ".join(map(str, numbers[:8]))
    return f" (line {shown}{', ...' if len(numbers) > 8 else ''})"


def _draw_memory(plan: Plan) -> None:
    """Print the parts of the memory of each kind of device that fits."""
    output.heading("memory per device")
    fitting = plan.devices.get("workers_that_fit", [])
    wanted = {_placement(worker) for worker in fitting} or {_placement({"kind": "cuda"})}
    for memory in (memory for memory in plan.memory if _placement(memory) in wanted):
        total = max(1, memory["total_bytes"])
        out = output.console()
        for part in sorted(memory["parts"], key=lambda part: -part["bytes"]):
            bar = "#" * max(1, round(_BAR_CELLS * part["bytes"] / total)) if part["bytes"] > 0 else ""
            out.print(
                output.clean(f"{output.size(part['bytes']):>9}  {bar:{_BAR_CELLS}}  {part['description']}"),
                soft_wrap=True,
            )
        host_bytes: int = memory.get("host_bytes") or 0
        on_host = f", and {output.size(host_bytes)} of host memory" if host_bytes else ""
        output.pairs([("total", f"{output.size(total)} on {_placement_text(memory)}{on_host}")])
    output.pairs(_devices(plan.devices), label_width=_LABEL_CELLS)


def _placement(memory: Json) -> tuple[str, int, str]:
    """Return the kind of device; for a sharded base model also the number of devices and the strategy."""
    strategy: str = memory.get("strategy", "replicated")
    return memory["kind"], memory.get("num_devices", 1) if strategy != "replicated" else 1, strategy


def _placement_text(memory: Json) -> str:
    kind, number, strategy = _placement(memory)
    if number == 1:
        return "a GPU" if kind == "cuda" else "a CPU"
    return f"each of {number} {'GPUs' if kind == 'cuda' else 'processes'} that shard the base model ({strategy})"


def _devices(devices: Json) -> Iterator[tuple[str, object]]:
    card: Json | None = devices.get("smallest_gpu")
    yield (
        "smallest GPU that fits",
        f"{card['gigabytes']} GB ({card['examples']})" if card else "no common size",
    )
    groups: list[Json] = devices.get("groups", [])
    if groups:
        yield "or a group of GPUs", ", or ".join(map(_group, groups))
    fitting: list[Json] = devices.get("workers_that_fit", [])
    named = ", ".join(f"{worker['worker_id']} ({worker['name']})" for worker in fitting[:3])
    more = f" and {len(fitting) - 3} more" if len(fitting) > 3 else ""
    yield "workers that fit", f"{len(fitting)} of {devices.get('live_workers')}" + (f": {named}{more}" if named else "")


def _group(group: Json) -> str:
    host_bytes: int = group.get("host_bytes") or 0
    with_host = f" with {output.size(host_bytes)} of host memory" if host_bytes else ""
    return f"{group['num_devices']} of {group['gigabytes']} GB{with_host}"


def _times(plan: Plan) -> Iterator[tuple[str, object]]:
    for label, estimate in (("time", plan.training_time), ("expected start", plan.expected_start)):
        shown = "" if estimate.seconds is None else f"{likely(estimate)}. "
        yield label, f"{shown}{estimate.basis}"


def _used(answer: Json) -> str:
    reasons: list[str] = answer["reasons"]
    return "\n".join((_VERDICTS.get(str(answer["verdict"])) or str(answer["verdict"]), *reasons))


def _draw_warnings(plan: Plan) -> None:
    from rich.text import Text

    if not plan.warnings:
        return
    output.heading("warnings")
    for warning in plan.warnings:
        line = Text(output.clean(f"! {warning['message']}"), style="yellow")
        line.append(output.clean(f" {warning['remedy']}") if warning["remedy"] else "", style="not bold default")
        output.console().print(line, soft_wrap=True)


def _draw_samples(plan: Plan) -> None:
    """Print trained tokens in green, or between > and < without color."""
    for name in ("training", "validation"):
        report: Json = plan.data.get(name) or {}
        samples: list[Json] = report.get("samples") or []
        for sample in samples:
            flaws = ", ".join(str(flaw).replace("_", " ") for flaw in sample["flaws"])
            output.heading(f"{name} data, line {sample['line']}{f' ({flaws})' if flaws else ''}")
            rows: list[Json] = sample["rows"]
            for row in rows:
                _draw_row(row)


def _draw_row(row: Json) -> None:
    from rich.text import Text

    out = output.console()
    has_color = out.is_terminal and out.color_system is not None
    cut = f", cut from {row['whole_tokens']}" if row["whole_tokens"] != row["num_tokens"] else ""
    part = f"{row['part']}: " if row["part"] else ""
    out.print(Text(f"{part}{row['num_tokens']} tokens{cut}, {row['trained_tokens']} trained on", style="dim"))
    text = Text()
    shown_end = 0
    for segment in row["segments"]:
        if segment["start"] > shown_end:
            text.append(f" [... {segment['start'] - shown_end} tokens ...] ", style="dim")
        for is_trained, run in _runs(segment["tokens"]):
            marked = f">{run}<" if is_trained and not has_color else run
            text.append(output.clean(marked), style="bold green" if is_trained else "")
        shown_end = segment["start"] + len(segment["tokens"])
    if shown_end < row["num_tokens"]:
        text.append(f" [... {row['num_tokens'] - shown_end} tokens ...]", style="dim")
    out.print(text, soft_wrap=True)


def _runs(tokens: list[Json]) -> Iterator[tuple[bool, str]]:
    """Yield consecutive tokens that are all trained on, or all not, as one text."""
    run, is_trained = "", False
    for token in tokens:
        if token["is_trained"] != is_trained and run:
            yield is_trained, run
            run = ""
        is_trained = token["is_trained"]
        run += token["text"]
    if run:
        yield is_trained, run
