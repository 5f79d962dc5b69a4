"""Owns what a person sees of the demo: lines that stay, and in a terminal a footer that lives: the step that is under
way, its bar, and the traffic.

Where there is no terminal, each event is a plain line, without colours and control characters; the footer becomes a line
now and then. Times are seconds since the stage was opened, shown as T+.
"""

import io
import os
import re
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from types import TracebackType
from typing import Self, TextIO

from rich.console import Console, Group, RenderableType
from rich.emoji import Emoji
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.rule import Rule
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

LEAST_WIDTH = 80
KID_SHOWN = 8  # characters of a kid in tables and sentences; in full once

_MOST_WIDTH = 120  # longer lines are hard to read
_PLAIN_EVERY = 10.0  # seconds between two lines about the traffic, where there is no terminal
_PLAIN_SHARE = 0.3  # of a bar, between two lines about it
_BAR_WIDTH = 28
_STAMP_WIDTH = 9
_INSTANT = re.compile(r"(\d{4}-\d\d-\d\d)[ T](\d\d:\d\d:\d\d) UTC")


@dataclass(frozen=True, slots=True)
class Counters:
    """The traffic so far, and whose tokens it used in the last whole second."""

    sent: int = 0
    accepted: int = 0
    rejected: int = 0
    errors: int = 0
    by_kid: Mapping[str, int] | None = None

    @property
    def words(self) -> str:
        trouble = f" · {self.errors:,} errors" if self.errors else ""
        return f"{self.sent:,} sent · {self.accepted:,} accepted · {self.rejected:,} rejected{trouble}"


