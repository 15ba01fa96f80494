"""Tables: one line per row at any width. In a narrow terminal, columns shrink first, then the least important drop."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lorry.cli.render import output

_GAP = "  "


@dataclass(frozen=True, kw_only=True, slots=True)
class Column:
    """A column of a table. The first column is never cut or dropped."""

    title: str
    priority: int = 0
    """In a narrow terminal, the column with the highest number is dropped first; 0 is never dropped."""
    min_width: int | None = None
    """In cells. The column may be cut to this width, with an ellipsis. None: never cut."""


def table(columns: Sequence[Column], rows: Iterable[Sequence[object]], *, empty: str) -> None:
    """Print a plain table, or the sentence `empty` on stderr if there is no row."""
    from rich.text import Text

    cells = [[" ".join(output.clean(output.cell(value)).split()) for value in row] for row in rows]
    if not cells:
        return output.echo(empty)
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
