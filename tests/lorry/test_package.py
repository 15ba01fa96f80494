"""The names and modules of `import lorry`, which are loaded on first use."""

from __future__ import annotations

import subprocess
import sys

import pytest

import lorry
from lorry.models import UsageBucket

FRESH = """
import sys, lorry
assert not {"lorry.errors", "lorry.models", "httpx"} & sys.modules.keys(), "loaded before the first use"
assert lorry.errors.NotFound is lorry.NotFound
assert lorry.models.Job is lorry.Job
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


def test_secrets_are_not_in_the_text_of_an_object() -> None:
    key = lorry.ApiKey.of({"id": "key-1", "value": "secret"})
    endpoint = lorry.WebhookEndpoint.of({"id": "webhook-1", "signing_secret": "secret"})

    assert "key-1" in repr(key)
    assert key.value == endpoint.signing_secret == "secret"
    assert "'secret'" not in repr(endpoint) + repr(key)


def test_objects_and_lists_of_a_response_are_typed_and_null_fields_have_a_default() -> None:
    job = lorry.Job.of({"id": "ftjob-1", "status": "failed", "error": {"code": "diverged"}, "progress": None, "new": 1})
    bucket = UsageBucket.of({"results": [{"trained_tokens": 3}]})

    assert (job.is_final, job.error and job.error.code, job.progress.step, job.raw["new"]) == (True, "diverged", 0, 1)
    assert [result.trained_tokens for result in bucket.results] == [3]
