"""Scripts on the pages write files that an upload accepts, and the vLLM guide uses the options that Lorry uses."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from catalog.datasets import validator
from catalog.settings import Settings
from lorry.cli import vllm
from tests.docs.interpreters import environment
from tests.docs.pages import ROOT, blocks

CONVERTED = {
    "from-csv.jsonl": ("chat", 2),
    "from-alpaca.jsonl": ("chat", 2),
    "from-sharegpt.jsonl": ("chat", 1),
    "from-datasets.jsonl": ("chat", 1),
    "from-datasets-valid.jsonl": ("chat", 1),
}
RECIPES = {
    "classify-train.jsonl": ("chat", 48),
    "classify-valid.jsonl": ("chat", 12),
    "extract-train.jsonl": ("chat", 60),
    "extract-valid.jsonl": ("chat", 12),
    "style-train.jsonl": ("chat", 48),
    "style-valid.jsonl": ("chat", 12),
    "tools-train.jsonl": ("chat", 48),
    "tools-valid.jsonl": ("chat", 12),
    "thumbs-train.jsonl": ("unpaired", 40),
    "thumbs-valid.jsonl": ("unpaired", 8),
}


@pytest.mark.parametrize(("page", "expected"), [("convert-data", CONVERTED), ("recipes", RECIPES)])
def test_scripts_write_files_that_an_upload_accepts(
    page: str, expected: dict[str, tuple[str, int]], tmp_path: Path
) -> None:
    work = _written_by(page, tmp_path)

    settings = Settings()
    found: dict[str, tuple[str, int]] = {}
    for path in work.glob("*.jsonl"):
        with path.open("rb") as file:
            check = validator.inspect(file, max_line_bytes=settings.max_line_bytes, max_rows=settings.max_rows)
        found[path.name] = (check.kind, check.num_rows)
    assert found == expected


def test_no_recipe_validates_on_a_row_that_it_trains_on(tmp_path: Path) -> None:
    work = _written_by("recipes", tmp_path)

    for train in work.glob("*-train.jsonl"):
        valid = work / train.name.replace("-train", "-valid")
        assert set(train.read_text("utf-8").splitlines()).isdisjoint(valid.read_text("utf-8").splitlines())


def _written_by(page: str, folder: Path) -> Path:
    """Run the blocks of a page that write scripts and data, up to their first `lorry` command."""
    home, work = folder / "home", folder / "work"
    home.mkdir()
    work.mkdir()
    for block in blocks(ROOT / f"docs/how-to/{page}.md"):
        script = block.text.partition("\nlorry ")[0]
        if script.startswith("cat > ") and "OpenAI" not in script:
            subprocess.run(["bash", "-ec", script], cwd=work, env=environment(home, ROOT), check=True, timeout=120)
    return work


def test_options_of_a_cpu_are_those_of_lorry() -> None:
    guide = (ROOT / "docs" / "how-to" / "serve.md").read_text()

    assert f" {' '.join(vllm._ON_CPU)} " in guide
