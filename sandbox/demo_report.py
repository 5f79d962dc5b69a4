"""Owns the report of the demo: the figures, the verdict over them, and how both are shown.

The verdict is good only if nobody was hurt (no valid token rejected, no connection lost), enough was tried to say so, every
flow run ended COMPLETED, the keys are where they belong, the ledger is whole, and nothing is left behind.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table
from rich.text import Text

from sandbox.demo_eyes import Audit, Entry, Key, Run
from sandbox.demo_stage import KID_SHOWN, Stage

ENOUGH = 2_000  # tokens verified; fewer prove little, and mean that the machine was too busy for the traffic

_BAR_WIDTH = 22
_WORTH_SHOWING = 0.05  # seconds
_STYLES = {"current": "bold green", "next": "yellow", "previous": "cyan", "disabled": "dim"}


@dataclass(frozen=True, slots=True)
class Share:
    """A piece of the demo's time; `inner` ones are part of the last one that is not."""

    what: str
    seconds: float
    inner: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What the demo measured, once its world is gone."""

    traffic: Mapping[str, Any]  # the report of sandbox.traffic
    runs: Mapping[str, Run]  # by what each was for
    before: tuple[Key, ...]
    after: tuple[Key, ...]
    jwks: frozenset[str]
    signer: str
    entries: int  # of the ledger, made during the demo
    audit: Audit
    shares: Sequence[Share] = ()
    left: Sequence[str] = ()  # processes that still run, a folder that is still there

    @property
    def verified(self) -> int:
        return int(self.traffic["totals"]["accepted"])

    @property
    def rejected(self) -> int:
        return sum(int(counts["rejected"]) for counts in self.traffic["kids"].values())


# ------------------------------------------------------------------------------------------------ the verdict


def problems(figures: Figures) -> list[str]:
    """What is not good, a sentence each; empty if the report is good."""
    return [*_of_traffic(figures), *_of_runs(figures), *_of_keys(figures), *_of_records(figures)]


def _of_traffic(figures: Figures) -> Iterable[str]:
    totals = figures.traffic["totals"]
    if figures.rejected:
        yield f"{figures.rejected:,} valid tokens were rejected"
    if figures.verified < ENOUGH:
        yield f"only {figures.verified:,} tokens were verified, fewer than {ENOUGH:,}"
    if totals["errors"]:
        yield f"{totals['errors']:,} requests had no answer"
    if totals["other"]:
        yield f"{totals['other']:,} requests were answered by something else than yes or no"
    if totals["token_errors"]:
        yield f"{totals['token_errors']:,} token requests failed"
    if not figures.traffic["finished"]:
        yield "the traffic died before its end: its figures are not whole"
    unused = [key.kid[:KID_SHOWN] for key in (*figures.before, *figures.after) if key.status == "current" and not _accepted(figures, key.kid)]
    if unused:
        yield f"no token of key {', '.join(unused)} was verified"


def _of_runs(figures: Figures) -> Iterable[str]:
    for what, run in figures.runs.items():
        if run.state != "COMPLETED":
            yield f"the {what} ended {run.state}: {run.message or 'without a word'}"


def _of_keys(figures: Figures) -> Iterable[str]:
    published = frozenset(key.kid for key in figures.after if key.enabled)
    current = {key.kid for key in figures.after if key.status == "current"}
    once_current = {key.kid for key in figures.before if key.status == "current"}
    if figures.jwks != published:
        yield f"the JWKS holds {_kids(figures.jwks)}, the database publishes {_kids(published)}"
    if current != {figures.signer}:
        yield f"fresh tokens name key {figures.signer[:KID_SHOWN]}, current is {_kids(current)}"
    if current & once_current:
        yield "the key that signs is the one that signed before"
    if once_current & published:
        yield f"the old key {_kids(once_current & published)} is still published"


def _of_records(figures: Figures) -> Iterable[str]:
    if not figures.audit.whole:
        yield f"the audit of the ledger failed: {figures.audit.problem or 'the chain is not whole'}"
    if figures.left:
        yield f"something is left: {', '.join(figures.left)}"


def _accepted(figures: Figures, kid: str) -> int:
    return int(figures.traffic["kids"].get(kid, {}).get("accepted", 0))


def _kids(kids: Iterable[str]) -> str:
    return ", ".join(sorted(kid[:KID_SHOWN] for kid in kids)) or "none"


# ------------------------------------------------------------------------------------------------ the tables


def keys_table(keys: Iterable[Key], jwks: frozenset[str], signer: str) -> Table:
    """The keys as they are: state, in the JWKS, signs."""
    table = _table("key", "state", "in the JWKS", "signs")
    for key in keys:
        style = _STYLES.get(key.status, "")
        signs = "signs new tokens" if key.kid == signer else "no"
        table.add_row(key.kid[:KID_SHOWN], key.status, "yes" if key.kid in jwks else "no", signs, style=style)
    return _indented(table)


def ledger_table(entries: Iterable[Entry], stage: Stage) -> Table:
    """When, what, which key, who."""
    table = _table("at", "event", "key", "actor")
    for entry in entries:
        table.add_row(f"T+{stage.since(entry.at):.1f} s", entry.event, (entry.kid or "")[:KID_SHOWN], entry.actor.removeprefix("Prefect, "))
    return _indented(table, 2)


def figures_table(figures: Figures) -> Table:
    """The figures, one a line."""
    table = Table.grid(padding=(0, 3))
    for name, value, good in _lines(figures):
        table.add_row(name, Text(value, style="bold green" if good else "" if good is None else "bold red"))
    return _indented(table)


def time_table(shares: Sequence[Share]) -> Table:
    """Where the time went, with bars."""
    table, total = Table.grid(padding=(0, 2)), max((share.seconds for share in shares), default=1.0)
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    for share in shares:
        if share.seconds >= _WORTH_SHOWING:
            bar = Text("━" * round(_BAR_WIDTH * share.seconds / total), style="dim cyan" if share.inner else "cyan")
            table.add_row(Text(f"{'  ' if share.inner else ''}{share.what}", style="dim" if share.inner else ""), f"{share.seconds:.1f} s", bar)
    return _indented(table)


def of_run(what: str, run: Run) -> list[Share]:
    """How long a flow run took: until its process was there, then step by step."""
    if run.due_at is None or run.started_at is None:
        return []
    steps = [Share(step.name, step.seconds, inner=True) for step in run.steps]
    start = Share("the worker starts a process for it", run.started_at - run.due_at, inner=True)
    return [Share(what, run.seconds), start, *steps]


def _lines(figures: Figures) -> Iterable[tuple[str, str, bool | None]]:
    totals = figures.traffic["totals"]
    signed = ", ".join(f"{counts['accepted']:,} of key {kid[:KID_SHOWN]}" for kid, counts in figures.traffic["kids"].items())
    at = ", ".join(f"{counts['accepted']:,} at gateway {number}" for number, counts in enumerate(figures.traffic["gateways"].values(), 1))
    yield "tokens verified", f"{figures.verified:,}", figures.verified >= ENOUGH
    yield "", f"{signed}", None
    yield "", at, None
    yield "valid tokens rejected", f"{figures.rejected:,}", not figures.rejected
    yield "connection errors", f"{totals['errors']:,}", not totals["errors"]
    yield "keys before", _states(figures.before), None
    yield "keys after", _states(figures.after), None
    yield "the JWKS holds", _kids(figures.jwks), figures.jwks == {key.kid for key in figures.after if key.enabled}
    for what, run in figures.runs.items():
        yield what, f"{run.state}, {run.seconds:.1f} s", run.state == "COMPLETED"
    verified = f"{figures.entries} entries of this demo, {figures.audit.entries} in all, chain verified by keyrotation audit"
    audit = verified if figures.audit.whole else figures.audit.problem
    yield "ledger", audit, figures.audit.whole
    yield "left running", ", ".join(figures.left) or "nothing", not figures.left


def _states(keys: Iterable[Key]) -> str:
    return ", ".join(f"{key.kid[:KID_SHOWN]} {key.status}" for key in keys)


def _table(*columns: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for column in columns:
        table.add_column(column, overflow="ellipsis", no_wrap=column != "actor")
    return table


def _indented(table: Table, by: int = 11) -> Table:
    outer = Table.grid(padding=(0, 0, 0, 0))
    outer.add_row(" " * by, table)
    return outer
