"""Format the comparison as Markdown or as a table for the terminal."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from .measurement import Row

HEADER = ["layout", "truth (fp64)", "torch reports", "frameworks report", "distclip reports", "gradients after torch"]
NOTE = (
    "Four gloo ranks, max_norm=1, every norm read with float(). Under FSDP1, torch gets model.parameters() and "
    "distclip gets the wrapped module. Frameworks: FSDP1's own method, otherwise the sum over meshes and stages that "
    "torchtitan makes. The last column divides torch's clipped gradients by the correct ones. Within "
    "1 % counts as right."
)


def cells(row: Row) -> list[tuple[str, bool]]:
    """Return the text of each cell, and whether its number is wrong."""
    results = [(result.text, not result.right) for result in (row.torch, row.framework, row.distclip)]
    return [(row.layout, False), (f"{row.truth:.6g}", False), *results, (row.torch.gradients, False)]


def to_markdown(rows: list[Row]) -> str:
    """Format the table as Markdown. Wrong numbers are bold."""
    lines = [[f"**{text}**" if wrong else text for text, wrong in cells(row)] for row in rows]
    head = [HEADER, ["---", "--:", "--:", "--:", "--:", "---"]]
    return "\n".join([*(f"| {' | '.join(line)} |" for line in head + lines), "", NOTE])


def to_table(rows: list[Row]) -> Table:
    """Format the table for the terminal. Wrong numbers are red."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, caption=NOTE, caption_justify="left")
    for title in HEADER:
        table.add_column(title, justify="left" if title in (HEADER[0], HEADER[-1]) else "right", overflow="fold")
    for row in rows:
        table.add_row(*(Text(text, style="red" if wrong else "") for text, wrong in cells(row)))
    return table
