"""What befalls one of several processes: memory that runs out, wrong weights, a failure amid a tick."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_core.adapters import _bit_sum
from lora_core.first_failure import FellowFailure
from tests.lora_core.fail_in_ranks import JOBS, STEPS
from tests.lora_core.test_distributed import run_in_ranks

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def reports(base_dirs, tmp_path_factory) -> list[dict[str, Any]]:
    return in_ranks(base_dirs["llama"], tmp_path_factory.mktemp("ranks"), "replicated")


def in_ranks(base_dir: Path, folder: Path, strategy: str) -> list[dict[str, Any]]:
    run_in_ranks("tests.lora_core.fail_in_ranks", str(base_dir), str(folder), strategy, size=2)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def test_memory_that_runs_out_amid_a_tick_on_one_process_changes_no_byte(reports):
    for report in reports:
        assert report["undisturbed"]["ended"].keys() == JOBS.keys()
        assert report["run_training"] == report["undisturbed"]


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
        assert "'one'" in after
        assert "those of 1 are not those of 0" in after


@pytest.mark.parametrize("strategy", ["replicated", "fsdp2"])
def test_a_process_that_fails_amid_a_pass_ends_all_and_each_tells_its_failure(base_dirs, tmp_path, request, strategy):
    if strategy == "replicated":
        first, second = request.getfixturevalue("reports")
    else:
        first, second = in_ranks(base_dirs["llama"], tmp_path, strategy)

    assert second["end"] == "ValueError: the number 7\nagain"
    assert first["end"] == f"{FellowFailure.__name__}: Rank 1 failed: ValueError: the number 7"


@pytest.mark.parametrize(("start", "stop"), [(0, 8), (0, 7), (7, 14), (7, 15), (1, 2), (3, 3)])
def test_one_bit_changes_the_sum_of_a_vector_wherever_it_lies(start, stop):
    vector = torch.arange(16, dtype=torch.float32)[start:stop]
    before = _bit_sum(vector)

    for place in range(len(vector)):
        vector.view(torch.int32)[place] ^= 1 << 22
        assert _bit_sum(vector) != before
        vector.view(torch.int32)[place] ^= 1 << 22

    assert _bit_sum(vector) == before
