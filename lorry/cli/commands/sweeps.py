"""`lorry sweeps`: hyperparameter sweeps over fields of a job, with a leaderboard."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorry.cli import lookup
from lorry.cli.app import client, group
from lorry.cli.commands.with_files import send_with_files
from lorry.cli.parsing.job_options import NUMBERS, given_fields, option, with_job_options
from lorry.cli.parsing.option_names import use_option_names
from lorry.cli.parsing.option_values import Priority, json_or_text, nested, pair
from lorry.cli.parsing.sweep_syntax import check_space, parameter, search_of
from lorry.cli.render import output, sweep_leaderboard
from lorry.cli.render.output import AsJson, Quiet, Yes
from lorry.cli.render.tables import Column, date, listing
from lorry.errors import APIError
from lorry.requests import Metric

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lorry.client import Lorry
    from lorry.models import Sweep

app = group("Run and manage hyperparameter sweeps.")
SEARCH, TRIALS, RUN = "Search", "All trials", "Sweep"
SweepId = Annotated[str, typer.Argument(metavar="SWEEP", help="ID of the sweep, or a unique prefix of it.")]
Over = Annotated[
    list[str],
    option(
        SEARCH,
        "Field to vary, such as lora.rank=4,8,16 or optimizer.learning_rate=1e-5..1e-3:log; in a grid with the number "
        "of points, as in lora.dropout=0..0.2:5 (repeatable).",
        metavar="FIELD=VALUES",
    ),
]
Random = Annotated[
    bool, option(SEARCH, "Random search with --trials samples (default: a grid of all combinations).", "--random")
]
Tpe = Annotated[
    bool,
    option(SEARCH, "Search with --trials samples that learn from finished trials (Optuna's TPE sampler).", "--tpe"),
]
Asha = Annotated[
    bool,
    option(
        SEARCH,
        "Stop bad trials early, at rungs (asynchronous successive halving); random search, unless --tpe is set.",
        "--asha",
    ),
]
MinSteps = Annotated[
    int | None, option(SEARCH, "ASHA: steps before the first rung (default: chosen so that there are three rungs).")
]
Reduction = Annotated[int | None, option(SEARCH, "ASHA: the best 1 of N trials continue at each rung (default: 3).")]
Others = Annotated[
    list[str] | None,
    option(
        TRIALS, "Any other field of the API, as for `lorry jobs submit` (repeatable).", "--set", metavar="PATH=VALUE"
    ),
]
MetricOption = Annotated[Metric | None, option(SEARCH, "Metric by which trials are compared (default: valid_loss).")]
Seed = Annotated[int | None, option(SEARCH, "Seed for sampling parameters and for every trial (default: random).")]
KeepBest = Annotated[bool, option(RUN, "Delete all adapters except the best one at the end.", "--keep-best")]
MaxConcurrent = Annotated[
    int | None, option(RUN, "Maximum number of unfinished trials at a time (default: 4 with --tpe, else no limit).")
]
Watch = Annotated[bool, typer.Option("--watch", help="Show the live leaderboard until the sweep is finished.")]
FIELDS = (
    "lora.rank",
    "optimizer.learning_rate",
    "method.type",
    f"{NUMBERS}.n_epochs",
    "max_steps",
    f"{NUMBERS}.batch_size",
    "suffix",
)
"""Fields of all trials that have options."""


@app.verb(
    "run",
    "lorry sweeps run smollm2 chats.jsonl --valid valid.jsonl --over lora.rank=4,8,16",
    "lorry sweeps run smollm2 chats.jsonl --valid valid.jsonl "
    "--over optimizer.learning_rate=1e-5..1e-3:log --tpe --asha --trials 20 --watch",
)
@with_job_options(*FIELDS, before="other", panel=TRIALS)
def run(
    ctx: typer.Context,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Name of a base model.")],
    training: Annotated[str, typer.Argument(metavar="TRAIN", help="Path of a JSONL file, or ID of an uploaded file.")],
    *,
    over: Over,
    random: Random = False,
    tpe: Tpe = False,
    asha: Asha = False,
    trials: Annotated[int | None, option(SEARCH, "Number of trials (required unless the search is a grid).")] = None,
    min_steps: MinSteps = None,
    reduction_factor: Reduction = None,
    metric: MetricOption = None,
    seed: Seed = None,
    valid: Annotated[str | None, option(TRIALS, "Validation file: a path or the ID of an uploaded file.")] = None,
    other: Others = None,
    keep_best: KeepBest = False,
    max_concurrent: MaxConcurrent = None,
    priority: Annotated[Priority | None, option(RUN, "Priority in the queue (default: batch).")] = None,
    watch: Watch = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
    **_fields: Any,
) -> None:
    """Run a sweep: a grid of all combinations, or --random, --tpe or --asha with --trials. Uploads local files."""
    numbers = {"trials": trials, "seed": seed, "min_steps": min_steps, "reduction_factor": reduction_factor}
    search = search_of(random, tpe, asha, **numbers)
    varied = dict(parameter(given) for given in over)
    if len(varied) < len(over):
        raise typer.BadParameter("a field was passed twice. Pass it only once.", param_hint="--over")
    check_space(varied, kind=search["type"], method=ctx.params["method"] or "supervised")
    fields = given_fields(ctx.params, FIELDS) | _parse_pairs(other)
    body = {**nested(list(fields.items())), "parameters": varied, "search": search}
    body |= {"keep_adapters": "best"} if keep_best else {}
    body |= {"objective": {"metric": metric}} if metric else {}
    body |= {"priority": priority} if priority else {}
    body |= {"max_concurrent": max_concurrent} if max_concurrent is not None else {}
    lorry = client()
    sweep = _send(lorry, model, training, valid, body, quiet=quiet)
    _report(lorry, sweep, watch=watch, quiet=quiet, as_json=as_json)


@app.verb("list", "lorry sweeps list", "lorry sweeps list -q --limit 5")
def list_(
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="Maximum number of sweeps to list.")] = 20,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """List sweeps, newest first."""
    columns = (
        Column("ID", "id"),
        Column("STATUS", "status"),
        Column("SEARCH", lambda sweep: sweep.search.get("type"), priority=3),
        Column("MODEL", "model", priority=4, min_width=10),
        Column("TRIALS", lambda sweep: f"{sweep_leaderboard.num_finished(sweep)}/{sweep.num_trials}"),
        Column("BEST", lambda sweep: sweep.best_trial and sweep.best_trial.value, priority=1),
        Column("CREATED", date("created_at"), priority=5),
    )
    empty = "No sweeps yet. Run one with `lorry sweeps run MODEL TRAIN --valid FILE --over lora.rank=4,8,16`."
    listing(client().sweeps.list(limit=limit), columns, empty=empty, as_json=as_json, quiet=quiet)


@app.verb("show", "lorry sweeps show sweep-3f2b", "lorry sweeps show sweep-3f2b -n 10 --json")
def show(
    sweep_id: SweepId,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="Maximum number of trials to show.")] = 50,
    as_json: AsJson = False,
) -> None:
    """Show a sweep and its trials, best first."""
    lorry = client()
    sweep_id = lookup.sweep(lorry, sweep_id)
    sweep = lorry.sweeps.get(sweep_id)
    trials = list(lorry.sweeps.trials(sweep_id, limit=limit))
    if as_json:
        return output.print_json({**sweep.raw, "trials": [trial.raw for trial in trials]})
    output.pairs(sweep_leaderboard.facts(sweep))
    output.console().print("")
    sweep_leaderboard.print_board(sweep, trials)
    return None


@app.verb("watch", "lorry sweeps watch sweep-3f2b", "lorry sweeps watch sweep-3f2b --json")
def watch(sweep_id: SweepId, as_json: AsJson = False) -> None:
    """Show the live leaderboard until all trials are finished. Exits with 1 if no trial succeeded."""
    lorry = client()
    sweep_leaderboard.watch_until_final(lorry, lookup.sweep(lorry, sweep_id), as_json=as_json)


@app.verb("close", "lorry sweeps close sweep-3f2b", "lorry sweeps close sweep-3f2b --yes")
def close(sweep_id: SweepId, yes: Yes = False, as_json: AsJson = False) -> None:
    """Create no more trials; existing trials continue, and then the best one wins. This can't be undone."""
    lorry = client()
    sweep_id = lookup.sweep(lorry, sweep_id)
    output.confirm(f"Close sweep {sweep_id}? It creates no more trials, which can't be undone.", yes=yes)
    sweep = lorry.sweeps.close(sweep_id)
    output.print_result(sweep, f"Closed sweep {sweep.id}. Its existing trials continue.", as_json=as_json)


