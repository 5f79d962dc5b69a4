"""Owns the parts of a sandbox as a company: begun side by side, each as soon as what it needs is there; watched; ended.

Nothing here knows what a part does. Starting takes seconds of several processors, so whatever does not depend on one
another starts at once; ending goes in the opposite order, so that no part loses what it needs while it still works.
"""

import time
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from pathlib import Path
from threading import Event
from typing import Protocol

from sandbox.processes import SandboxError

# Told when a step begins (None) and when it is done (the seconds that it took).
Tell = Callable[[str, float | None], None]
Step = Future[None]

_MANY = 32
_WATCH_EVERY = 0.2
_LOG_LINES = 25


class Part(Protocol):
    """A long-lived process of the sandbox."""

    @property
    def pid(self) -> int: ...
    @property
    def running(self) -> bool: ...
    def start(self) -> None: ...
    def stop(self) -> None: ...


class Crew:
    """All parts of one sandbox, by name, in the order in which they were begun."""

    def __init__(self, home: Path, tell: Tell) -> None:
        self._home, self._tell = home, tell
        self._parts: dict[str, Part] = {}
        self._steps: list[Step] = []
        self._pool = ThreadPoolExecutor(max_workers=_MANY, thread_name_prefix="crew")
        self._ending, self._reviving = False, Event()

    def begin(self, name: str, part: Part, after: Iterable[Step] = ()) -> Step:
        """Starts a part once these steps are done."""
        self._parts[name] = part
        return self.do(name, part.start, after)

    def do(self, name: str, work: Callable[[], None], after: Iterable[Step] = ()) -> Step:
        """Does a piece of work once these steps are done."""
        step = self._pool.submit(self._take, name, work, tuple(after))
        self._steps.append(step)
        return step

    def join(self) -> None:
        """Returns when everything begun is done; raises the first error as soon as there is one."""
        done, _ = wait(self._steps, return_when=FIRST_EXCEPTION)
        for step in done:
            step.result()

    def watch(self, leave_the_dead: bool, revived: Callable[[], None]) -> None:
        """Returns never: raises when a part has died, unless the dead are left; starts them again when asked to."""
        while True:
            if self._reviving.is_set():
                self._reviving.clear()
                self._start_the_dead()
                revived()
            dead = next((name for name, part in self._parts.items() if not part.running), None)
            if dead is not None and not leave_the_dead:
                raise SandboxError(f"{dead} has died. Its last words:\n{self._last_words(dead)}")
            time.sleep(_WATCH_EVERY)

    def revive(self) -> None:
        """Asks the watch to start again, at their old addresses, the parts that have died."""
        self._reviving.set()

    def pids(self) -> dict[str, int]:
        return {name: part.pid for name, part in self._parts.items()}

    def end(self) -> None:
        """Stops every part, the last one begun first, also while some are still starting."""
        self._ending = True
        self._stop_all()
        while any(not step.done() for step in self._steps):
            self._stop_all()  # one that was just being spawned
            wait(self._steps, timeout=_WATCH_EVERY)
        self._pool.shutdown()

    def _take(self, name: str, work: Callable[[], None], after: tuple[Step, ...]) -> None:
        for earlier in after:
            earlier.result()
        if self._ending:
            raise SandboxError(f"{name} was not started: the sandbox is ending")
        self._tell(name, None)
        begun = time.monotonic()
        work()
        self._tell(name, time.monotonic() - begun)

    def _start_the_dead(self) -> None:
        for part in self._parts.values():
            if not part.running:
                part.start()

    def _stop_all(self) -> None:
        for part in reversed(self._parts.values()):
            part.stop()

    def _last_words(self, name: str) -> str:
        log = self._home / "logs" / f"{name}.log"
        lines = log.read_text(errors="replace").splitlines() if log.exists() else []
        return "\n".join(lines[-_LOG_LINES:]) or "(it logged nothing)"
