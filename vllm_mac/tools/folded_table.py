"""Tables that fit a terminal of 80 columns or more."""

from collections.abc import Callable

from rich import box
from rich.markup import escape
from rich.table import Table

Column = tuple[str, Callable[[dict], str]]


def cell(read: Callable[[dict], str], row: dict) -> str:
    """A row's cell: `read(row)`, or a dash where the row lacks the value."""
    try:
        return read(row)
    except (KeyError, TypeError):
        return "-"


def folded(title: str, columns: list[Column], rows: list[dict], place: Callable[[dict], str] | None = None) -> Table:
    """A table whose cells break between words where the terminal is narrow. Cells of the first column never break.

    place: a property that neighbouring rows share; the table shows it once, in a line above them.
    """
    cells = [[cell(read, row) for _, read in columns] for row in rows]
    indent = "" if place is None else "  "
    table = Table(title=escape(title), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for i, (name, _) in enumerate(columns):
        words = [word for text in (name, *(line[i] for line in cells)) for word in text.split()]
        width = max(map(len, words if i else [indent + line[0] for line in cells]))
        table.add_column("\n".join(name.split()), justify="right" if i else "left", min_width=width, no_wrap=not i)
    last = None
    for row, line in zip(rows, cells, strict=True):
        if place is not None and (now := place(row)) != last:
            table.add_section()
            table.add_row(escape(now))
            last = now
        table.add_row(*map(escape, [indent + line[0], *line[1:]]))
    return table
