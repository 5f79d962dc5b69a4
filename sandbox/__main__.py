"""Owns the command line of the sandbox, and what a person sees of its start.

    python -m sandbox up --home DIR [--set KEY=VALUE ...] [--no-bootstrap]
    python -m sandbox demo [--home DIR]

Exit status of `up`: 0 ended by a signal, 1 a part failed or the folder is in use, 2 wrong usage. That of `demo` is told
in `sandbox.demo`.
"""

import argparse
import signal
import sys
import threading
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from sandbox.processes import SandboxError
from sandbox.settings import SettingError, Settings
from sandbox.world import run


class Progress:
    """Shows the parts as they come up: a table that moves on a terminal, one line for each elsewhere."""

    def __init__(self, console: Console) -> None:
        self._console, self._begun = console, time.monotonic()
        self._live = Live(get_renderable=self._table, console=console, refresh_per_second=8) if console.is_terminal else None
        self._steps: dict[str, float | None] = {}
        self._spinner, self._lock = Spinner("dots"), threading.Lock()

    def tell(self, step: str, seconds: float | None) -> None:
        with self._lock:  # steps are told of from several threads
            self._steps[step] = seconds
        if self._live is None and seconds is not None:
            self._console.print(f"[{self._elapsed():5.1f} s] {step} ready, {seconds:.1f} s", markup=False)

    def start(self) -> None:
        if self._live is not None:
            self._live.start()

    def stop(self) -> None:
        if self._live is not None:
            self._live.stop()

    def ready(self, facts: Mapping[str, Any]) -> None:
        """The addresses, without the secrets."""
        self.stop()
        print_line = partial(self._console.print, markup=False, soft_wrap=True)  # an address stays in one piece
        print_line(f"The sandbox is up after {self._elapsed():.0f} s. Ctrl-C ends it.")
        for name, address in _addresses(facts):
            print_line(f"  {name:<14} {address}")

    def _elapsed(self) -> float:
        return time.monotonic() - self._begun

    def _table(self) -> RenderableType:
        table = Table.grid(padding=(0, 1))
        with self._lock:
            steps = list(self._steps.items())
        for step, seconds in steps:
            mark: RenderableType = self._spinner if seconds is None else Text("✓", style="green")
            table.add_row(mark, step, "" if seconds is None else f"{seconds:.1f} s")
        return table


def main() -> int:
    arguments = _parser().parse_args()
    try:
        answer: int = arguments.command(arguments)
    except KeyboardInterrupt:  # before a command has begun to listen for it
        return 128 + signal.SIGINT
    return answer


def _up(arguments: argparse.Namespace) -> int:
    progress = Progress(Console(highlight=False))
    try:
        settings = Settings.parse(arguments.set)
        progress.start()
        run(arguments.home, settings, arguments.bootstrap, progress.tell, progress.ready)
    except SandboxError as failed:
        progress.stop()
        print(failed, file=sys.stderr)
        return 2 if isinstance(failed, SettingError) else 1
    finally:
        progress.stop()
    return 0


def _demo(arguments: argparse.Namespace) -> int:
    from sandbox.demo import demo

    return demo(arguments.home)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m sandbox", description="A small real world to rotate signing keys in.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    up = commands.add_parser("up", help="starts it; runs until Ctrl-C")
    up.set_defaults(command=_up)
    up.add_argument("--home", type=Path, required=True, help="the folder that keeps everything")
    up.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting, as gateways.cache_time=2s")
    up.add_argument("--no-bootstrap", dest="bootstrap", action="store_false", help="without a first key")
    demo = commands.add_parser("demo", help="shows a rotation under live traffic, in about two minutes, and ends")
    demo.set_defaults(command=_demo)
    demo.add_argument("--home", type=Path, help="keeps everything there; by default a folder that is removed in the end")
    return parser


def _addresses(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    home = Path(facts["config"]).parent.parent
    return [
        ("Prefect", facts["prefect_ui_url"]),
        ("JWKS", facts["jwks_url"]),
        *((f"gateway {number}", gateway["url"]) for number, gateway in enumerate(facts["gateways"], 1)),
        ("Slack inbox", f"{facts['slack_url']}/messages"),
        ("settings", facts["config"]),
        ("all addresses", str(home / "sandbox.json")),
        ("for a shell", f"export KEYROTATION_ENVIRONMENTS={Path(facts['config']).parent}"),
    ]


if __name__ == "__main__":
    sys.exit(main())
