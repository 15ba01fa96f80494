"""A lineage record: the origin of an adapter, in sections, with digests cut to their first twelve digits.

Missing fields and fields that this client doesn't know are not shown; `--json` prints the whole record.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from typing import Any, cast

from lorry.cli.commands.files import flatten
from lorry.cli.render import output

Json = Mapping[str, Any]
Pairs = Iterator[tuple[str, object]]
_COUNTS = (
    *("rows", "usable_rows", "tokens", "supervised_tokens"),
    *("truncated_rows", "dropped_rows", "split_rows", "duplicate_rows", "empty_rows"),
)
_SHOWN_WITH_UNITS = {"version", "n_epochs", "max_length", "checkpoint_every_steps"}
_LABEL_WIDTH = 24


def render(answer: Json) -> None:
    """Print the response of `adapters lineage`: `lineage` and `lineage_id`."""
    record = _part(answer, "lineage")
    _section(None, _identity(answer, record))
    _section("base model", _base(_part(record, "base")))
    for source in _parts(record, "data"):
        _section(f"{source.get('role', '')} data".strip(), _data(source))
    _section("configuration", _configuration(_part(_part(record, "config"), "resolved")))
    for attempt in _parts(record, "attempts"):
        _section(f"attempt {attempt.get('number', '')}".strip(), _attempt(attempt))
    _section("results", _results(_part(record, "results")))
    _section("code", _part(record, "code").items())
    _section("requested by", _requested_by(_part(record, "people")))
    _section("files", _files(_part(record, "outputs")))


def prepared(report: Json) -> Pairs:
    """Yield the results of a data set's preparation."""
    yield "kind of rows", report.get("kind")
    yield "trained on", report.get("loss") if report.get("kind") == "chat" else None
    for name in _COUNTS:
        yield name.replace("_", " "), _count(report.get(name))
    yield "median row", _unit(report.get("median_row"), "tokens")
    yield "longest row", _unit(report.get("longest_row"), "tokens")
    yield "truncated after", _unit(report.get("max_length"), "tokens")
    yield "tokenizer", _short(report.get("tokenizer"))
    yield "chat template", _short(report.get("chat_template"))
    yield "texts begin with", report.get("opens_with")
    yield "texts end with", report.get("ends_with")


def _section(title: str | None, pairs: Iterable[tuple[str, object]]) -> None:
    shown = [(label, value) for label, value in pairs if value not in (None, "")]
    if not shown:
        return
    if title is not None:
        output.heading(title)
    output.pairs(shown, label_width=_LABEL_WIDTH)


def _identity(answer: Json, record: Json) -> Pairs:
    outputs = _part(record, "outputs")
    yield "adapter", answer.get("adapter_id")
    yield "job", record.get("job")
    yield "lineage", _short(answer.get("lineage_id"))
    yield "artifact", _short(outputs.get("artifact"))
    yield "parameters", _count(outputs.get("num_parameters"))
    yield "size", _size(outputs.get("num_bytes"))
    parent = _part(_part(_part(record, "config"), "resolved"), "parent")
    yield "continues", parent.get("name") or _list(_part(record, "graph").get("parents"))
    yield "continued by", _list(answer.get("children"))


def _base(base: Json) -> Pairs:
    about = _part(base, "description")
    files = [size for file in _parts(base, "files") if isinstance(size := file.get("num_bytes"), int)]
    yield "name", base.get("name")
    yield "source", base.get("source") or base.get("kind")
    yield "revision", _short(base.get("revision"))
    yield "digest", _short(base.get("digest"))
    yield "license", base.get("license")
    yield "size", f"{_size(sum(files))} in {len(files)} files" if files else None
    yield "architecture", about.get("architecture")
    yield "parameters", _count(about.get("num_parameters"))
    yield "layers", about.get("num_layers")
    yield "dtype", about.get("dtype")
    yield "quantization in training", base.get("quantization")
    yield "tokenizer", _short(base.get("tokenizer"))
    yield "chat template", _short(base.get("chat_template"))


def _data(source: Json) -> Pairs:
    found = _part(source, "preparation")
    yield "file", source.get("file")
    yield "digest", _short(source.get("digest"))
    yield "size", _size(source.get("num_bytes"))
    yield from prepared(found)
    yield "tokens' digest", _short(source.get("tokens"))


