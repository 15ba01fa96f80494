"""Lists of objects as JSON, ids or a table: one line per row at any width.

In a narrow terminal, columns shrink first, then the least important drop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, TypeVar

from lorry.cli.render import output

_GAP = "  "
Row = TypeVar("Row")


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table. The first column is never cut or dropped."""

    title: str
    value: str | Callable[[Any], object]
    """The name of the field with the value, or a function of the row's object."""
    _: KW_ONLY
    priority: int = 0
    """In a narrow terminal, the column with the highest number is dropped first; 0 is never dropped."""
    min_width: int | None = None
    """In cells. The column may be cut to this width, with an ellipsis. None: never cut."""
    is_optional: bool = False
    """Whether the column is only shown if a row has a value."""

    def of(self, row: object) -> object:
        if callable(self.value):
            return self.value(row)
        return row.get(self.value) if isinstance(row, Mapping) else getattr(row, self.value)  # pyright: ignore


def date(name: str) -> Callable[[Any], str | None]:
    """Return the value of a column with a short date, from the field with the Unix time."""
    return lambda row: output.briefly(getattr(row, name))


def listing(
    found: Iterable[Row], columns: Sequence[Column], *, empty: str, as_json: bool, quiet: bool = False, key: str = "id"
) -> list[Row]:
    """Print objects of the API as JSON, as ids, or as a table. Returns the objects of the table, else nothing."""
    rows: list[Any] = list(found)
    if as_json:
        output.print_json([row.raw for row in rows])
    elif quiet:
        output.print_ids(getattr(row, key) for row in rows)
    else:
        table(columns, rows, empty=empty)
        return rows
    return []


def table(columns: Sequence[Column], rows: Iterable[object], *, empty: str) -> None:
    """Print a plain table, or the sentence `empty` on stderr if there is no row."""
    from rich.text import Text

    rows = list(rows)
    if not rows:
        return output.echo(empty)
    columns = [column for column in columns if not column.is_optional or any(column.of(row) for row in rows)]
    cells = [[" ".join(output.clean(output.cell(column.of(row))).split()) for column in columns] for row in rows]
    out = output.console()
    widths = _widths(columns, cells, out.width)
    out.print(Text(_line([column.title for column in columns], widths), style="bold"), soft_wrap=True)
    for row in cells:
        out.print(Text(_line(row, widths)), soft_wrap=True)
    return None


def _widths(columns: Sequence[Column], cells: Sequence[Sequence[str]], max_width: int) -> dict[int, int]:
    """Return the width of each column that is shown, by index."""
    from rich.cells import cell_len

    widths = {
        index: max(cell_len(text) for text in (column.title, *(row[index] for row in cells)))
        for index, column in enumerate(columns)
    }
    least = {index: min(width, columns[index].min_width or width) for index, width in widths.items()}
    optional = sorted((i for i in widths if i and columns[i].priority), key=lambda i: columns[i].priority, reverse=True)
    while optional and _total(least) > max_width:
        dropped = optional.pop(0)
        del widths[dropped], least[dropped]
    for index in sorted(widths, key=lambda i: widths[i] - least[i], reverse=True):
        excess = _total(widths) - max_width
        if index and excess > 0:
            widths[index] = max(least[index], widths[index] - excess)
    return widths


def _total(widths: dict[int, int]) -> int:
    return sum(widths.values()) + len(_GAP) * (len(widths) - 1)


def _line(row: Sequence[str], widths: dict[int, int]) -> str:
    return _GAP.join(_fitted(row[index], width) for index, width in widths.items()).rstrip()


def _fitted(text: str, width: int) -> str:
    from rich.cells import cell_len, set_cell_size

    return set_cell_size(text, width) if cell_len(text) <= width else set_cell_size(text, width - 1) + "…"
