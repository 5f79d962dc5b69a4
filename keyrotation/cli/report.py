"""What a command has to show: as tables for a person, as JSON for a program, from the same values."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

from keyrotation.domain.policy import show, show_instant

if TYPE_CHECKING:
    from rich.console import Console

WIDTH = 100  # where no terminal says otherwise
NARROWEST = 80  # a narrower one breaks the lines itself
KID = 43  # characters of an RFC 7638 thumbprint: the last column holds one whole
GAP = 2
STYLES = {"ok": "green", "not ok": "bold red", "done": "green", "warning": "bold yellow"}


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of two or three columns; the last one is prose and may take several lines."""

    rows: Sequence[tuple[str, ...]]
    title: str = ""


@dataclass(frozen=True, slots=True)
class Report:
    """The result of a command: whether all is well, the data, and the same for people."""

    data: Mapping[str, Any]
    parts: Sequence[Table | str] = field(default=())
    well: bool = True

    def show(self, form: str) -> None:
        """Writes it to stdout."""
        if form == "json":
            sys.stdout.write(json.dumps(self.data, indent=2, default=_plain) + "\n")
            return
        console = _console()
        if console.is_terminal:
            self._print_to(console)
            return
        with console.capture() as captured:  # a file wants no spaces at the ends of lines
            self._print_to(console)
        sys.stdout.writelines(f"{line.rstrip()}\n" for line in captured.get().splitlines())

    def _print_to(self, console: Console) -> None:
        for number, part in enumerate(self.parts):
            if number and isinstance(part, Table) and part.title:
                console.print()
            if isinstance(part, Table):
                _show_table(console, part)
            else:
                console.print(printable(part), soft_wrap=not console.is_terminal)


def _plain(value: object) -> object:
    """Instants in ISO 8601, durations in seconds."""
    match value:
        case datetime():
            return value.isoformat()
        case timedelta():
            return value.total_seconds()
        case _:
            raise TypeError(f"{value.__class__.__name__} has no form in JSON")


def _console() -> Console:
    from rich.console import Console  # noqa: PLC0415  only where a person reads

    # Not what FORCE_COLOR or a CI says: a file and a pipe get plain text.
    console = Console(highlight=False, markup=False, emoji=False, force_terminal=sys.stdout.isatty())
    console.width = max(NARROWEST, console.width if console.is_terminal else WIDTH)
    return console


def _show_table(console: Console, table: Table) -> None:
    from rich.table import Table as Grid  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    rows = [tuple(printable(cell) for cell in row) for row in table.rows]
    if table.title:
        console.print(Text(printable(table.title), style="bold"))
    grid = Grid.grid(padding=(0, GAP, 0, 0))
    widths = [max((len(row[column]) for row in rows), default=0) for column in range(len(rows[0]) - 1)] if rows else []
    for width in widths[:-1]:
        grid.add_column(width=width, no_wrap=True)
    room = console.width - sum(widths[:-1]) - GAP * len(widths)
    if widths:
        grid.add_column(width=min(widths[-1], room - KID), overflow="fold")
        grid.add_column(width=max(KID, room - widths[-1]), overflow="fold")
    for row in rows:
        grid.add_row(*(Text(cell, style=STYLES.get(cell, "")) for cell in row))
    console.print(grid)


def printable(text: str) -> str:
    """Without control characters: what somebody typed as a reason must not steer a terminal."""
    return "".join(character if character.isprintable() else "\ufffd" for character in text)


@contextmanager
def busy() -> Iterator[Callable[[str], None]]:
    """Tells a waiting person, in a terminal only, what is being looked at."""
    if not sys.stderr.isatty():
        yield lambda text: None
        return
    from rich.console import Console  # noqa: PLC0415

    with Console(stderr=True, highlight=False, markup=False).status("looking …") as status:
        yield lambda text: status.update(f"looking at {text} …")


def instant(value: datetime | None, otherwise: str = "") -> str:
    """An instant for people."""
    return show_instant(value) if value is not None else otherwise


def since(value: datetime | None, now: datetime) -> str:
    """`2026-01-05 03:00:00 UTC, 2d 3h ago`; `…, in 5m` for what is to come."""
    if value is None:
        return ""
    return f"{show_instant(value)}, {f'{show(now - value)} ago' if value <= now else f'in {show(value - now)}'}"
