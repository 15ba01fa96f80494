"""A new hyperparameter is added in three files. The API, the CLI, the SDK and the reference are generated."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COPIED = ("api", "catalog", "dashboard", "lora_core", "lorry", "tools", "worker", "migrations", "pyproject.toml")
DESCRIPTION = "Nesterov momentum (sgd only)."
EDITS = {
    "catalog/spec/training.py": (
        "    weight_decay: float = Field(",
        f'    nesterov: bool = Field(default=False, description="{DESCRIPTION}")\n',
    ),
    "lora_core/config.py": ("    weight_decay: float = 0.0\n", "    nesterov: bool = False\n"),
    "lora_core/adapter/optimizer.py": (
        "    for part, factor in adapter.parts(config.lora_plus_ratio):\n        adapter.p[part].add_(adapter.m[part]",
        "    if config.nesterov:\n        adapter.m.mul_(config.momentum).add_(adapter.g)\n",
    ),
}
"""By file: the place, and the lines that are inserted before it."""
GENERATED = ("lorry/cli/parsing/job_options.json", "lorry/requests.py")
CHECK = """
import json
from catalog.spec.job import JobRequest, resolve
from tools import reference_fields
from tools.reference_api import openapi
from worker.children.trainer.job_config import job_config

request = JobRequest.model_validate(
    {"model": "m", "training_file": "f", "optimizer": {"type": "sgd", "learning_rate": 0.1, "nesterov": True}}
)
spec = resolve(request, num_rows=100, max_positions=None, seed=1)
schemas = openapi()["components"]["schemas"]
print(json.dumps({
    "api": {name: schemas[name]["properties"]["nesterov"] for name in ("OptimizerRequest", "OptimizerSpec")},
    "reference": reference_fields.job_fields("optimizer"),
    "engine": job_config(spec, num_steps=1, evaluate_every_steps=None).optimizer.nesterov,
}))
"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of the source tree with the new hyperparameter, and with its generated files written again."""
    folder = tmp_path_factory.mktemp("tree")
    for name in COPIED:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / name)
    for name, (place, lines) in EDITS.items():
        text = (folder / name).read_text()
        assert text.count(place) == 1, name
        (folder / name).write_text(text.replace(place, lines + place))
    run(folder, "-m", "tools.generate_docs")
    return folder


def run(tree: Path, *arguments: str) -> str:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=tree,
        env={"PYTHONPATH": str(tree)},
        check=True,
        capture_output=True,
        text=True,
    ).stdout


def test_api_reference_and_engine_have_the_new_hyperparameter(tree: Path) -> None:
    found = json.loads(run(tree, "-c", CHECK))

    assert {schema["description"] for schema in found["api"].values()} == {DESCRIPTION}
    assert "`optimizer.nesterov`" in found["reference"]
    assert DESCRIPTION in found["reference"]
    assert found["engine"] is True


def test_cli_and_sdk_have_the_new_hyperparameter(tree: Path) -> None:
    assert "--nesterov" in run(tree, "-m", "lorry", "jobs", "submit", "--help")
    for name in GENERATED:
        assert "nesterov" in (tree / name).read_text(), name
        assert "nesterov" not in (ROOT / name).read_text(), name
