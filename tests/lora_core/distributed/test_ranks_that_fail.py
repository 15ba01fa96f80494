"""Failures of one of several processes: out of memory, differing weights, an error during a tick."""

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
from tests.lora_core.distributed.test_ranks import run_in_ranks, run_processes
from tests.lora_core.fail_in_ranks import JOBS, STEPS
from tests.lora_core.scenarios import admit
from tests.services.running import free_port

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def reports(base_dirs, tmp_path_factory) -> list[dict[str, Any]]:
    return in_ranks(base_dirs["llama"], tmp_path_factory.mktemp("ranks"), "replicated")


def in_ranks(base_dir: Path, folder: Path, strategy: str, way: str = "error") -> list[dict[str, Any]]:
    run_in_ranks("tests.lora_core.fail_in_ranks", str(base_dir), str(folder), strategy, way, size=2)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def test_out_of_memory_in_a_tick_on_one_process_changes_no_byte(reports):
    for report in reports:
        assert report["undisturbed"]["ended"].keys() == JOBS.keys()
        assert report["run_training"] == report["undisturbed"]


@pytest.mark.parametrize("case", ["second short of more than a slice", "second short of all"])
def test_process_permanently_short_of_memory_fails_no_job(reports, case):
    for report in reports:
        assert report[case] == report["undisturbed"]


def test_slice_that_fits_on_no_process_fails_only_its_job(reports):
    for report in reports:
        assert report["large"]["refused"].keys() == {"large"}
        assert report["large"]["ended"] == report["undisturbed"]["ended"]
    assert reports[0]["large"] == reports[1]["large"]


def test_ticks_are_smaller_while_a_job_with_past_shortages_is_loaded(reports):
    usual, once, twice = reports[0]["shortages"]
    assert reports[0]["shortages"] == reports[1]["shortages"]
    for found in (usual, once, twice):
        assert found["ended"] == reports[0]["undisturbed"]["ended"], "smaller ticks change no byte"
        assert max(number for number, _ in found["after"]) >= 3, "ticks stay small after the job has left"
    assert not any(is_recomputed for _, is_recomputed in usual["with_job"] + once["after"] + twice["after"])
    assert all(is_recomputed for _, is_recomputed in once["with_job"] + twice["with_job"])
    slices = [max(number for number, _ in found["with_job"]) for found in (usual, once, twice)]
    assert 4 <= slices[0] > slices[1] > slices[2] == 1


@pytest.mark.parametrize("when", ["step_sizes", "optimizer_step"])
def test_out_of_memory_in_an_update_on_one_process_fails_only_that_job(reports, when):
    for report in reports:
        refused, ended = report[when]["refused"], report[when]["ended"]
        assert len(refused) == 1
        assert refused.keys() | ended.keys() == JOBS.keys()
        assert ended == {name: report["undisturbed"]["ended"][name] for name in ended}
        ((_, step),) = refused.values()
        assert step < STEPS
    assert reports[0][when] == reports[1][when]


def test_differing_weights_are_detected_and_the_ranks_named(reports):
    for report in reports:
        equal, after = report["differ"]
        assert equal == ""
        assert "'one'" not in after, "the error concerns all jobs of the trainer"
        assert "rank 0 differs from 1" in after


@pytest.mark.parametrize("where", ["weights of one", "norm of one", "update of one"])
def test_divergence_on_one_process_is_not_attributed_to_the_job(reports, where):
    for report in reports:
        assert "rank 0 differs from 1" in report["diverge"][where]


def test_norms_that_two_devices_round_differently_are_no_difference(reports):
    for report in reports:
        assert report["diverge"]["last bits of one"] == "well"


def test_divergence_on_all_processes_is_attributed_to_the_job(reports):
    for report in reports:
        assert report["diverge"]["norm of both"] == "diverged: The gradient of step 1 is not finite."


@pytest.mark.slow_repetitions
@pytest.mark.parametrize("strategy", ["replicated", "fsdp2"])
def test_failure_in_a_pass_stops_all_processes_and_each_reports_it(base_dirs, tmp_path, request, strategy):
    if strategy == "replicated":
        first, second = request.getfixturevalue("reports")
    else:
        first, second = in_ranks(base_dirs["llama"], tmp_path, strategy)

    assert second["end"] == "ValueError: the number 7\nagain"
    assert first["end"] == f"{FellowFailure.__name__}: Rank 1 failed: ValueError: the number 7"


@pytest.mark.slow
@pytest.mark.parametrize("way", ["in a tick", "at the start", "in verification", "in answers"])
def test_out_of_memory_in_a_pass_of_a_sharded_base_stops_all_processes(base_dirs, tmp_path, way):
    first, second = in_ranks(base_dirs["llama"], tmp_path, "fsdp2", f"memory {way}")

    assert second["end"] == f"BrokenPass: {BrokenPass()}"
    assert first["end"] == f"{FellowFailure.__name__}: Rank 1 failed: {BrokenPass.__module__}.{second['end']}"


def test_process_that_waits_for_a_failed_one_prints_its_stack_and_exits():
    statuses, printed = run_processes("tests.lora_core.hang_in_ranks", size=2, port=free_port())

    assert statuses == [1, 3], printed
    assert "FellowFailure: Rank 1 failed: ValueError: the number 7" in printed
    assert "hang_in_ranks.py" in printed, "no stack was printed"
    assert "in wait" in printed


@pytest.mark.parametrize(("dtype", "bits"), [(torch.float32, torch.int32), (torch.bfloat16, torch.int16)])
@pytest.mark.parametrize(("start", "stop"), [(0, 8), (0, 7), (7, 14), (7, 15), (1, 2), (1, 3), (3, 3)])
def test_bit_sum_of_a_vector_changes_with_any_single_bit(start, stop, dtype, bits):
    vector = torch.arange(16, dtype=dtype)[start:stop]
    before = _bit_sum(vector)

    for place in range(len(vector)):
        vector.view(bits)[place] ^= 1 << 6
        assert _bit_sum(vector) != before
        vector.view(bits)[place] ^= 1 << 6

    assert _bit_sum(vector) == before


@pytest.mark.parametrize("subtracts_start", [False, True])
def test_bit_sums_of_an_adapter_cover_the_weights_that_passes_read(load, subtracts_start):
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
