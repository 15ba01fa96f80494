"""`lorry adapters`: list, download, verify, trace, share and delete trained adapters.

lorry/cli/commands/serving/exports.py adds the commands for exports.
"""

from __future__ import annotations

import re
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorry.cli import lookup
from lorry.cli.app import EXIT_NOT_CHECKED, EXIT_REFUSED, client, group
from lorry.cli.commands.files import byte_bar
from lorry.cli.commands.serving.endpoints import state_of
from lorry.cli.render import output
from lorry.cli.render.efficiency import efficiency_pairs
from lorry.cli.render.output import AsJson, Quiet, Yes, YesAccepted
from lorry.cli.render.serving import print_adapter_usage
from lorry.cli.render.tables import Column, date, listing
from lorry.errors import LorryError, NotFound

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

    from lorry.client import Lorry
    from lorry.models import Adapter, Job, Model

app = group("Manage trained adapters.")

Name = Annotated[
    str,
    typer.Argument(
        metavar="ADAPTER",
        help="Name or ID of the adapter, or a unique part of the name such as its suffix. Also the ID of its job, or "
        "of a sweep for the best adapter.",
    ),
]
NameOrFolder = Annotated[
    str,
    typer.Argument(
        metavar="ADAPTER|FOLDER", help="Name, ID or suffix of the adapter, or the folder of a pulled adapter (offline)."
    ),
]
NONE_YET = "No adapters yet. A job that succeeds creates one."


@app.verb("list", "lorry adapters list", "lorry adapters list --shared", "lorry adapters list -q --limit 5")
def list_(
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="Maximum number of adapters to list.")] = 50,
    shared: Annotated[
        bool, typer.Option("--shared", help="List adapters that other projects share with yours instead of your own.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print only names, one per line.")] = False,
    as_json: AsJson = False,
) -> None:
    """List adapters, newest first."""
    columns = (
        Column("NAME", "name"),
        Column("BASE", "base_model", priority=6, min_width=12),
        Column("RANK", "rank", priority=5),
        Column("SIZE", lambda one: output.size(one.bytes), priority=4),
        Column("LOSS BEFORE", _loss_before, priority=3),
        Column("LOSS", lambda one: one.evaluation.loss, priority=1),
        Column("VERIFIED", lambda one: one.verification.passed, priority=2),
    )
    found = client().adapters.list(limit=limit, shared=shared)
    empty = "No adapters are shared with your project." if shared else NONE_YET
    listing(found, columns, empty=empty, as_json=as_json, quiet=quiet, key="name")


@app.verb("show", "lorry adapters show support", "lorry adapters show ftjob-3f2b --json")
def show(adapter: Name, as_json: AsJson = False) -> None:
    """Show an adapter's details and verification results."""
    lorry = client()
    found = _get(lorry, adapter)
    if as_json:
        output.print_json(found.raw)
    else:
        output.pairs(
            [*_facts(found), *(("deployed on", state_of(one)) for one in lorry.adapters.deployments(found.name))]
        )


