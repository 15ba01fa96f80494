"""Whole jobs run on a simulated device in a child process, to find without a GPU what a GPU would reject."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.lora_core.classifiers import classification_jobs, save
from tests.lora_core.scenarios import submissions

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "dtype", "task"),
    [
        ("llama", "float32", "causal-lm"),
        ("llama", "bfloat16", "causal-lm"),
        ("gpt2", "bfloat16", "causal-lm"),
        ("llama", "bfloat16", "sequence-classification"),
        ("bert", "float32", "sequence-classification"),
        ("roberta", "bfloat16", "sequence-classification"),
    ],
)
def test_no_job_mixes_devices_from_admission_to_verified_adapter(
    base_dirs: dict[str, Path], tmp_path: Path, family: str, dtype: str, task: str
) -> None:
    is_causal = task == "causal-lm"
    folder = base_dirs[family] if is_causal else save(family, tmp_path / family)
    expected = {*submissions(family), "child"} if is_causal else set(classification_jobs())

    done = subprocess.run(
        [sys.executable, "-m", "tests.lora_core.train_on_pretend_device", str(folder), family, dtype, task],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stderr[-4000:]
    reports = {report["job"]: report for report in map(json.loads, done.stdout.splitlines())}
    assert reports.keys() == expected
    assert [job for job, report in reports.items() if not report["passed"]] == []
