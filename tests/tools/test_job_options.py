"""The options of `lorry jobs submit` are made from the definition of a job."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import typer
from pydantic import Field
from typer.testing import CliRunner

from catalog.spec.job import JobRequest
from catalog.spec.training import OptimizerRequest
from lorry.cli.parsing import job_options as cli_options
from tools.job_options import job_options
from tools.reference_fields import job_fields

if TYPE_CHECKING:
    import pytest


class Optimizer(OptimizerRequest):
    lookahead: float = Field(default=0.5, ge=0, lt=1, description="Weight of the slow weights. A new hyperparameter.")


class Request(JobRequest):
    optimizer: Optimizer = Field(default=Optimizer())  # pyright: ignore[reportIncompatibleVariableOverride]


def test_a_new_hyperparameter_has_a_row_in_the_reference() -> None:
    row = "| `optimizer.lookahead` | number, 0 to below 1 | 0.5 | Weight of the slow weights. A new hyperparameter. |"

    assert row in job_fields("optimizer", request=Request).splitlines()


def test_a_new_hyperparameter_has_an_option(monkeypatch: pytest.MonkeyPatch) -> None:
    found: dict[str, Any] = json.loads(job_options(Request))
    monkeypatch.setattr(cli_options, "OPTIONS", found)
    app = typer.Typer(rich_markup_mode=None)
    sent: dict[str, Any] = {}

    @app.command()
    @cli_options.with_job_options(before="quiet")
    def submit(ctx: typer.Context, *, quiet: bool = False, **_fields: Any) -> None:  # pyright: ignore[reportUnusedFunction]
        sent.update(cli_options.given_fields(ctx.params, found))

    shown = CliRunner().invoke(app, ["--help"])
    CliRunner().invoke(app, ["--lookahead", "0.25", "--rank", "4"], catch_exceptions=False)

    help_text = " ".join(shown.stdout.split())
    assert "--lookahead <float> Weight of the slow weights. 0 to below 1. Default: 0.5." in help_text
    assert sent == {"optimizer.lookahead": 0.25, "lora.rank": 4}


def test_every_option_has_its_own_name() -> None:
    assert len(cli_options.FIELDS) == len(cli_options.OPTIONS)
