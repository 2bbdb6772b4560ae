"""Show the result of an audit: `Audit`, which prints as a table, with rich if it is installed."""

from __future__ import annotations

import re
import shutil
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from importlib.util import find_spec
from typing import Any

from ..comm.ranks import Ranks
from ..errors import LayoutError, printable
from .facts import Facts
from .instances import Instance
from .problem import Findings, Problem
from .words import describe_bytes, describe_layout, describe_ranks, describe_source

__all__ = ["Audit", "Row", "make_report"]

_FIRST_NUMBER = re.compile(r"\d+")

_MAX_ROWS = 40
"""Number of rows above which repeated layers are printed as one row."""

_COLUMNS = ("parameter", "shape", "layout", "pieces x replicas", "ranks", "local", "share of norm")
_RIGHT = {"pieces x replicas", "local", "share of norm"}


@dataclass(frozen=True, slots=True)
class Row:
    """One parameter.

    Args:
        name: name of the parameter.
        shape: shape of the whole parameter.
        layout: layout in words.
        source: origin of the layout, for example "placements" or "assumed".
        num_pieces: number of different pieces.
        num_replicas: number of ranks with the same piece, the smallest and the largest.
        ranks: global ranks that hold a part of it.
        local_bytes: bytes on the rank that holds most.
        share: fraction of the norm's elements, each weighted by how often it counts. 0 for a frozen parameter.
        trainable: whether it requires a gradient.
        problems: kinds of the problems that concern it.
    """

    name: str
    shape: tuple[int, ...]
    layout: str
    source: str
    num_pieces: int
    num_replicas: tuple[int, int]
    ranks: Ranks
    local_bytes: int
    share: float
    trainable: bool
    problems: tuple[str, ...] = ()

    def cells(self) -> tuple[str, ...]:
        """Return the row as printed."""
        low, high = self.num_replicas
        replicas = str(low) if low == high else f"{low}-{high}"
        return (
            self.name,
            " x ".join(map(str, self.shape)) or "scalar",
            self.layout if self.trainable else f"frozen; {self.layout}",
            f"{self.num_pieces} x {replicas}",
            describe_ranks(self.ranks),
            describe_bytes(self.local_bytes),
            f"{self.share:.1%}" if self.trainable else "-",
        )


