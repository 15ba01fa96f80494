"""`lorry plan`: what a job would come to, with the very options of `lorry jobs submit`."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, cast, get_type_hints

import typer

from lorry.cli.app import EXIT_REFUSED, client
from lorry.cli.commands.submit import read, submit
from lorry.cli.render import output, plan_view

if TYPE_CHECKING:
    from lorry.client import Lorry
    from lorry.models.plans import Plan

KEPT_SECONDS = 7 * 24 * 3600
"""What is uploaded for a plan goes with the plan, unless a job reads it."""
NOT_OF_A_PLAN = ("plan", "watch")


def plan(ctx: typer.Context, **_: Any) -> None:
    """Tell what a job would come to, and train nothing: its data token by token, memory, time, warnings."""
    as_json: bool = ctx.params["as_json"]
    asked = read(ctx)
    lorry = client()
    planned = asked.send(lorry, lorry.plans.create, kept_seconds=KEPT_SECONDS)
    if planned.status == "computing":
        planned = _waited(lorry, planned)
    if as_json:
        output.print_json(planned.raw)
    else:
        plan_view.draw(planned)
        _tell_next(planned)
    if planned.status == "failed":
        raise typer.Exit(EXIT_REFUSED)


def _waited(lorry: Lorry, planned: Plan) -> Plan:
    """A person may go: the plan is computed all the same."""
    output.say(f"A worker prepares the files for {planned.id}; this takes longer where the base isn't there yet ...")
    try:
        return lorry.plans.wait(planned.id)
    except KeyboardInterrupt:
        output.say(f"No longer waiting. It is computed all the same: GET /v1/plans/{planned.id}")
        raise


def _tell_next(planned: Plan) -> None:
    if planned.status == "ready":
        output.say(f"\nTrain just this, until {output.when(planned.expires_at)}:")
        output.say(f"lorry jobs submit --plan {planned.id}")


def _with_the_options_of_a_job() -> None:
    """As if `plan` had been written with them: typer reads a function's signature and annotations."""
    hints = get_type_hints(submit, include_extras=True)
    signature = inspect.signature(submit)
    kept = [
        parameter.replace(annotation=hints[name])
        for name, parameter in signature.parameters.items()
        if name not in NOT_OF_A_PLAN
    ]
    function = cast("Any", plan)
    function.__signature__ = signature.replace(parameters=kept, return_annotation=None)
    function.__annotations__ = {parameter.name: parameter.annotation for parameter in kept}


_with_the_options_of_a_job()
