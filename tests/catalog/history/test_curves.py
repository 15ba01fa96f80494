"""Thinned curves keep their ends and peaks."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from catalog.history.metric_points import thin


@given(st.lists(st.floats(-10, 10), max_size=300), st.integers(1, 60))
def test_thinned_curve_is_short_and_keeps_ends_peaks_and_order(values: list[float], max_points: int) -> None:
    points = list(enumerate(values))

    kept = thin(points, max_points, value=lambda point: point[1])

    assert len(kept) <= max(4, max_points)
    assert kept == sorted(set(kept))
    if points:
        assert (kept[0], kept[-1]) == (points[0], points[-1])
        assert min(value for _, value in kept) == min(values)
        assert max(value for _, value in kept) == max(values)