class Stage:
    """`with Stage() as stage: stage.event(…)`."""

    def __init__(self, file: TextIO | None = None, terminal: bool | None = None) -> None:
        out = sys.stdout if file is None else file
        self._terminal = _is_terminal(out) if terminal is None else terminal
        self._console = console_for(out, self._terminal)
        self._begun, self._begun_at = time.monotonic(), time.time()
        self._names: dict[str, str] = {}
        self._counters, self._told_of_traffic = Counters(), 0.0
        self._doing, self._spinner = "", Spinner("dots", style="cyan")
        self._share: float | None = None
        self._told_of_share, self._after_gap = 0.0, False
        self._live = Live(get_renderable=self._footer, console=self._console, refresh_per_second=8, transient=True)

    def __enter__(self) -> Self:
        if self._terminal:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.drop()

    def drop(self) -> None:
        """Takes the footer away."""
        self._live.stop()

    @property
    def now(self) -> float:
        """Seconds since the beginning."""
        return time.monotonic() - self._begun

    def since(self, instant: float) -> float:
        """Seconds from the beginning to this instant (of `time.time()`)."""
        return instant - self._begun_at

    def hour(self, instant: float) -> str:
        """An instant as sentences show it."""
        return f"T+{int(instant) - self._begun_at:.0f} s"  # whole seconds, as the product's own sentences have them

    def call(self, name: str, short: str) -> None:
        """From now on, sentences say `short` instead of this kid or address."""
        self._names[name] = short

    def short(self, sentence: str) -> str:
        """The sentence with short names, and with instants as seconds of this demo."""
        for name, short in self._names.items():
            sentence = sentence.replace(name, short)
        return _INSTANT.sub(lambda found: self.hour(datetime.fromisoformat(f"{found[1]}T{found[2]}+00:00").timestamp()), sentence)

    # ------------------------------------------------------------------------------------------------ what stays

    def chapter(self, title: str, text: str) -> None:
        """A heading, and what is about to happen."""
        self._gap()
        if self._terminal:
            self._print(Rule(Text(title, style="bold"), style="cyan", align="left"))
        else:
            self._print(Text(f"== {title} =="))
        self._print(Text(self.short(text)))
        self._gap()

    def event(self, sentence: str, mark: str = "", style: str = "", at: float | None = None) -> None:
        """Something that happened, with its time: now, or at this instant (of `time.time()`)."""
        stamp = f"T+{self.now if at is None else self.since(at):.1f} s"
        self._row(Text(stamp, style="dim"), Text(mark, style=style or "green"), Text(self.short(sentence), style=style))

    def why(self, sentence: str) -> None:
        """The reason, below the event that it belongs to."""
        self._row(Text(), Text(), Text(sentence if self._terminal else f"  {sentence}", style="dim"))

    def message(self, channel: str, text: str, *, reply: bool, at: float) -> None:
        """A message as people saw it."""
        said = Emoji.replace(text) if self._terminal else text
        self.event(f"{channel}  {said}" if not reply else f"  ↳ {said}", at=at)

    def show(self, table: RenderableType) -> None:
        """A table or text of several lines."""
        self._print(table)
        self._gap()

    def verdict(self, good: bool, sentence: str) -> None:
        """The last word."""
        self.drop()
        self._gap()
        self._print(Text(sentence, style="bold green" if good else "bold red"))

    # ------------------------------------------------------------------------------------------------ what lives

    def busy(self, doing: str, share: float | None = None, at: float | None = None) -> None:
        """What is under way, and how far; outside a terminal, said once."""
        said = self.short(doing)
        if not self._terminal and said and self._is_news(said, share or 0.0):
            self._told_of_share = share or 0.0
            self.event(said, "...", at=at)
        self._doing, self._share = said, share

    def count(self, counters: Counters) -> None:
        """The traffic's counters, shown all the time; outside a terminal every ten seconds."""
        self._counters = counters
        if not self._terminal and counters.sent and self.now - self._told_of_traffic > _PLAIN_EVERY:
            self._told_of_traffic = self.now
            self.event(f"traffic: {counters.words}")

    def _is_news(self, said: str, share: float) -> bool:
        if said.partition(":")[0] != self._doing.partition(":")[0]:
            return True
        return said != self._doing and share - self._told_of_share > _PLAIN_SHARE

    def _footer(self) -> RenderableType:
        grid = Table.grid(padding=(0, 1), expand=True)
        grid.add_column(width=_STAMP_WIDTH, justify="right", no_wrap=True)
        grid.add_column(width=1)
        grid.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
        if self._doing:
            share = self._share
            bar = [] if share is None else [ProgressBar(total=1.0, completed=share, width=_BAR_WIDTH, complete_style="cyan", finished_style="green")]
            grid.add_row(Text(f"T+{self.now:.1f} s", style="cyan"), self._spinner, Text(self._doing), *bar)
        return Group(Text(), Rule(style="dim"), grid, self._traffic())

    def _traffic(self) -> RenderableType:
        counters = self._counters
        if not counters.sent:
            return Text()
        rejected = Text(f"{counters.rejected:,} rejected", style="bold green" if not counters.rejected else "bold red")
        line = Text(" live traffic: ", style="cyan").append(f"{counters.sent:,} sent · {counters.accepted:,} accepted · ", style="default").append(rejected)
        if counters.errors:
            line.append(f" · {counters.errors:,} errors", style="bold red")
        signed = " · ".join(f"{self.short(kid)} {many}/s" for kid, many in (counters.by_kid or {}).items())
        return Group(line, Text(f"   signed by:  {signed}", style="dim"))

    def _row(self, stamp: Text, mark: Text, text: Text) -> None:
        if not self._terminal:
            self._print(Text(f"{stamp.plain:>{_STAMP_WIDTH}}  {f'{mark} ' if mark else ''}{text}"))
            return
        grid = Table.grid(padding=(0, 1))
        grid.add_column(width=_STAMP_WIDTH, justify="right", no_wrap=True)
        grid.add_column(width=1, no_wrap=True)
        grid.add_column()
        grid.add_row(stamp, mark, text)
        self._print(grid)

    def _gap(self) -> None:
        if not self._after_gap:
            self._console.print()
        self._after_gap = True

    def _print(self, what: RenderableType) -> None:
        self._after_gap = False
        if self._terminal:
            self._console.print(what)
        elif isinstance(what, Text):
            self._console.print(what, soft_wrap=True)
        else:
            with self._console.capture() as drawn:
                self._console.print(what)
            self._console.out("\n".join(line.rstrip() for line in drawn.get().splitlines()))


def console_for(out: TextIO, terminal: bool) -> Console:
    """Plain where there is no terminal, whatever FORCE_COLOR says; a character that cannot be shown becomes another one."""
    if isinstance(out, io.TextIOWrapper):
        out.reconfigure(errors="replace")
    width = max(LEAST_WIDTH, min(_MOST_WIDTH, shutil.get_terminal_size((_MOST_WIDTH, 40)).columns))
    return Console(file=out, force_terminal=terminal, no_color=None if terminal else True, width=width, highlight=False, markup=False, emoji=False)


def _is_terminal(out: TextIO) -> bool:
    return out.isatty() and os.environ.get("TERM", "dumb") not in ("dumb", "unknown")
