"""Several processes that train together end with the same bytes as one process."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_core.base_model.model import BaseModel, describe_base, load_base
from lora_core.base_model.patching import Attachment
from lora_core.base_model.sharding import Strategy, offloads
from lora_core.distributed import ranks as distributed
from lora_core.distributed.ranks import ALONE, Ranks
from lora_core.engine.step import TickPlan
from lora_core.errors import LoraCoreError, UnsupportedModel
from lora_core.events import JobEvaluated, JobStepped
from tests.lora_core.scenarios import Submission, run_alone, submissions
from tests.lora_core.train_in_ranks import jobs_called, summary
from tests.services.running import free_port

pytestmark = pytest.mark.timeout(1800)
ROOT = Path(__file__).parents[3]


def test_ranks_on_gpus_send_through_the_communicator_of_all(monkeypatch, tmp_path):
    """Without the device, torch creates a communicator of NCCL for each pair of ranks, in device memory."""
    given: dict[str, Any] = {}

    def initialize(backend: str, **options: Any) -> None:
        given.update(options, backend=backend)
        raise InterruptedError

    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: given.update(current=device))
    monkeypatch.setattr(torch.distributed, "init_process_group", initialize)

    with pytest.raises(InterruptedError):
        distributed.join("cuda:1", silence_seconds=60, file=tmp_path / "store")

    assert (given["current"], given["device_id"]) == ("cuda:1", torch.device("cuda:1"))
    assert (given["backend"], given["rank"], given["world_size"]) == ("cpu:gloo,cuda:nccl", 1, 2)


def run_in_ranks(module: str, *arguments: str, size: int) -> None:
    """Start processes as torchrun does. All must succeed. If another program has taken the port, retry once."""
    statuses, printed = run_processes(module, *arguments, size=size, port=free_port())
    if "EADDRINUSE" in printed:
        statuses, printed = run_processes(module, *arguments, size=size, port=free_port())
    assert statuses == [0] * size, printed


def run_processes(module: str, *arguments: str, size: int, port: int) -> tuple[list[int], str]:
    """Return the exit statuses and all output."""
    shared = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            cwd=ROOT,
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_WAIT_POLICY": "PASSIVE"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(size)
    ]
    try:
        printed = [process.communicate(timeout=1200)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], "\n".join(printed)


def reports(
    base_dir: Path, folder: Path, *, size: int, strategy: Strategy, jobs: str = "kinds"
) -> list[dict[str, Any]]:
    """Return the report of each rank."""
    run_in_ranks("tests.lora_core.train_in_ranks", str(base_dir), str(folder), strategy, jobs, size=size)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(size)]


def alone_on(base: BaseModel, jobs: dict[str, Submission]) -> dict[str, Any]:
    return {name: summary(run_alone(base, job)) for name, job in jobs.items() if name != "plain"}


def check_report(alone: dict[str, Any], found: dict[str, Any]) -> None:
    """Check a rank's report: each job ends as alone, PEFT verifies the adapter, and the invalid job is rejected."""
    for outcomes in found["outcomes"].values():
        assert outcomes.keys() == alone.keys()
        for job, outcome in outcomes.items():
            assert outcome == alone[job], job
    assert found["verified"]
    assert found["with_recomputed_blocks"] == found["adapter"]
    assert (found["refused"], found["jobs"]) == ("bad_checkpoint", [])


@pytest.mark.slow_repetitions
@pytest.mark.parametrize("size", [2, 3])
def test_adapter_trained_by_several_processes_has_the_bytes_of_one(base_dirs, load, tmp_path: Path, size) -> None:
    each = reports(base_dirs["llama"], tmp_path, size=size, strategy="replicated")

    alone = alone_on(load("llama"), submissions("llama"))
    for found in each:
        check_report(alone, found)
        assert found["num_ticks"] < 12, "small jobs are computed one by one forever"
    assert len({found["adapter"] for found in each}) == len({found["answers"] for found in each}) == 1


HAS_DEEPSPEED = pytest.mark.skipif(find_spec("deepspeed") is None, reason="make test-deepspeed installs DeepSpeed")


BY_ZERO3 = [pytest.param(strategy, marks=HAS_DEEPSPEED) for strategy in ("zero3", "zero3_offload")]


