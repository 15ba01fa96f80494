"""A sweep of the real service with the command line, up to a verified adapter."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lorry import Lorry
from tests import tiny_base
from tests.lorry.cli.commands.test_up import up
from tests.lorry.commands import Commands
from tests.services.running import free_port

pytestmark = [pytest.mark.timeout(600), pytest.mark.slow]
FLAGS = "--over lora.rank=2,4 --over optimizer.learning_rate=1e-4..1e-2:log --set precision=float32 --max-steps 120"


def test_sweep_runs_and_its_best_adapter_is_pulled_by_sweep_id(tmp_path: Path) -> None:
    base = tiny_base.make(tmp_path / "base")
    train = tiny_base.write_chat(tmp_path / "train.jsonl", 40)
    valid = tiny_base.write_chat(tmp_path / "valid.jsonl", 8, seed=1)
    data_dir = tmp_path / "service" / "data"
    data_dir.parent.mkdir()
    run = Commands(tmp_path, data_dir, 400).run

    with up(data_dir, "--port", str(free_port())), Lorry(data_dir=data_dir) as client:
        run("models", "add", "tiny", base)
        search = "--tpe --asha --trials 5 --min-steps 3 --reduction-factor 2 --seed 1 --watch --json"
        lines = run("sweeps", "run", "tiny", train, "--valid", valid, *FLAGS.split(), *search.split()).splitlines()
        sweep = client.sweeps.get(json.loads(lines[-1])["id"])

        board = list(client.sweeps.trials(sweep.id))
        assert (sweep.status, len(board)) == ("succeeded", 5)
        assert any(trial.reason == "pruned" for trial in board)
        assert len({client.jobs.get(trial.id).trainer_id for trial in board}) == 1
        assert sweep.fine_tuned_model == next(trial for trial in board if trial.status == "succeeded").fine_tuned_model
        assert f"{board[0].value:.4g}" in run("sweeps", "show", sweep.id)
        folder = tmp_path / run("adapters", "pull", sweep.id, "best").strip()
        assert json.loads(run("adapters", "verify", folder, "--json"))["passed"] is True
        assert "lora.rnak" in run("sweeps", "run", "tiny", train, "--valid", valid, "--over", "lora.rnak=1,2", code=1)