@app.verb("cancel", "lorry sweeps cancel sweep-3f2b", "lorry sweeps cancel sweep-3f2b --yes")
def cancel(sweep_id: SweepId, yes: Yes = False, as_json: AsJson = False) -> None:
    """Cancel a sweep and its unfinished trials. Trained adapters are kept."""
    lorry = client()
    sweep_id = lookup.sweep(lorry, sweep_id)
    output.confirm(f"Cancel sweep {sweep_id} and its unfinished trials? This can't be undone.", yes=yes)
    sweep = lorry.sweeps.cancel(sweep_id)
    state = "cancelled" if sweep.is_final else "being cancelled"
    output.print_result(sweep, f"Sweep {sweep.id} is {state}.", as_json=as_json)


def _parse_pairs(given: list[str] | None) -> dict[str, Any]:
    pairs = (pair(each, "--set", "PATH=VALUE") for each in given or [])
    return {path: json_or_text(text) for path, text in pairs}


def _send(lorry: Lorry, model: str, training: str, valid: str | None, body: Mapping[str, Any], *, quiet: bool) -> Sweep:
    given = {"TRAIN": training} | ({} if valid is None else {"--valid": valid})
    with send_with_files(lorry, model, given, quiet=quiet) as ids:
        try:
            return lorry.sweeps.create(
                model=model,
                training_file=ids["TRAIN"],
                validation_file=ids.get("--valid"),
                search=body["search"],
                job=body,
            )
        except APIError as error:
            typed = {f"parameters.{path}": f"--over {path}" for path in body["parameters"]}
            use_option_names(error, {**typed, "search.trials": "--trials", "search.min_steps": "--min-steps"})
            raise


def _report(lorry: Lorry, sweep: Sweep, *, watch: bool, quiet: bool, as_json: bool) -> None:
    if watch:
        sweep_leaderboard.watch_until_final(lorry, sweep.id, as_json=as_json)
    elif as_json:
        output.print_json(sweep.raw)
    else:
        output.print_ids([sweep.id])
        if not quiet:
            output.echo(f"{sweep.num_trials} trials. Show them with: lorry sweeps show {sweep.id}")
