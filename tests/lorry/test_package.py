"""What `import lorry` gives: names and modules, looked up when they are first used."""

from __future__ import annotations

import subprocess
import sys

import pytest

import lorry

FRESH = """
import sys, lorry
assert not {"lorry.errors", "lorry.models.jobs", "httpx"} & sys.modules.keys(), "loaded unasked"
assert lorry.errors.NotFound is lorry.NotFound
assert lorry.models.JobUpdate is lorry.JobUpdate
assert vars(lorry)["NotFound"] is lorry.NotFound, "looked up again each time"
"""


def test_modules_and_names_are_attributes_once_they_are_asked_for() -> None:
    done = subprocess.run([sys.executable, "-c", FRESH], capture_output=True, text=True, check=False)

    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("name", lorry.__all__)
def test_every_name_that_is_told_is_there(name: str) -> None:
    assert getattr(lorry, name).__name__ == name


@pytest.mark.parametrize("name", ["nothing", "__main__", "__wrapped__"])
def test_what_is_not_there_is_an_attribute_error(name: str) -> None:
    with pytest.raises(AttributeError, match="has no attribute"):
        getattr(lorry, name)
