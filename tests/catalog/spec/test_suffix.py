"""Any text may be the suffix of an adapter's name."""

from __future__ import annotations

import pytest

from catalog.spec.job import JobRequest
from catalog.spec.model_fields import LABEL


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("support", "support"),
        ("my-model_v1.2", "my-model_v1.2"),
        ("Customer Service / EU", "Customer-Service-EU"),
        ("für Käufer", "fur-Kaufer"),
        ("a:b\nc\u0007", "a-b-c"),
        ("..hidden ", "hidden"),
        ("x" * 64, "x" * 64),
        ("㎏" * 64, "kg" * 32),
        ("客服", None),
        ("- -", None),
    ],
)
def test_suffix_becomes_a_label(given: str, expected: str | None) -> None:
    request = JobRequest.model_validate({"model": "smol", "training_file": "file-1", "suffix": given})

    assert request.suffix == expected
    assert expected is None or LABEL.match(expected)
    assert JobRequest.model_validate(request.model_dump(mode="json", exclude_unset=True)).suffix == expected
