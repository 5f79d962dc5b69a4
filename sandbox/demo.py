"""Owns the demo as a program: its end, however it comes, and its exit status.

    python -m sandbox demo [--home DIR]

It shows a signing key rotation under live traffic to somebody who has never seen one. The story is in `sandbox.demo_story`,
what it looks at in `sandbox.demo_eyes`, how it is shown in `sandbox.demo_stage`, the figures and the verdict over them in
`sandbox.demo_report`. Nothing of the product is called but its deployments, over Prefect's API, and its `keyrotation`
command: the demo watches from outside, as a user would.

Exit status: 0 the report is good; 1 it is not, or a part failed; 130 Ctrl-C (128 + the number of any other signal). However
it ends, nothing keeps running, and the folder is gone unless `--home` named it.
"""

import contextlib
import shutil
import signal
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from sandbox import demo_report
from sandbox.demo_report import Figures
from sandbox.demo_stage import Stage
from sandbox.demo_story import Story
from sandbox.processes import SandboxError

_STORY_WITHIN = 225.0  # the limit is four minutes; the rest is for stopping everything
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM)


class Ended(BaseException):
    """The demo was told to end, or ran out of time. Not an Exception: nothing on the way may take it for a failure of its own."""


class Signals:
    """The signals that end the demo: the first one raises Ended, unless everything is being stopped already; later ones are heard, no more."""

    def __init__(self) -> None:
        self.caught, self.stopping = 0, False
        for number in _SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup
                signal.signal(number, self._catch)
        signal.setitimer(signal.ITIMER_REAL, _STORY_WITHIN)

    def _catch(self, number: int, _frame: object) -> None:
        first, self.caught = not self.caught, self.caught or number
        if first and not self.stopping:
            raise Ended

    def stop(self) -> None:
        """From here on everything is stopped: no signal interrupts that."""
        self.stopping = True
        signal.setitimer(signal.ITIMER_REAL, 0)


def demo(home: Path | None) -> int:
    """Tells the story; returns the exit status."""
    with Stage() as stage:
        signals = Signals()
        try:
            with _folder(home, signals) as folder:
                figures = Story(folder, stage).tell(signals.stop)
            return _conclude(stage, figures if home else replace(figures, left=(*figures.left, *_still_there(folder))), signals)
        except Ended:
            return _interrupted(stage, signals)
        except SandboxError as failed:
            stage.verdict(False, f"The demo failed: {failed}\nTo keep the logs: python -m sandbox demo --home DIR")
            return 1


@contextlib.contextmanager
def _folder(home: Path | None, signals: Signals) -> Iterator[Path]:
    if home is not None:
        yield home.resolve()
        return
    folder = Path(tempfile.mkdtemp(prefix="keyrotation-demo-"))
    try:
        yield folder
    finally:
        signals.stop()
        shutil.rmtree(folder, ignore_errors=True)


def _conclude(stage: Stage, figures: Figures, signals: Signals) -> int:
    stage.chapter("The report", "Counted by the clients themselves, and looked up once more in the end.")
    stage.show(demo_report.figures_table(figures))
    stage.show(f"Where the time went, {stage.now:.0f} s in all")
    stage.show(demo_report.time_table(figures.shares))
    if signals.caught:
        return _interrupted(stage, signals)
    bad = demo_report.problems(figures)
    good = f"GOOD: a key was rotated under {figures.verified:,} requests, and no valid token was rejected."
    stage.verdict(not bad, f"NOT GOOD: {'; '.join(bad)}." if bad else good)
    return 1 if bad else 0


def _interrupted(stage: Stage, signals: Signals) -> int:
    if signals.caught == signal.SIGALRM:
        stage.verdict(False, f"The demo failed: it was not over after {_STORY_WITHIN:.0f} s. Is this machine very busy? Everything is stopped.")
        return 1
    stage.verdict(False, "Interrupted. Everything is stopped.")
    return 128 + signals.caught


def _still_there(folder: Path) -> tuple[str, ...]:
    return (str(folder),) if folder.exists() else ()