@dataclass(frozen=True)
class Audit:
    """Result of `distclip.audit`, the same on every rank. It prints as a table.

    Args:
        rows: parameters of all ranks.
        problems: mistakes, each with the line that fixes it.
        notes: facts that numbers cannot prove, and facts that are not mistakes.
        ranks: global ranks that were compared.
        counted: number of elements that the norm counts, and number of elements of the model.
        probe: sum of the probe gradient as the norm counts it, and the sum if every element counts once.
    """

    rows: tuple[Row, ...]
    problems: tuple[Problem, ...]
    notes: tuple[str, ...]
    ranks: Ranks
    counted: tuple[float, int]
    probe: tuple[float, int]

    @property
    def ok(self) -> bool:
        """True if no problem was found."""
        return not self.problems

    def raise_if_wrong(self) -> Audit:
        """Raise a `LayoutError` with all problems if there are any. Otherwise return the audit.

        >>> Audit((), (), (), (0,), (0, 0), (0, 0)).raise_if_wrong().ok
        True
        """
        if self.problems:
            raise LayoutError("\n".join(map(str, self.problems)))
        return self

    def as_dict(self) -> dict[str, Any]:
        """Return everything as numbers, strings, lists and dicts, for a log or a test."""

        def plain(value: Any) -> Any:
            if isinstance(value, dict):
                return {key: plain(item) for key, item in value.items()}
            return [plain(item) for item in value] if isinstance(value, tuple) else value

        return {
            "ok": self.ok,
            "ranks": list(self.ranks),
            "counted_elements": self.counted[0],
            "elements": self.counted[1],
            "parameters": [plain(asdict(row)) for row in self.rows],
            "problems": [plain(asdict(problem)) for problem in self.problems],
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        width = shutil.get_terminal_size((100, 24)).columns
        return self.to_text(width)

    def to_text(self, width: int = 100, *, plain: bool | None = None) -> str:
        """Return the table, the problems and the notes as text.

        Args:
            width: number of columns.
            plain: True for a table without rich. None uses rich if it is installed.
        """
        rows = _fold_layers(self.rows) if len(self.rows) > _MAX_ROWS else self.rows
        cells = [row.cells() for row in rows]
        use_rich = find_spec("rich") is not None if plain is None else not plain
        table = _rich_table(cells, width) if use_rich else _plain_table(cells)
        return "\n".join([table.strip("\n"), "", *self._verdict(width)])

    def __rich__(self) -> str:
        return str(self)

    def _verdict(self, width: int) -> list[str]:
        """Return the lines under the table."""
        (found, whole), (summed, expected) = self.counted, self.probe
        where = f"{len(self.ranks)} rank{'' if len(self.ranks) == 1 else 's'}"
        agrees = found == whole and summed == expected
        if agrees and any(problem.concerns_layout for problem in self.problems):
            lines = [
                f"As it is described, each of the {whole:,} elements on {where} counts once. The description is wrong:"
            ]
        elif agrees:
            lines = [
                f"The norm counts each of the {whole:,} elements on {where} once: a probe gradient of integers sums to "
                f"{expected:,} exactly."
            ]
        else:
            lines = [
                f"The model has {whole:,} elements on {where}, and the norm counts {found:,.15g}. A probe gradient "
                f"sums to {summed:,.15g} in place of {expected:,}."
            ]
        for number, problem in enumerate(self.problems, 1):
            lines += ["", f"PROBLEM {number}: {problem.kind}", f"  {problem.message}"]
            lines += [f"  {problem.fix}"] if problem.fix else []
        lines += [""] * bool(self.notes) + [f"note: {note}" for note in self.notes]
        lines += ["", "No problem found." if self.ok else f"{len(self.problems)} problem(s) found."]
        return [wrapped for line in lines for wrapped in _wrap(line, width)]


def make_report(instances: Sequence[Instance], by_rank: Mapping[int, Facts], findings: Findings) -> Audit:
    """Make the report of all parameters.

    Args:
        instances: parameters, as the engine counts them.
        by_rank: facts of every rank.
        findings: problems and notes.
    """
    trainable = [instance for instance in instances if instance.trainable]
    # Ranks that compute separate norms, such as replicas without a process group, each count every element.
    merged = _merge_components(instances)
    total = sum(instance.num_elements for instance in trainable_of(merged) if any(m.weight for m in instance.members))
    counted = sum((_counted(instance) for instance in merged if instance.trainable), Fraction())
    probe = sum((one.counted_codes / one.num_components for one in trainable_of(merged)), Fraction())
    expected = sum(one.expected_codes for one in trainable_of(merged) if any(m.weight for m in one.members))
    kinds: dict[str, list[str]] = {}
    for problem in findings.problems:
        for name in problem.parameters:
            kinds.setdefault(name, []).append(problem.kind)
    rows = []
    for instance in merged:
        facts = by_rank[instance.members[0].rank]
        numbers = [len(members) for members in instance.pieces.values()]
        share = float(_counted(instance) / total) if total and instance.trainable else 0.0
        rows.append(
            Row(
                instance.name,
                instance.shape,
                describe_layout(instance, facts),
                describe_source(instance, facts),
                len(instance.pieces),
                (min(numbers), max(numbers)),
                instance.ranks,
                max(member.holding.num_bytes for member in instance.members),
                share,
                instance.trainable,
                tuple(dict.fromkeys(kinds.get(instance.name, ()))),
            )
        )
    if not trainable:
        findings.note("No parameter requires a gradient, so that nothing counts in the norm.")
    return Audit(
        tuple(rows),
        tuple(findings.problems),
        tuple(findings.notes),
        tuple(by_rank),
        (float(counted), total),
        (float(probe), int(expected)),
    )


def trainable_of(instances: Iterable[Instance]) -> list[Instance]:
    """Return the parameters that require a gradient."""
    return [instance for instance in instances if instance.trainable]


def _counted(instance: Instance) -> Fraction:
    return instance.counted_elements / instance.num_components


def _merge_components(instances: Sequence[Instance]) -> list[Instance]:
    """Join the replicas of a parameter whose ranks compute separate norms."""
    merged: dict[Any, Instance] = {}
    for i, instance in enumerate(instances):
        first = instance.members[0]
        key: Any = (instance.name, frozenset((piece, m[0].value) for piece, m in instance.pieces.items()))
        other = merged.get(key)
        if other is not None and first.component not in {member.component for member in other.members}:
            merged[key] = Instance(sorted([*other.members, *instance.members], key=lambda member: member.rank))
        else:
            merged[key if other is None else (*key, i)] = instance
    return list(merged.values())


def _fold_layers(rows: Sequence[Row]) -> list[Row]:
    """Join rows of repeated layers, whose names differ only in their first number."""
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        pattern = _FIRST_NUMBER.sub("#", row.name, count=1)
        key = (pattern, row.shape, row.layout, row.num_pieces, row.ranks, row.trainable, row.problems)
        groups.setdefault(key, []).append(row)
    folded = []
    for group in groups.values():
        numbers = [int(found[0]) for row in group if (found := _FIRST_NUMBER.search(row.name))]
        first = group[0]
        if len(set(numbers)) > 1:
            first = replace(
                first,
                name=_FIRST_NUMBER.sub(f"{{{describe_ranks(numbers)}}}", first.name, count=1),
                layout=f"each {first.layout}",
                local_bytes=sum(row.local_bytes for row in group),
                share=sum(row.share for row in group),
            )
        folded.append(first)
    return folded


def _rich_table(cells: Sequence[Sequence[str]], width: int) -> str:
    # Imported here, because rich is optional.
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 2, 0, 0), expand=False)
    for column in _COLUMNS:
        table.add_column(
            column.replace(" x ", " x\n").replace(" of ", " of\n"),
            justify="right" if column in _RIGHT else "left",
            overflow="fold",
        )
    for row in cells:
        table.add_row(*(Text(printable(text)) for text in row))
    console = Console(width=width, no_color=True, force_terminal=False, highlight=False)
    with console.capture() as captured:
        console.print(table)
    return "\n".join(line.rstrip() for line in captured.get().strip("\n").splitlines())


def _plain_table(cells: Sequence[Sequence[str]]) -> str:
    rows = [_COLUMNS, *cells]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_COLUMNS))]
    lines = [
        "  ".join(
            cell.rjust(width) if column in _RIGHT else cell.ljust(width)
            for cell, width, column in zip(row, widths, _COLUMNS, strict=True)
        ).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _wrap(line: str, width: int) -> list[str]:
    """Wrap a line of prose, and keep its indent."""
    indent = " " * (len(line) - len(line.lstrip()))
    options: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False}
    return textwrap.wrap(line, max(width, 40), subsequent_indent=indent or "  ", **options) or [""]
