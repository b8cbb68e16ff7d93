"""Tables of text with aligned columns."""

import io
from collections.abc import Sequence


def aligned(rows: Sequence[Sequence[str]], align: str = ">") -> list[str]:
    """Return the lines of a table whose columns are as wide as their widest cell, with two spaces between them.

    A cell stands as it is, however long: it is neither wrapped nor shortened, and brackets are no markup. Its width is
    the one on a terminal, where some characters take two columns. Lines have no spaces at their end.

    Args:
        rows: Rows of cells, the header included, all of the same length.
        align: `<` for a column aligned on the left, `>` on the right; the last sign holds for the remaining columns.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0), pad_edge=False)
    cells = [[cell.expandtabs() for cell in row] for row in rows]
    room = 1
    for number, column in enumerate(zip(*cells, strict=True)):
        left = align[min(number, len(align) - 1)] == "<"
        table.add_column(justify="left" if left else "right", no_wrap=True)
        room += 2 * max(map(len, column)) + 2  # no character takes more than two columns
    if not table.columns:
        return []
    for row in cells:
        table.add_row(*map(Text, row))
    written = io.StringIO()
    Console(file=written, width=room, color_system=None, force_jupyter=False).print(table)
    return [line.rstrip(" ") for line in written.getvalue().removesuffix("\n").split("\n")]