@pytest.mark.slow_repetitions
@pytest.mark.parametrize("strategy", ["fsdp2", "fsdp2_offload", *BY_ZERO3])
def test_sharded_base_gives_the_bytes_of_a_replicated_base(base_dirs, load, tmp_path: Path, strategy) -> None:
    """The bytes are equal if the replicated base is computed in the same way, linear by linear."""
    each = reports(base_dirs["llama"], tmp_path, size=2, strategy=strategy)

    base = load("llama")
    base.attachment = Attachment(base.model, batch_invariant=True, is_sharded=True)
    alone = alone_on(base, jobs_called("kinds", is_sharded=True))
    blocks = describe_base(base_dirs["llama"])["blocks"]["num_parameters"]
    for found in each:
        check_report(alone, found)
        assert found["base_bytes"] == base.num_bytes - 4 * blocks // 2, "a rank holds half of the blocks"
        assert found["is_offloaded"] == offloads(strategy)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["replicated", "fsdp2", "fsdp2_offload", *BY_ZERO3])
def test_two_processes_train_a_real_model_to_the_losses_of_one(real_base_dir, tmp_path: Path, strategy) -> None:
    each = reports(real_base_dir, tmp_path, size=2, strategy=strategy, jobs="real")

    base = load_base(real_base_dir, dtype="float32", device="cpu")
    jobs = jobs_called("real", is_sharded=strategy != "replicated")
    alone = {name: run_alone(base, job) for name, job in jobs.items()}
    for found in each:
        assert found["verified"]
        for name, outcome in alone.items():
            expected = [event.loss for event in outcome.events if isinstance(event, (JobStepped, JobEvaluated))]
            assert found["outcomes"]["bound"][name]["losses"] == pytest.approx(expected, rel=1e-4)


def test_every_pair_of_ranks_has_communicated_before_training(monkeypatch):
    """Two ranks open a channel at their first message, and the channel takes GPU memory."""
    messages: list[tuple[str, int, int]] = []
    monkeypatch.setattr(distributed.dist, "broadcast", lambda _, src: messages.append(("to all", src, src)))
    for rank in range(3):
        monkeypatch.setattr(distributed.dist, "send", lambda _, dst, rank=rank: messages.append(("sent", rank, dst)))
        monkeypatch.setattr(distributed.dist, "recv", lambda _, src, rank=rank: messages.append(("heard", src, rank)))
        distributed.connect_all(Ranks(rank=rank, size=3), "cpu")

    pairs = {(0, 1), (0, 2), (1, 2)}
    assert {(low, high) for how, low, high in messages if how == "sent"} == pairs
    assert sorted(messages) == sorted(
        [("sent", *pair) for pair in pairs] + [("heard", *pair) for pair in pairs] + [("to all", 0, 0)] * 3
    )


def test_slices_are_distributed_over_ranks_by_tokens_in_order():
    assert Ranks(size=2).shared_out([10, 10, 10, 10]) == [0, 0, 1, 1]
    assert Ranks(size=2).shared_out([30, 10, 10, 10]) == [0, 1, 1, 1]
    assert Ranks(size=3).shared_out([5] * 7) == [0, 0, 1, 1, 1, 2, 2]
    assert Ranks(size=4).shared_out([7]) == [2]
    assert ALONE.shared_out([3, 4]) == [0, 0]


def test_sum_of_one_rank_adds_its_parts_in_order():
    total = torch.tensor([1e8])
    parts = [(0, None), (0, torch.tensor([1.0])), (0, torch.tensor([-1e8])), (0, torch.tensor([1.0]))]
    assert ALONE.carry(total, holder=None, parts=parts) == 0
    assert float(total) == float(((torch.tensor(1e8) + 1.0) - 1e8) + 1.0)


def test_tick_plan_survives_a_json_round_trip():
    plan = TickPlan(kind="train", tokens={"b": (3, 4), "a": (5,)}, ranks=(0, 0, 1), checkpointed=True)
    assert TickPlan.of_json(json.loads(json.dumps(plan.as_json()))) == plan
    assert plan.by_job() == {"b": range(2), "a": range(2, 3)}
    assert (plan.num_tokens, plan.largest_share) == (12, 7)


@pytest.mark.parametrize("own", [None, UnsupportedModel("A third.", remedy="None.")])
def test_each_rank_learns_which_ranks_failed(monkeypatch: pytest.MonkeyPatch, own: UnsupportedModel | None) -> None:
    other = {"message": "Cut short.", "remedy": "Restore it.", "code": "unsafe_file"}
    monkeypatch.setattr(Ranks, "gathered", lambda _, summary: [None, other, summary])

    def act() -> None:
        with Ranks(rank=2, size=3).sharing_errors():
            if own is not None:
                raise own

    with pytest.raises(LoraCoreError, match="Cut short." if own is None else "A third.") as raised:
        act()
    assert raised.value.ranks == ((1,) if own is None else (1, 2))
