"""Problems are grouped by field, and an object has none of its own if a field in it has one."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from catalog.spec.validation_messages import by_field


@given(st.lists(st.text(alphabet="ab.-!", max_size=6)))
def test_only_the_innermost_fields_keep_their_problems(paths: list[str]) -> None:
    grouped = by_field((path, {"number": number}) for number, path in enumerate(paths))

    kept = [path for path in dict.fromkeys(paths) if not any(other.startswith(f"{path}.") for other in paths)]
    assert list(grouped) == kept
    for path, problems in grouped.items():
        assert [problem["number"] for problem in problems] == [n for n, other in enumerate(paths) if other == path]


def test_name_with_a_million_dots_is_one_path() -> None:
    """Its parents have a trillion characters together."""
    path = "a." * 1_000_000

    assert list(by_field([(path, {}), ("a", {}), ("b", {})])) == [path, "b"]