@app.verb(
    "pull",
    "lorry adapters pull support",
    "lorry adapters pull ft:smollm2:default:support:1a2b3c4d ./support",
    "lorry adapters pull sweep-3f2b ./best",
)
def pull(
    adapter: Name,
    directory: Annotated[
        Path | None, typer.Argument(metavar="FOLDER", help="New folder to download into (default: ./NAME).")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Download an adapter to a folder that PEFT loads, and verify every digest."""
    _check_name(adapter)
    lorry = client()
    found = _get(lorry, adapter)
    target = directory or Path(folder_name(found.name))
    with byte_bar(f"Pulling {found.name}") as on_progress:
        path = lorry.adapters.pull(found.id, target, on_progress=on_progress)
    if as_json:
        output.print_json({"object": "adapter.folder", "path": str(path.resolve())})
    else:
        output.console().print(str(path), soft_wrap=True)
        print_adapter_usage(path, found, _base_of(lorry, found))


@app.verb(
    "verify",
    "lorry adapters verify support",
    "lorry adapters verify ./support",
    "lorry adapters verify ./support --keys keys.json",
)
def verify(
    adapter: NameOrFolder,
    keys: Annotated[
        Path | None,
        typer.Option(help="File with the service's public keys, from GET /v1/keys.json (default: ask the service)."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Verify an adapter's files, lineage record and signature. Exits with 1 if a check fails.

    The signature of a folder is verified with the keys of the connected service, or offline with --keys. Exits with 3
    if all digests match but no keys are available.
    """
    folder = _folder(adapter)
    owner = None
    if folder is not None:
        result, owner = _verify_folder(folder, keys)
    elif keys is not None:
        raise typer.BadParameter(
            "--keys applies only to a folder; the service verifies its own adapters.", param_hint="--keys"
        )
    else:
        with _adding_folder_hint(adapter):
            lorry = client()
            result = lorry.adapters.verify(lookup.adapter(lorry, adapter))
    if as_json:
        output.print_json(result)
    _report_verdict(adapter, result, owner=owner, as_json=as_json)
    if result.get("signature") == "not_checked":
        raise typer.Exit(EXIT_NOT_CHECKED)


@app.verb("lineage", "lorry adapters lineage support", "lorry adapters lineage ./support --json")
def lineage(adapter: NameOrFolder, as_json: AsJson = False) -> None:
    """Show an adapter's origin: base model, data, configuration, attempts, code and results.

    The files of a folder are verified too. Exits with 1 if a check fails.
    """
    from lorry.cli.render.lineage import render

    folder = _folder(adapter)
    if folder is not None:
        from lorry.verification.adapter_folder import read_lineage, verify_folder

        record = read_lineage(folder)
        output.echo(f"Read from {folder / 'lineage.json'}, without the service.")
        result = verify_folder(folder)
    else:
        with _adding_folder_hint(adapter):
            lorry = client()
            record, result = lorry.adapters.lineage(lookup.adapter(lorry, adapter)), None
    if as_json:
        output.print_json(record)
    else:
        render(record)
    if result is not None:
        _report_verdict(adapter, result)


@app.verb(
    "reproduce",
    "lorry adapters reproduce support",
    "lorry adapters reproduce support --detach",
    "lorry adapters reproduce support --json",
)
def reproduce(
    adapter: Name,
    detach: Annotated[bool, typer.Option("--detach", help="Create the job without waiting for it.")] = False,
    as_json: AsJson = False,
) -> None:
    """Train an adapter again from its lineage record, and compare the digests. Exits with 1 if they differ.

    Needs the same base model and data files, which are found by digest.
    """
    from lorry.cli.render.progress_bars import watch_until_final

    lorry = client()
    job = lorry.adapters.reproduce(lookup.adapter(lorry, adapter))
    if detach:
        sentence = f"Created job {job.id}. When it has succeeded, see the result with: lorry jobs show {job.id}"
        return output.print_result(job, sentence, as_json=as_json)
    output.echo(f"Created job {job.id}.")
    watch_until_final(lorry, [job.id], as_json=as_json)
    return _report_reproduction(lorry.jobs.get(job.id), as_json=as_json)


@app.verb("delete", "lorry adapters delete support", "lorry adapters delete ft:smollm2:default:support:1a2b3c4d --yes")
def delete(adapter: Name, yes: Yes = False, as_json: AsJson = False) -> None:
    """Delete an adapter. This can't be undone.

    Fails while an unfinished job continues it. For a checkpoint's name, only its weights are deleted.
    """
    lorry = client()
    found = _get(lorry, adapter)
    output.confirm(f"Delete adapter {found.name}? This can't be undone.", yes=yes)
    lorry.adapters.delete(found.name)
    output.print_deleted("adapter", found.name, as_json=as_json)


@app.verb("share", "lorry adapters share support search", "lorry adapters share support search proj-3f2b")
def share(
    adapter: Name,
    projects: Annotated[list[str], typer.Argument(metavar="PROJECT...", help="Names or IDs of projects.")],
    as_json: AsJson = False,
) -> None:
    """Share an adapter: other projects may read, download and continue it (operator key required).

    They see nothing else of its job.
    """
    lorry = client()
    name = lookup.adapter(lorry, adapter)
    given = lorry.adapters.share(name, [lookup.project(lorry, project) for project in projects])
    if as_json:
        return output.print_json([permission.raw for permission in given])
    return output.echo(f"Shared {name} with {', '.join(projects)}. Undo it with: lorry adapters unshare {name} PROJECT")


@app.verb("shares", "lorry adapters shares support", "lorry adapters shares support --json")
def shares(adapter: Name, quiet: Quiet = False, as_json: AsJson = False) -> None:
    """List the projects that an adapter is shared with, newest first (operator key required)."""
    lorry = client()
    given = lorry.adapters.permissions(lookup.adapter(lorry, adapter))
    columns = (
        Column("PERMISSION", "id"),
        Column("PROJECT", "project_id"),
        Column("SINCE", date("created_at"), priority=1),
    )
    listing(given, columns, empty="Not shared with any project.", as_json=as_json, quiet=quiet)


@app.verb("unshare", "lorry adapters unshare support search", "lorry adapters unshare support cp-3f2b")
def unshare(
    adapter: Name,
    project: Annotated[
        str,
        typer.Argument(metavar="PROJECT|PERMISSION", help="Name or ID of the project, or ID of the permission."),
    ],
    _yes: YesAccepted = False,
) -> None:
    """Stop sharing an adapter with a project. Jobs that began with the adapter continue (operator key required)."""
    lorry = client()
    name = lookup.adapter(lorry, adapter)
    permission = lookup.permission(lorry, name, project)
    lorry.adapters.unshare(name, permission)
    output.echo(f"{name} is no longer shared with {project}.")


def _loss_before(adapter: Adapter) -> float | None:
    measured = adapter.evaluation
    return measured.parent_loss if measured.base_loss is None else measured.base_loss


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
    yield from efficiency_pairs(adapter.efficiency)
    yield "created", output.when(adapter.created_at or None)
    began = "base" if adapter.parent is None else "parent"
    for label, base, parent, after in (
        ("validation loss", measured.base_loss, measured.parent_loss, measured.loss),
        ("perplexity", measured.base_perplexity, measured.parent_perplexity, measured.perplexity),
    ):
        if after is not None:
            before = base if adapter.parent is None else parent
            yield label, f"{output.cell(before)} for the {began}, {output.cell(after)} with the adapter"
    if measured.rewards is not None:
        by_label = measured.rewards.get("kl") is not None
        title, unit = ("answers match label", "answers") if by_label else ("preferred answer wins", "pairs")
        yield title, f"{measured.rewards['accuracy'] or 0:.1%} of the validation {unit}"
    yield "verified with PEFT", check.passed
    yield "largest logit difference", check.max_abs_diff
    yield "allowed", check.tolerance
    yield "why", check.explanation
    yield "base digest", adapter.base_digest
    yield "artifact", adapter.artifact
    yield "lineage", adapter.lineage_id


def _check_name(adapter: str) -> None:
    """Reject a folder where the name is missing."""
    if _looks_like_a_path(adapter):
        raise typer.BadParameter(
            f"{adapter!r} is a path, not an adapter. Use: lorry adapters pull ADAPTER {adapter}", param_hint="ADAPTER"
        )


def _looks_like_a_path(adapter: str) -> bool:
    """An adapter's name has no slash, and does not begin with a dot."""
    return "/" in adapter or adapter.startswith((".", "~"))


def _get(lorry: Lorry, adapter: str) -> Adapter:
    name = lookup.adapter(lorry, adapter)
    try:
        return lorry.adapters.get(name)
    except NotFound as error:
        if name.startswith("sweep-"):
            error.message = error.message.removesuffix(error.remedy).rstrip()
            error.remedy = f"A finished sweep with a successful trial has one. Check it with: lorry sweeps show {name}"
        raise


def _folder(adapter: str) -> Path | None:
    """Return the folder, if the argument names one."""
    path = Path(adapter).expanduser()
    if path.is_dir():
        return path
    if _looks_like_a_path(adapter):
        raise typer.BadParameter(f"folder {adapter!r} does not exist.", param_hint="ADAPTER|FOLDER")
    return None


@contextmanager
def _adding_folder_hint(adapter: str) -> Generator[None]:
    """Add to the service's error that no such folder exists either."""
    try:
        yield
    except NotFound as error:
        error.message = error.message.removesuffix(error.remedy).rstrip()
        error.remedy = f"{error.remedy} There is no folder {adapter!r} here either."
        raise


def _verify_folder(folder: Path, keys: Path | None) -> tuple[dict[str, Any], str | None]:
    """Verify a folder, and its signature with the keys of the file, else of the service.

    Returns the result and the source of the keys. Prints a message if there are none.
    """
    from lorry.verification.adapter_folder import verify_folder
    from lorry.verification.signatures import read_keys

    if keys is not None:
        return verify_folder(folder, keys=read_keys(keys.read_bytes(), source=str(keys))), str(keys)
    result = verify_folder(folder)
    if not result["passed"]:
        return result, None
    try:
        lorry = client()
        found = lorry.adapters.signing_keys()
    except LorryError as error:
        output.echo(f"The signature was not checked: the service returned no public keys. {error.message}")
        output.echo("To verify it offline, pass --keys FILE with the response of GET /v1/keys.json.")
        return result, None
    return verify_folder(folder, keys=found), lorry.url


def _report_verdict(adapter: str, result: dict[str, Any], *, owner: str | None = None, as_json: bool = False) -> None:
    """Print the result of a verification, and exit with 1 if it failed. owner: the source of the public keys."""
    from lorry.verification.signatures import UNKNOWN_KEY

    problems: list[str] = result.get("problems") or []
    if not as_json:
        for problem in problems:
            output.echo(problem)
        if result.get("signature") == "valid":
            output.echo(f"The signature is valid: it was made with a key of {owner} for this lineage record.")
        if (retired_at := result.get("key_retired_at")) is not None:
            day = datetime.fromtimestamp(retired_at, UTC).date().isoformat()
            output.echo(f"This key was retired on {day}. If its secret has leaked, pull the adapter again.")
        output.echo(f"{adapter}: {_verdict(result, problems, is_unknown=problems == [UNKNOWN_KEY], owner=owner)}.")
    if not result.get("passed"):
        raise typer.Exit(EXIT_REFUSED)


def _report_reproduction(job: Job, *, as_json: bool) -> None:
    """Print the verdict of a job that has succeeded, and exit with 1 if the adapters differ."""
    verdict = job.reproduces
    if verdict is None or verdict.identical is None:
        raise LorryError("no_comparison", job=job.id)
    if not as_json:
        output.echo(f"{job.fine_tuned_model} reproduces {verdict.name}.")
        for training, machines in (verdict.machines or {}).items():
            named = (f"{each.get('worker')} (from step {each.get('from_step')})" for each in machines)
            output.echo(f"workers {training}: {', '.join(named)}.")
        for each in verdict.differences or ():
            output.echo(f"{each.get('field')}: {each.get('recorded')} recorded, {each.get('reproduced')} now.")
        for name, digest in verdict.expected.items():
            found = (verdict.reproduced or {}).get(name)
            output.echo(f"{name.replace('_', ' ')}: {digest} recorded, {found} now.")
        output.echo(f"{'OK' if verdict.identical else 'FAILED'}: {verdict.message}")
    if not verdict.identical:
        raise typer.Exit(EXIT_REFUSED)


def _verdict(result: dict[str, Any], problems: list[str], *, is_unknown: bool, owner: str | None) -> str:
    if is_unknown:
        return (
            f"all digests match, but the signature was made with a key that {owner} does not have. If another service "
            "trained the adapter, pass --keys FILE with the response of that service's GET /v1/keys.json"
        )
    if not result.get("passed"):
        number = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        return f"FAILED: {number}; the files, the manifest and the lineage record do not match"
    if result.get("signature") == "not_checked":
        return "all digests match, but the signature was not checked"
    return "OK: all files match the manifest and the lineage record"


def _base_of(lorry: Lorry, adapter: Adapter) -> Model | None:
    try:
        return lorry.models.get(adapter.base_model)
    except LorryError:  # it was deleted
        return None


def folder_name(name: str) -> str:
    """Return a name as one safe component of a path."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip(".-") or "adapter"
