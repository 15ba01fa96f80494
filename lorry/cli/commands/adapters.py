"""`lorry adapters`: what was trained; download it, check it, trace it."""

from __future__ import annotations

import json
import re
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorry.cli.app import EXIT_NOT_CHECKED, EXIT_REFUSED, client, group
from lorry.cli.commands import sharing
from lorry.cli.commands.files import byte_bar
from lorry.cli.render import output
from lorry.cli.render.output import AsJson
from lorry.cli.render.tables import Column, table
from lorry.errors import LorryError, NotFound

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

    from lorry.client import Lorry
    from lorry.models.jobs import Adapter

app = group("Trained adapters.")
for command in (sharing.share, sharing.shares, sharing.unshare):
    app.command()(command)

Name = Annotated[str, typer.Argument(metavar="ADAPTER", help="An adapter's name or id.")]
LOOKED_AT = 500
"""Of the newest adapters, for one whose name has a part that was given."""
NONE_YET = "There is no adapter yet. A job that succeeds makes one."
NameOrFolder = Annotated[
    str, typer.Argument(metavar="ADAPTER|FOLDER", help="A name or id, or a pulled folder (offline).")
]


@app.command("list")
def list_(
    limit: Annotated[int, typer.Option(min=1, help="At most so many.")] = 50,
    shared: Annotated[bool, typer.Option("--shared", help="Those that other projects share with yours.")] = False,
    as_json: AsJson = False,
) -> None:
    """Newest first."""
    adapters = list(client().adapters.list(limit=limit, shared=shared))
    if as_json:
        return output.print_json([adapter.raw for adapter in adapters])
    rows = [
        (
            a.name,
            a.base_model,
            a.rank,
            output.size(a.bytes),
            a.evaluation.parent_loss if a.evaluation.base_loss is None else a.evaluation.base_loss,
            a.evaluation.loss,
            a.verification.passed,
        )
        for a in adapters
    ]
    columns = (
        Column(title="NAME"),
        Column(title="BASE", goes=6, narrowest=12),
        Column(title="RANK", goes=5),
        Column(title="SIZE", goes=4),
        Column(title="LOSS BEFORE", goes=3),
        Column(title="LOSS", goes=1),
        Column(title="VERIFIED", goes=2),
    )
    none = "No adapter is shared with your project." if shared else NONE_YET
    return table(columns, rows, empty=none)


@app.command()
def show(adapter: Name, as_json: AsJson = False) -> None:
    """One adapter, with what its verification measured."""
    found = _get(client(), adapter)
    if as_json:
        output.print_json(found.raw)
    else:
        output.pairs(_facts(found))


@app.command()
def pull(
    adapter: Name,
    directory: Annotated[Path | None, typer.Argument(help="Where to; a new folder. Default: ./NAME.")] = None,
    as_json: AsJson = False,
) -> None:
    """Download, checking every digest; PEFT loads the folder as it is.

    A job's id will do for its adapter, and a sweep's for its best.
    """
    _check_name(adapter)
    lorry = client()
    adapter = _of_job(lorry, adapter)
    found = _get(lorry, adapter)
    target = directory or Path(folder_name(found.name))
    with byte_bar(f"Pulling {adapter}") as on_progress:
        path = lorry.adapters.pull(adapter, target, on_progress=on_progress)
    if as_json:
        output.print_json({"object": "adapter.folder", "path": str(path.resolve())})
    else:
        output.console().print(str(path), soft_wrap=True)
        _say_how_to_use(path, found, _source_of(lorry, found.base_model))


