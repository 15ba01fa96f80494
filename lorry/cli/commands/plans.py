"""`lorry plans`: dry runs of jobs, with the options of `lorry jobs submit`."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorry.cli import lookup
from lorry.cli.app import EXIT_REFUSED, client, group, set_parameters
from lorry.cli.commands.submit import read, submit
from lorry.cli.render import output, plan_view
from lorry.cli.render.output import AsJson, Quiet, Yes
from lorry.cli.render.tables import Column, date, listing

if TYPE_CHECKING:
    from lorry.client import Lorry
    from lorry.models import Plan

KEPT_SECONDS = 7 * 24 * 3600
"""Files uploaded for a plan expire with the plan, unless a job reads them."""
NOT_OF_A_PLAN = ("plan", "watch")
app = group("Dry run jobs: check data and estimate memory and time.")
PlanId = Annotated[str, typer.Argument(metavar="PLAN", help="ID of the plan, or a unique prefix of it.")]
EXAMPLES = (
    "lorry plans create smollm2 chats.jsonl --rank 32",
    "lorry plans create smollm2 chats.jsonl --valid valid.jsonl --epochs 3 -o json",
    "lorry plans create -m smollm2 -F file-3f2b -q",
)


def create(ctx: typer.Context, **options: Any) -> None:
    """Dry run: check the data and estimate memory and time of a job without training."""
    as_json, quiet = options["as_json"], options["quiet"]
    request = read(ctx)
    lorry = client()
    planned = request.send(lorry, lorry.plans.create, kept_seconds=KEPT_SECONDS, quiet=quiet)
    if quiet:
        return output.print_ids([planned.id])
    if planned.status == "computing":
        planned = _wait(lorry, planned)
    _print(planned, as_json=as_json)
    if planned.status == "failed":
        raise typer.Exit(EXIT_REFUSED)
    return None


@app.verb("list", "lorry plans list", "lorry plans list -q --limit 5")
def list_(
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="Maximum number of plans to list.")] = 20,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """List plans, newest first."""
    columns = (
        Column("ID", "id"),
        Column("STATUS", "status"),
        Column("MODEL", "model", priority=3, min_width=10),
        Column("STEPS", "num_steps", priority=2),
        Column("TIME", lambda plan: plan_view.likely(plan.training_time), priority=1),
        Column("CREATED", date("created_at"), priority=5),
        Column("EXPIRES", date("expires_at"), priority=4),
    )
    empty = "No plans yet. Create one with `lorry plans create MODEL TRAIN`."
    listing(client().plans.list(limit=limit), columns, empty=empty, as_json=as_json, quiet=quiet)


@app.verb("show", "lorry plans show plan-3f2b", "lorry plans show plan-3f2b --json")
def show(plan_id: PlanId, as_json: AsJson = False) -> None:
    """Show a plan's estimates, warnings and sample rows."""
    lorry = client()
    _print(lorry.plans.get(lookup.plan(lorry, plan_id)), as_json=as_json)


@app.verb("delete", "lorry plans delete plan-3f2b", "lorry plans delete plan-3f2b --yes")
def delete(plan_id: PlanId, yes: Yes = False, as_json: AsJson = False) -> None:
    """Delete a plan. Jobs created from it are kept; plans expire after a week anyway."""
    lorry = client()
    plan_id = lookup.plan(lorry, plan_id)
    output.confirm(f"Delete plan {plan_id}? This can't be undone.", yes=yes)
    lorry.plans.delete(plan_id)
    output.print_deleted("plan", plan_id, as_json=as_json)


def _print(planned: Plan, *, as_json: bool) -> None:
    if as_json:
        return output.print_json(planned.raw)
    plan_view.draw(planned)
    if planned.status == "ready":
        output.echo(f"\nSubmit this job until {output.when(planned.expires_at)} with:")
        output.echo(f"lorry jobs submit --plan {planned.id}")
    return None


def _wait(lorry: Lorry, planned: Plan) -> Plan:
    """Wait for a plan. If the user interrupts, it is still computed."""
    output.echo(f"Preparing files for {planned.id} (longer if the base model must be downloaded first) …")
    try:
        return lorry.plans.wait(planned.id)
    except KeyboardInterrupt:
        output.echo(f"Stopped waiting; the plan is still computed. Show it with: lorry plans show {planned.id}")
        raise


set_parameters(create, [one for one in inspect.signature(submit).parameters.values() if one.name not in NOT_OF_A_PLAN])
app.verb("create", *EXAMPLES)(create)
