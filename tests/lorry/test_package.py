"""The names and modules of `import lorry`, which are loaded on first use."""

from __future__ import annotations

import subprocess
import sys

import pytest

import lorry

FRESH = """
import sys, lorry
assert not {"lorry.errors", "lorry.models.jobs", "httpx"} & sys.modules.keys(), "loaded before the first use"
assert lorry.errors.NotFound is lorry.NotFound
assert lorry.models.JobUpdate is lorry.JobUpdate
assert vars(lorry)["NotFound"] is lorry.NotFound, "the attribute is not cached"
"""


def test_modules_and_names_are_loaded_on_first_use() -> None:
    done = subprocess.run([sys.executable, "-c", FRESH], capture_output=True, text=True, check=False)

    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("name", lorry.__all__)
def test_every_exported_name_exists(name: str) -> None:
    assert getattr(lorry, name).__name__ == name


@pytest.mark.parametrize("name", ["nothing", "__main__", "__wrapped__"])
def test_unknown_name_raises_attribute_error(name: str) -> None:
    with pytest.raises(AttributeError, match="has no attribute"):
        getattr(lorry, name)