def _configuration(spec: Json) -> Pairs:
    for name, value in flatten({name: value for name, value in spec.items() if name not in _SHOWN_WITH_UNITS}):
        yield name.replace("_", " "), _list(value) or value
    yield "maximum epochs" if spec.get("max_steps") else "epochs", spec.get("n_epochs")
    yield "max length", _unit(spec.get("max_length"), "tokens")
    yield "checkpoint every", _unit(spec.get("checkpoint_every_steps"), "steps")


def _attempt(attempt: Json) -> Pairs:
    machine = _part(attempt, "machine")
    started, ended = _moment(attempt.get("started_at")), _moment(attempt.get("ended_at"))
    yield "end", attempt.get("end")
    yield "started", started and output.when(int(started.timestamp()))
    yield "took", output.duration((ended - started).total_seconds()) if started and ended else None
    yield "from step", attempt.get("resumed_from_step")
    yield "worker", attempt.get("worker")
    yield "trainer", attempt.get("trainer")
    yield "trained with other jobs", _count(attempt.get("num_packmates"))
    yield "device", machine.get("device")
    yield "dtype", machine.get("dtype")
    yield "packed equals solo", machine.get("invariance")
    yield "peak memory", _size(_part(machine, "memory").get("peak_bytes"))


def _results(results: Json) -> Pairs:
    evaluation, check = _part(results, "evaluation"), _part(results, "verification")
    yield "steps", _count(results.get("steps"))
    yield "stopped early", results.get("stopped_early")
    yield "weights of step", _count(results.get("kept_step"))
    yield "trained tokens", _count(results.get("trained_tokens"))
    yield "packed equals solo", results.get("determinism")
    yield "validation loss", _change(evaluation, "loss")
    yield "perplexity", _change(evaluation, "perplexity")
    yield "token accuracy", _change(evaluation, "token_accuracy")
    yield "verified with PEFT", check.get("passed")
    yield "largest logit difference", check.get("max_abs_diff")
    yield "allowed", check.get("tolerance")
    yield "why", check.get("explanation")
    yield "losses' digest", _short(results.get("loss_log"))


def _requested_by(requester: Json) -> Pairs:
    yield "project", requester.get("project")
    for name in ("requested_at", "started_at", "finished_at"):
        moment = _moment(requester.get(name))
        yield name.removesuffix("_at"), moment and output.when(int(moment.timestamp()))


def _files(outputs: Json) -> Pairs:
    for file in _parts(outputs, "files"):
        yield str(file.get("path")), f"{_short(file.get('digest'))}  {_size(file.get('num_bytes'))}"


def _part(whole: Json, name: str) -> Json:
    found: object = whole.get(name)
    return cast("Json", found) if isinstance(found, dict) else {}


def _parts(whole: Json, name: str) -> list[Json]:
    found: object = whole.get(name)
    return (
        [cast("Json", part) for part in cast("list[object]", found) if isinstance(part, dict)]
        if isinstance(found, list)
        else []
    )


def _change(evaluation: Json, after: str) -> str | None:
    if evaluation.get(after) is None:
        return None
    began = "base" if evaluation.get(f"base_{after}") is not None else "parent"
    first = evaluation.get(f"{began}_{after}")
    return f"{output.cell(first)} for the {began}, {output.cell(evaluation.get(after))} with the adapter"


def _list(values: object) -> str:
    return ", ".join(map(str, cast("list[object]", values))) if isinstance(values, list) else ""


def _short(digest: object) -> str | None:
    return output.short(digest) if isinstance(digest, str) else None


def _count(value: object) -> str | None:
    return f"{value:,}" if isinstance(value, int) else None


def _size(value: object) -> str | None:
    return output.size(value) if isinstance(value, int) else None


def _unit(value: object, unit: str) -> str | None:
    return f"{_count(value)} {unit}" if isinstance(value, int) else None


def _moment(text: object) -> datetime | None:
    try:
        return datetime.fromisoformat(text) if isinstance(text, str) else None
    except ValueError:
        return None
