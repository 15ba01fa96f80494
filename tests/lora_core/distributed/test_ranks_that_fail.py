"""What befalls one of several processes: memory that runs out, wrong weights, a failure amid a tick."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_core.adapter.flat_adapter import _bit_sum
from lora_core.distributed.failure_broadcast import FellowFailure
from lora_core.engine.engine import Engine
from lora_core.engine_config import EngineConfig
from lora_core.errors import BrokenPass
from tests.lora_core.distributed.test_ranks import free_port, run_in_ranks, started_and_ended
from tests.lora_core.fail_in_ranks import JOBS, STEPS
from tests.lora_core.scenarios import admit

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def reports(base_dirs, tmp_path_factory) -> list[dict[str, Any]]:
    return in_ranks(base_dirs["llama"], tmp_path_factory.mktemp("ranks"), "replicated")


def in_ranks(base_dir: Path, folder: Path, strategy: str, way: str = "error") -> list[dict[str, Any]]:
    run_in_ranks("tests.lora_core.fail_in_ranks", str(base_dir), str(folder), strategy, way, size=2)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def test_memory_that_runs_out_amid_a_tick_on_one_process_changes_no_byte(reports):
    for report in reports:
        assert report["undisturbed"]["ended"].keys() == JOBS.keys()
        assert report["run_training"] == report["undisturbed"]


@pytest.mark.parametrize("who", ["second short of more than a slice", "second short of all"])
def test_one_process_that_is_short_of_memory_for_good_costs_no_job_while_another_has_room(reports, who):
    for report in reports:
        assert report[who] == report["undisturbed"]


def test_a_slice_that_fits_no_process_costs_its_job_on_all_and_no_packmate_a_byte(reports):
    for report in reports:
        assert report["large"]["refused"].keys() == {"large"}
        assert report["large"]["ended"] == report["undisturbed"]["ended"]
    assert reports[0]["large"] == reports[1]["large"]


def test_all_processes_compute_smaller_ticks_while_a_job_is_there_for_which_memory_ran_out(reports):
    usual, once, twice = reports[0]["shortages"]
    assert reports[0]["shortages"] == reports[1]["shortages"]
    for found in (usual, once, twice):
        assert found["ended"] == reports[0]["undisturbed"]["ended"], "smaller ticks change no byte"
        assert max(number for number, _ in found["after"]) >= 3, "they stay small once it has gone"
    assert not any(is_again for _, is_again in usual["beside"] + once["after"] + twice["after"])
    assert all(is_again for _, is_again in once["beside"] + twice["beside"])
    slices = [max(number for number, _ in found["beside"]) for found in (usual, once, twice)]
    assert 4 <= slices[0] > slices[1] > slices[2] == 1


@pytest.mark.parametrize("when", ["gradient_norm", "optimizer_step"])
def test_memory_that_runs_out_on_one_process_while_a_step_is_booked_costs_that_job_alone_on_all(reports, when):
    for report in reports:
        refused, ended = report[when]["refused"], report[when]["ended"]
        assert len(refused) == 1
        assert refused.keys() | ended.keys() == JOBS.keys()
        assert ended == {name: report["undisturbed"]["ended"][name] for name in ended}
        ((_, step),) = refused.values()
        assert step < STEPS
    assert reports[0][when] == reports[1][when]


def test_weights_that_differ_are_found_before_they_are_saved_and_the_process_is_named(reports):
    for report in reports:
        equal, after = report["differ"]
        assert equal == ""
        assert "'one'" not in after, "all jobs of the trainer are told"
        assert "rank 0 differs from 1" in after


@pytest.mark.parametrize("where", ["weights of one", "norm of one", "update of one"])
def test_what_diverges_for_one_process_is_laid_on_no_job(reports, where):
    for report in reports:
        assert "rank 0 differs from 1" in report["diverge"][where]


def test_what_diverges_for_all_processes_is_the_jobs_own(reports):
    for report in reports:
        assert report["diverge"]["norm of both"] == "diverged: The gradient of step 1 is not finite."


@pytest.mark.slow_repetitions
@pytest.mark.parametrize("strategy", ["replicated", "fsdp2"])
def test_a_process_that_fails_amid_a_pass_ends_all_and_each_tells_its_failure(base_dirs, tmp_path, request, strategy):
    if strategy == "replicated":
        first, second = request.getfixturevalue("reports")
    else:
        first, second = in_ranks(base_dirs["llama"], tmp_path, strategy)

    assert second["end"] == "ValueError: the number 7\nagain"
    assert first["end"] == f"{FellowFailure.__name__}: Rank 1 failed: ValueError: the number 7"


@pytest.mark.slow
@pytest.mark.parametrize("way", ["in a tick", "at the start", "in verification", "in answers"])
def test_memory_that_runs_out_amid_a_pass_through_a_divided_base_ends_all_for_that(base_dirs, tmp_path, way):
    first, second = in_ranks(base_dirs["llama"], tmp_path, "fsdp2", f"memory {way}")

    assert second["end"] == f"BrokenPass: {BrokenPass()}"
    assert first["end"] == f"{FellowFailure.__name__}: Rank 1 failed: {BrokenPass.__module__}.{second['end']}"


def test_a_process_that_waits_on_for_one_that_has_failed_tells_where_it_waited_and_ends():
    statuses, printed = started_and_ended("tests.lora_core.hang_in_ranks", size=2, port=free_port())

    assert statuses == [1, 3], printed
    assert "FellowFailure: Rank 1 failed: ValueError: the number 7" in printed
    assert "hang_in_ranks.py" in printed, "no stack was printed"
    assert "in wait" in printed


@pytest.mark.parametrize(("dtype", "bits"), [(torch.float32, torch.int32), (torch.bfloat16, torch.int16)])
@pytest.mark.parametrize(("start", "stop"), [(0, 8), (0, 7), (7, 14), (7, 15), (1, 2), (1, 3), (3, 3)])
def test_one_bit_changes_the_sum_of_a_vector_wherever_it_lies(start, stop, dtype, bits):
    vector = torch.arange(16, dtype=dtype)[start:stop]
    before = _bit_sum(vector)

    for place in range(len(vector)):
        vector.view(bits)[place] ^= 1 << 6
        assert _bit_sum(vector) != before
        vector.view(bits)[place] ^= 1 << 6

    assert _bit_sum(vector) == before


@pytest.mark.parametrize("subtracts_start", [False, True])
def test_a_bit_of_what_passes_read_changes_the_sums_of_a_row(load, subtracts_start):
    one = JOBS["one"].config
    begun = replace(one.lora, init_lora_weights="olora" if subtracts_start else "default")
    job = replace(JOBS["one"], config=replace(one, lora=begun))
    engine = Engine(load("llama", "bfloat16"), EngineConfig())
    admit(engine, "one", job)
    engine._started("one")
    adapter = engine._jobs["one"].adapter
    read = adapter.paired if subtracts_start else adapter.compute
    before = adapter.bit_sums()

    read.view(torch.int16)[5] ^= 1

    assert adapter.bit_sums() != before
