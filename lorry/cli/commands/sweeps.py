"""`lorry sweep`: search over fields of a job in one line, look at the leaderboard, cancel."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorry.cli.app import Sectioned, client, group
from lorry.cli.commands.with_files import send_with_files
from lorry.cli.parsing.option_names import in_typed_words
from lorry.cli.parsing.option_values import Method, Priority, json_or_text, nested, pair
from lorry.cli.parsing.sweep_syntax import Metric, check_space, parameter, search_of
from lorry.cli.render import output, sweep_leaderboard
from lorry.cli.render.output import AsJson, YesTaken
from lorry.cli.render.tables import Column, table
from lorry.errors import APIError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lorry.client import Lorry
    from lorry.models.sweeps import Sweep

app = group("Sweeps: several jobs that differ in stated fields, and which of them is best.")
SEARCH, TRIALS, RUN = "The search", "What all trials share", "The sweep"
SweepId = Annotated[str, typer.Argument(metavar="SWEEP", help="The sweep's id.")]


def _option(panel: str, help_text: str, *names: str, metavar: str | None = None) -> Any:
    return typer.Option(*names, help=help_text, rich_help_panel=panel, metavar=metavar)


Over = Annotated[
    list[str],
    _option(
        SEARCH,
        "A field that varies, such as lora.rank=4,8,16, optimizer.learning_rate=1e-5..1e-3:log, or in a grid "
        "lora.dropout=0..0.2:5; may be repeated.",
        metavar="FIELD=VALUES",
    ),
]
Random = Annotated[bool, _option(SEARCH, "Draw --trials of them.", "--random")]
Asha = Annotated[bool, _option(SEARCH, "Draw them, and stop bad ones early, at rungs.", "--asha")]
MinSteps = Annotated[
    int | None, _option(SEARCH, "Of --asha: step of the first rung. Default: so that three come before the end.")
]
Reduction = Annotated[int | None, _option(SEARCH, "Of --asha: the best 1 of so many go on from a rung. Default: 3.")]
Others = Annotated[
    list[str] | None,
    _option(
        TRIALS, "Any other field of a job, as of `lorry jobs submit`. May be repeated.", "--set", metavar="PATH=VALUE"
    ),
]
OPTIONS = {
    "rank": "lora.rank",
    "learning_rate": "optimizer.learning_rate",
    "method": "method.type",
    "max_steps": "max_steps",
    "suffix": "suffix",
    "priority": "priority",
    "max_concurrent": "max_concurrent",
}
"""The field of the body that each option stands for; epochs and batch_size are the method's."""
NUMBERS = {"epochs": "n_epochs", "batch_size": "batch_size"}


@app.command(cls=Sectioned)
def run(
    ctx: typer.Context,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A base model's name.")],
    training: Annotated[str, typer.Argument(metavar="TRAIN", help="A JSONL file's path, or an uploaded one's id.")],
    *,
    over: Over,
    random: Random = False,
    asha: Asha = False,
    trials: Annotated[int | None, _option(SEARCH, "How many, of --random and --asha.")] = None,
    min_steps: MinSteps = None,
    reduction_factor: Reduction = None,
    metric: Annotated[Metric | None, _option(SEARCH, "What trials are compared by. Default: valid_loss.")] = None,
    seed: Annotated[int | None, _option(SEARCH, "Of what is drawn, and of each trial.")] = None,
    valid: Annotated[str | None, _option(TRIALS, "Held-out file: a path or an id.")] = None,
    rank: Annotated[int | None, _option(TRIALS, "Rank of the adapters.")] = None,
    learning_rate: Annotated[float | None, _option(TRIALS, "Peak learning rate.", "--learning-rate", "--lr")] = None,
    method: Annotated[Method | None, _option(TRIALS, "What the adapters learn by.")] = None,
    epochs: Annotated[int | None, _option(TRIALS, "Passes over the training file.")] = None,
    max_steps: Annotated[int | None, _option(TRIALS, "End after so many optimizer steps.")] = None,
    batch_size: Annotated[int | None, _option(TRIALS, "Sequences per optimizer step.")] = None,
    suffix: Annotated[str | None, _option(TRIALS, "Becomes part of each adapter's name.")] = None,
    other: Others = None,
    keep_best: Annotated[bool, _option(RUN, "At the end, delete all adapters but the best.", "--keep-best")] = False,
    max_concurrent: Annotated[int | None, _option(RUN, "Trials unfinished at one time, at most.")] = None,
    priority: Annotated[Priority | None, _option(RUN, "Class in the queue. Default: batch.")] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Stay, and draw the leaderboard.")] = False,
    as_json: AsJson = False,
) -> None:
    """Search: every combination of what is listed, or --random or --asha with --trials. Files are uploaded first."""
    search = search_of(random, asha, trials=trials, seed=seed, min_steps=min_steps, reduction_factor=reduction_factor)
    varied = dict(parameter(given) for given in over)
    if len(varied) < len(over):
        raise typer.BadParameter("a field is given twice. Say it once.", param_hint="--over")
    check_space(varied, kind=search["type"], method=method or Method.supervised)
    fields = _fields(ctx.params, method or Method.supervised) | _others(other)
    body = {**nested(list(fields.items())), "parameters": varied, "search": search}
    body |= {"keep_adapters": "best"} if keep_best else {}
    body |= {"objective": {"metric": metric}} if metric else {}
    lorry = client()
    sweep = _send(lorry, model, training, valid, body)
    _tell(lorry, sweep, watch=watch, as_json=as_json)


