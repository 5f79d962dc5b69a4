"""Owns the life of a world: begun on a home that nobody else holds, kept up, and ended with nothing left running.

`run` lives it in this process; `World` is a handle on one that lives in a child process, for tests and the demo.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from sandbox.conductor import CHECKOUT
from sandbox.crew import Tell
from sandbox.processes import Process, SandboxError, claimed
from sandbox.settings import Settings, as_value
from sandbox.wiring import Sandbox

# A loaded machine with two processors; it takes about 20 s on an idle one.
_UP_WITHIN = 240.0
_DOWN_WITHIN = 60.0
_POLL = 0.05


def run(home: Path, settings: Settings, bootstrap: bool, tell: Tell, when_ready: Callable[[Mapping[str, Any]], None]) -> None:
    """Returns when this process gets SIGINT or SIGTERM; raises SandboxError when a part fails to start.

    When a part dies later it goes on without it, and SIGUSR1 has it started again; with `sandbox.on_death = end` it raises, too.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _end)
    try:
        with claimed(home):
            _live(Sandbox(home, settings, tell), bootstrap, when_ready)
    except _Ended:
        pass


def _live(sandbox: Sandbox, bootstrap: bool, when_ready: Callable[[Mapping[str, Any]], None]) -> None:
    signal.signal(signal.SIGUSR1, lambda *_: sandbox.revive())
    try:
        sandbox.start(bootstrap)
        when_ready(sandbox.facts())
        sandbox.watch()
    finally:
        _heed_no_more_signals()
        sandbox.stop()


class _Ended(BaseException):
    """The world was told to end. Not an Exception: nothing on the way may take it for a failure of its own."""


def _end(*_: object) -> None:
    _heed_no_more_signals()
    raise _Ended


def _heed_no_more_signals() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


class World:
    """A world in a child process: `with World(home, {"gateways.cache_time": "2s"}) as world: world.facts["pids"]`."""

    def __init__(self, home: Path, overrides: Mapping[str, Any] | None = None, bootstrap: bool = True) -> None:
        self.home = home.resolve()
        self._facts_file = self.home / "sandbox.json"
        words = [f"--set={name}={as_value(value)}" for name, value in (overrides or {}).items()]
        self._process = Process(
            "world",
            [sys.executable, "-m", "sandbox", "up", "--home", str(self.home), *words] + ([] if bootstrap else ["--no-bootstrap"]),
            home=self.home / "handle",  # not the world's own: it would sweep itself away as a leftover
            cwd=CHECKOUT,
            ready=self._is_up,
            ready_within=_UP_WITHIN,
            stop_within=_DOWN_WITHIN,
            death_signal=signal.SIGTERM,
        )

    @property
    def facts(self) -> dict[str, Any]:
        """What `sandbox.json` says now."""
        facts: dict[str, Any] = json.loads(self._facts_file.read_text())
        return facts

    @property
    def environment(self) -> dict[str, str]:
        """The variables with which a command (`keyrotation …`) finds this world."""
        return {**os.environ, "KEYROTATION_ENVIRONMENTS": str(Path(self.facts["config"]).parent)}

    @property
    def running(self) -> bool:
        return self._process.running

    def up(self) -> Self:
        """Returns when `sandbox.json` is there; otherwise raises SandboxError with the world's last words."""
        self._process.start()
        return self

    def down(self) -> None:
        self._process.stop()

    def kill(self) -> None:
        """`kill -9`: the parts die with it, `sandbox.json` stays."""
        self._process.kill()

    def revive(self) -> None:
        """Returns when every part that has died runs again."""
        before = self._facts_file.stat().st_mtime_ns
        os.kill(self._process.pid, signal.SIGUSR1)
        deadline = time.monotonic() + _UP_WITHIN
        while self._facts_file.stat().st_mtime_ns == before:
            if not self.running or time.monotonic() > deadline:
                raise SandboxError(f"the world did not bring back its dead:\n{self._process.last_words()}")
            time.sleep(_POLL)

    def __enter__(self) -> Self:
        return self.up()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.down()

    def _is_up(self) -> bool:
        try:
            return bool(self.facts["pids"]["sandbox"] == self._process.pid)  # not that of one that was killed
        except FileNotFoundError:
            return False
