"""Processes whose devices add up in other orders have the weights of the leader, and are not at fault."""

import json
from hashlib import sha256
from pathlib import Path

import pytest

from tests.lora_core.distributed.test_ranks import run_in_ranks
from tests.lora_core.scenarios import run_alone
from tests.lora_core.train_in_unlike_ranks import JOBS

pytestmark = pytest.mark.timeout(900)


def test_decompositions_and_norms_of_unlike_devices_do_not_make_ranks_differ(base_dirs, load, tmp_path: Path) -> None:
    run_in_ranks("tests.lora_core.train_in_unlike_ranks", str(base_dirs["llama"]), str(tmp_path), size=2)

    leader, other = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert leader == other
    assert leader.keys() == JOBS.keys()
    for name, job in JOBS.items():
        assert len(leader[name]) == 64, leader[name]  # a digest, and no error
        if not job.config.lora.use_dora:  # with DoRA, passes read the norms of their own device
            assert leader[name] == sha256(run_alone(load("llama"), job).vectors).hexdigest(), name