@app.command("list")
def list_(
    limit: Annotated[int, typer.Option(min=1, help="At most so many.")] = 20,
    as_json: AsJson = False,
) -> None:
    """Newest first."""
    sweeps = list(client().sweeps.list(limit=limit))
    if as_json:
        return output.print_json([sweep.raw for sweep in sweeps])
    columns = (
        Column(title="ID"),
        Column(title="STATUS"),
        Column(title="SEARCH", goes=3),
        Column(title="MODEL", goes=4, narrowest=10),
        Column(title="TRIALS"),
        Column(title="BEST", goes=1),
        Column(title="CREATED", goes=5),
    )
    rows = [
        (
            sweep.id,
            sweep.status,
            sweep.search.get("type"),
            sweep.model,
            f"{sweep_leaderboard.num_ended(sweep)}/{sweep.num_trials}",
            sweep.best_trial.value if sweep.best_trial else None,
            output.briefly(sweep.created_at),
        )
        for sweep in sweeps
    ]
    empty = "There is no sweep yet. Start one with `lorry sweep run MODEL TRAIN --valid FILE --over lora.rank=4,8,16`."
    return table(columns, rows, empty=empty)


@app.command()
def show(
    sweep_id: SweepId,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="Trials at most.")] = 50,
    as_json: AsJson = False,
) -> None:
    """One sweep, and its trials from the best to the worst."""
    lorry = client()
    sweep = lorry.sweeps.get(sweep_id)
    trials = list(lorry.sweeps.trials(sweep_id, limit=limit))
    if as_json:
        return output.print_json({**sweep.raw, "trials": [trial.raw for trial in trials]})
    output.pairs(sweep_leaderboard.facts(sweep))
    output.console().print("")
    sweep_leaderboard.print_board(sweep, trials)
    return None


@app.command()
def watch(sweep_id: SweepId, as_json: AsJson = False) -> None:
    """Draw the leaderboard until all trials have ended. Exit code 1 if none has succeeded."""
    sweep_leaderboard.stay(client(), sweep_id, as_json=as_json)


@app.command()
def cancel(sweep_id: SweepId, _yes: YesTaken = False, as_json: AsJson = False) -> None:
    """Make no further trial and end those that have not ended. Adapters that were trained stay."""
    sweep = client().sweeps.cancel(sweep_id)
    if as_json:
        return output.print_json(sweep.raw)
    return output.say(f"{sweep.id} is {'cancelled' if sweep.is_final else 'being cancelled'}.")


def _fields(params: Mapping[str, Any], method: Method) -> dict[str, Any]:
    given = {path: params[name] for name, path in OPTIONS.items() if params[name] is not None}
    numbers = {name: params[option] for option, name in NUMBERS.items() if params[option] is not None}
    given |= {f"method.{method}.hyperparameters.{name}": value for name, value in numbers.items()}
    return given | ({"method.type": method} if numbers else {})


def _others(given: list[str] | None) -> dict[str, Any]:
    pairs = (pair(each, "--set", "PATH=VALUE") for each in given or [])
    return {path: json_or_text(text) for path, text in pairs}


def _send(lorry: Lorry, model: str, training: str, valid: str | None, body: Mapping[str, Any]) -> Sweep:
    given = {"TRAIN": training} | ({} if valid is None else {"--valid": valid})
    with send_with_files(lorry, model, given) as ids:
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
            in_typed_words(error, {**typed, "search.trials": "--trials", "search.min_steps": "--min-steps"})
            raise


def _tell(lorry: Lorry, sweep: Sweep, *, watch: bool, as_json: bool) -> None:
    if watch:
        sweep_leaderboard.stay(lorry, sweep.id, as_json=as_json)
    elif as_json:
        output.print_json(sweep.raw)
    else:
        output.console().print(sweep.id)
        output.say(f"{sweep.num_trials} trials. Look at them with: lorry sweep show {sweep.id}")
