"""The command that verifies the ledger: its hash chain from the first entry to the last, the head beside it, and the head kept outside the database."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, field

from keyrotation.cli.looking import for_reading
from keyrotation.cli.report import Report, Table
from keyrotation.domain.errors import WorldError
from keyrotation.domain.ledger import GENESIS, Entry, broken_links
from keyrotation.ports import Environment

BROKEN = "from the first problem on the ledger proves nothing: compare it with a backup, and with what was kept of its head elsewhere"
Mark = tuple[int, str]  # an entry's number and hash


@dataclass
class Walk:
    """Passes the entries on, one at a time, and keeps what is asked about all of them. `marks` are the entries whose hash is wanted afterwards."""

    marks: frozenset[int]
    count: int = 0
    first: Entry | None = None
    last: Entry | None = None
    hashes: dict[int, str] = field(default_factory=lambda: {0: GENESIS})

    def along(self, entries: Iterator[Entry]) -> Iterator[Entry]:
        """The same entries."""
        for entry in entries:
            self.count, self.first, self.last = self.count + 1, self.first or entry, entry
            if entry.seq in self.marks:
                self.hashes[entry.seq] = entry.hash
            yield entry

    @property
    def end(self) -> Mark:
        """Where the chain ended."""
        return (self.last.seq, self.last.hash) if self.last else (0, GENESIS)

    def problems_with(self, what: str, mark: Mark) -> list[str]:
        """The chain must hold what the mark says of it."""
        if mark[0] > self.end[0]:
            return [f"entries {self.end[0] + 1} to {mark[0]} are missing at the end: {what} names entry {mark[0]}"]
        if self.hashes.get(mark[0]) != mark[1]:
            return [f"entry {mark[0]} does not match {what}: one of the two was exchanged"]
        return []

    def problems_past(self, head: Mark) -> list[str]:
        """Read after the entries, the head must have come as far as they have."""
        if self.end[0] > head[0] or (self.end[0] == head[0] and self.end != head):
            return [f"the head names entry {head[0]}, the ledger ends with {self.end[0]}: the head was set back, or entries were added past it"]
        return []


def audit(arguments: argparse.Namespace) -> Report:
    """The hash chain from the first entry to the last, against the heads."""
    env = for_reading(arguments.environment)
    head = env.records.head()  # before the entries, and once more after them: somebody may write meanwhile
    published, problems = _published(env)
    walk = Walk(frozenset(mark[0] for mark in (head, published) if mark))
    problems += broken_links(walk.along(env.records.entries()))
    problems += walk.problems_with("the head", head) or walk.problems_past(env.records.head())
    problems += walk.problems_with("the head kept outside the database", published) if published else []
    return _report(env, walk, head, published, problems)


def _published(env: Environment) -> tuple[Mark | None, list[str]]:
    """The head that was kept outside the database, where there is one, and what is wrong with it."""
    try:
        return (env.head.read() if env.head else None), []
    except WorldError as error:
        return None, [str(error)]


def _report(env: Environment, walk: Walk, head: Mark, published: Mark | None, problems: list[str]) -> Report:
    first, last = walk.first.at if walk.first else None, walk.last.at if walk.last else None
    marks = {name: {"seq": mark[0], "hash": mark[1]} if mark else None for name, mark in (("head", head), ("published_head", published))}
    data = {"environment": env.name, "whole": not problems, "entries": walk.count, "first_at": first, "last_at": last, **marks, "problems": problems}
    outside = f"{published[0]}  {published[1]}" if published else "none is kept outside the database: whoever rewrites the whole ledger is not seen"
    rows = [("entries", str(walk.count)), ("first", first or "none"), ("last", last or "none"), ("head", f"{head[0]}  {head[1]}"), ("outside", outside)]
    rows += [("warning", problem) for problem in problems]
    rows.append(("not ok", BROKEN) if problems else ("ok", "every entry follows the one before it, and none was edited"))
    return Report(data, [Table(rows, f"Ledger of {env.name}")], well=not problems)