@app.command()
def verify(
    adapter: NameOrFolder,
    keys: Annotated[
        Path | None,
        typer.Option(help="File with the service's public keys (GET /v1/keys.json). Default: ask the service."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check an adapter's files, lineage record and signature. Exit code 1 if a check fails.

    A folder's signature is checked with the keys of the connected service, or of --keys without any service. Exit
    code 3 if the digests are right, but there were no keys.
    """
    folder = _folder(adapter)
    owner = None
    if folder is not None:
        result, owner = _verify_folder(folder, keys)
    elif keys is not None:
        raise typer.BadParameter(
            "--keys applies to a folder; the service checks its own adapters.", param_hint="--keys"
        )
    else:
        with _no_folder_either(adapter):
            result = client().adapters.verify(adapter)
    if as_json:
        output.print_json(result)
    _say_verdict(adapter, result, owner=owner, as_json=as_json)
    if result.get("signature") == "not_checked":
        raise typer.Exit(EXIT_NOT_CHECKED)


@app.command()
def lineage(adapter: NameOrFolder, as_json: AsJson = False) -> None:
    """Where it comes from: base, data, configuration, attempts, code, results.

    Of a folder, its files are checked too. Exit code 1 if something is off.
    """
    from lorry.cli.render.lineage import render

    folder = _folder(adapter)
    if folder is not None:
        from lorry.verification.adapter_folder import read_lineage, verify_folder

        record = read_lineage(folder)
        output.say(f"Read from {folder / 'lineage.json'}, without the service.")
        result = verify_folder(folder)
    else:
        with _no_folder_either(adapter):
            record, result = client().adapters.lineage(adapter), None
    if as_json:
        output.print_json(record)
    else:
        render(record)
    if result is not None:
        _say_verdict(adapter, result)


def _facts(adapter: Adapter) -> Iterator[tuple[str, object]]:
    measured, check = adapter.evaluation, adapter.verification
    yield "name", adapter.name
    yield "id", adapter.id
    yield "job", adapter.job_id
    yield "base model", adapter.base_model
    yield "continues", adapter.parent
    yield "rank", adapter.rank
    yield "quantization", adapter.quantization
    yield "parameters", f"{adapter.num_parameters:,}"
    yield "size", output.size(adapter.bytes)
    yield "created", output.when(adapter.created_at or None)
    began = "base" if adapter.parent is None else "parent"
    for label, base, parent, after in (
        ("held-out loss", measured.base_loss, measured.parent_loss, measured.loss),
        ("perplexity", measured.base_perplexity, measured.parent_perplexity, measured.perplexity),
    ):
        if after is not None:
            before = base if adapter.parent is None else parent
            yield label, f"{output.cell(before)} for the {began}, {output.cell(after)} with the adapter"
    if measured.rewards is not None:
        by_label = measured.rewards.get("kl") is not None
        title, what = ("answers as labeled", "answers") if by_label else ("preferred answers win", "pairs")
        yield title, f"{measured.rewards['accuracy'] or 0:.1%} of the held-out {what}"
    yield "PEFT agrees", check.passed
    yield "largest difference", check.max_abs_diff
    yield "allowed", check.tolerance
    yield "why", check.explanation
    yield "base digest", adapter.base_digest
    yield "artifact", adapter.artifact
    yield "lineage", adapter.lineage_id


def _check_name(adapter: str) -> None:
    """Where it is left out, the folder stands in its place."""
    if _looks_like_a_path(adapter):
        raise typer.BadParameter(
            f"{adapter!r} is no name of an adapter. Write: lorry adapters pull ADAPTER {adapter}", param_hint="ADAPTER"
        )


def _looks_like_a_path(adapter: str) -> bool:
    """A name of an adapter has no slash and begins with no dot."""
    return "/" in adapter or adapter.startswith((".", "~"))


def _of_job(lorry: Lorry, adapter: str) -> str:
    """What was given, or the name of the adapter of the job whose id was."""
    if not adapter.startswith("ftjob-"):
        return adapter
    job = lorry.jobs.get(adapter)
    if job.fine_tuned_model is None:
        raise LorryError(
            f"{job.id} has made no adapter: it is {job.status}.",
            code="adapter_not_found",
            remedy=f"A job that succeeds makes one. Checkpoints that can be pulled: lorry jobs checkpoints {job.id}",
        )
    return job.fine_tuned_model


def _get(lorry: Lorry, adapter: str) -> Adapter:
    """A part of a name, such as a job's suffix, is no name: then those that have it are told."""
    try:
        return lorry.adapters.get(adapter)
    except NotFound as error:
        if adapter.startswith("sweep-"):
            error.message = error.message.removesuffix(error.remedy).rstrip()
            error.remedy = f"A sweep has one when it has ended and a trial has succeeded: lorry sweep show {adapter}"
            raise
        names = [a.name for a in lorry.adapters.list(limit=LOOKED_AT) if adapter in (*a.name.split(":"), a.job_id)]
        if names:
            error.message = error.message.removesuffix(error.remedy).rstrip()
            error.remedy = f"Did you mean {' or '.join(names[:3])}?"
        raise


def _folder(adapter: str) -> Path | None:
    """The folder that was named, if it was one."""
    path = Path(adapter).expanduser()
    if path.is_dir():
        return path
    if _looks_like_a_path(adapter):
        raise typer.BadParameter(f"there is no folder {adapter!r}.", param_hint="ADAPTER|FOLDER")
    return None


@contextmanager
def _no_folder_either(adapter: str) -> Generator[None]:
    """A refusal of the service tells that a folder was looked for, too."""
    try:
        yield
    except NotFound as error:
        error.message = error.message.removesuffix(error.remedy).rstrip()
        error.remedy = f"{error.remedy} Nor is there a folder {adapter!r} here."
        raise


def _verify_folder(folder: Path, keys: Path | None) -> tuple[dict[str, Any], str | None]:
    """Checks the signature with the keys of the file, else of the service; says so if it has neither.

    Returns also whose keys were used.
    """
    from lorry.verification.adapter_folder import verify_folder
    from lorry.verification.signatures import read_keys

    if keys is not None:
        return verify_folder(folder, keys=read_keys(keys.read_bytes())), str(keys)
    result = verify_folder(folder)
    if not result["passed"]:
        return result, None
    try:
        lorry = client()
        found = lorry.adapters.signing_keys()
    except LorryError as error:
        output.say(f"The signature was not checked: the service returned no public keys. {error.message}")
        output.say("Pass --keys FILE, with the answer of GET /v1/keys.json, to check it offline.")
        return result, None
    return verify_folder(folder, keys=found), lorry.url


def _say_verdict(adapter: str, result: dict[str, Any], *, owner: str | None = None, as_json: bool = False) -> None:
    """What a check found; exits with 1 if it is bad. owner: the service or the file whose keys were used."""
    from lorry.verification.signatures import UNKNOWN_KEY

    problems: list[str] = result.get("problems") or []
    if not as_json:
        for problem in problems:
            output.say(problem)
        if result.get("signature") == "valid":
            output.say(f"The signature is valid: a key of {owner} made it, and it belongs to this lineage record.")
        if (retired_at := result.get("key_retired_at")) is not None:
            day = datetime.fromtimestamp(retired_at, UTC).date().isoformat()
            output.say(f"This key was retired on {day}. If its secret has leaked, pull the adapter again.")
        output.say(f"{adapter}: {_verdict(result, is_unknown=problems == [UNKNOWN_KEY], owner=owner)}.")
    if not result.get("passed"):
        raise typer.Exit(EXIT_REFUSED)


def _verdict(result: dict[str, Any], *, is_unknown: bool, owner: str | None) -> str:
    if is_unknown:
        return (
            f"the digests are right, but the signature is of a key that {owner} does not have. If another service "
            "trained it, pass --keys FILE with the answer of that service's GET /v1/keys.json"
        )
    if not result.get("passed"):
        return "NOT what its record says"
    if result.get("signature") == "not_checked":
        return "the digests are right, but the signature was not checked"
    return "OK, it is what its record says"


def _source_of(lorry: Lorry, base_model: str) -> str | None:
    """What Transformers loads a base from, as Python's arguments: a folder of this machine, or a hub id.

    None where the base was deleted, or only an operator may know.
    """
    try:
        base = lorry.models.get(base_model)
    except LorryError:
        return None
    if base.local_path and Path(base.local_path).is_dir():
        return json.dumps(base.local_path, ensure_ascii=False)
    if not base.source or base.source.startswith("/"):
        return None
    revision = f", revision={json.dumps(base.revision)}" if base.revision else ""
    return json.dumps(base.source) + revision


def _say_how_to_use(folder: Path, adapter: Adapter, source: str | None) -> None:
    """The base_model_name_or_path of adapter_config.json is Lorry's own name: Transformers can't load that."""
    output.say(f"PEFT loads it: PeftModel.from_pretrained(base, {json.dumps(str(folder), ensure_ascii=False)})")
    held = _sharding_text(adapter)
    if source is None:
        given = f", with {held}" if held else ""
        output.say(f"base is {adapter.base_model}, loaded by Transformers from its folder or its hub id{given}.")
    else:
        given = f", {held}" if held else ""
        output.say(f"base is {adapter.base_model}: AutoModelForCausalLM.from_pretrained({source}{given})")


def _sharding_text(adapter: Adapter) -> str | None:
    """The arguments with which Transformers holds a base as training did; None for plain weights."""
    dtype = f"torch.{adapter.precision or 'bfloat16'}"
    how = {
        "nf4": f'load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, '
        f"bnb_4bit_compute_dtype={dtype}",
        "int8": "load_in_8bit=True, llm_int8_threshold=0.0",
    }.get(adapter.quantization or "none")
    return how and f"dtype={dtype}, quantization_config=BitsAndBytesConfig({how})"


def folder_name(name: str) -> str:
    """A name of the service as one harmless part of a path."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip(".-") or "adapter"
