"""Parameters of tests that are too expensive in both dtypes."""

import pytest

DTYPES = ("float32", pytest.param("bfloat16", marks=pytest.mark.slow))
"""Other tests check the same invariants in bfloat16 in each run."""
