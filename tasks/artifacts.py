"""What a person sees on a run's page: the plan and the evidence as texts, a wait as a bar. Outside a flow run: a bar in the terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import prefect.artifacts
from prefect.context import FlowRunContext
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from keyrotation.domain.decision import Facts, Rotation
from keyrotation.domain.policy import show
from keyrotation.steps.plan import summary

SECONDS_BETWEEN_UPDATES = 2.0
create_markdown: Any = prefect.artifacts.create_markdown_artifact  # typed for async callers only
create_progress: Any = prefect.artifacts.create_progress_artifact
update_progress: Any = prefect.artifacts.update_progress_artifact


def listing(key: str, rows: Sequence[tuple[str, str]], description: str) -> None:
    """What, and below it its value in full: the page cuts the cells of a table."""
    if FlowRunContext.get() is not None:
        text = "\n\n".join(f"**{name}**\n\n{value}" for name, value in rows)
        _best_effort(create_markdown, markdown=text, key=key, description=description)


def evidence(key: str, rotation: Rotation, facts: Facts) -> None:
    """What came of a rotation, and every key as it is now."""
    if FlowRunContext.get() is None:
        return
    keys = "\n".join(
        f"| `{kid}` | {status} | {since} | {note} |" for kid, status, since, note in summary(facts) if status != "disabled" or kid == rotation.old_kid
    )
    took = show((rotation.ended_at or facts.now) - rotation.opened_at)
    text = (
        f"## {rotation.kind} {rotation.id}: {rotation.outcome}\n\n{rotation.message}\n\n- asked for by {rotation.actor}: {rotation.reason}\n- took {took}\n\n"
        f"| key | state | since | note |\n|---|---|---|---|\n{keys}\n"
    )
    _best_effort(create_markdown, markdown=text, key=key, description="What happened, and every key as it is now")


class Bar:
    """A wait's progress: an artifact within a flow run, a bar in a terminal. Updated every two seconds at the most."""

    def __init__(self, key: str, description: str) -> None:
        self._key, self._description = key, description
        self._artifact: Any = None
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._updated = 0.0

    def __enter__(self) -> Bar:
        if FlowRunContext.get() is None and sys.stderr.isatty():
            self._bar = Progress(TextColumn("{task.description}"), BarColumn())
            self._bar.start()
            self._task = self._bar.add_task(self._description, total=1.0)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()
        if kind is None and self._artifact is not None:
            self._show(100.0, self._description)

    def __call__(self, share: float, text: str) -> None:
        """How far it has come: a share between 0 and 1, and words."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=share, description=text)
        if FlowRunContext.get() is None or time.monotonic() - self._updated < SECONDS_BETWEEN_UPDATES:
            return
        self._updated = time.monotonic()
        self._show(min(100.0, share * 100), text)

    def _show(self, percent: float, text: str) -> None:
        if self._artifact is None:
            self._artifact = _best_effort(create_progress, progress=percent, key=self._key, description=text)
        else:
            _best_effort(update_progress, artifact_id=self._artifact, progress=percent, description=text)


def _best_effort(call: Any, **arguments: Any) -> Any:
    """Showing never decides: without Prefect's API the keys end in the same state (I14)."""
    try:
        return call(**arguments)
    except Exception:  # noqa: BLE001  whatever the API client raises
        return None
