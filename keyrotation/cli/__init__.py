"""The shell: `keyrotation COMMAND ENVIRONMENT [options]`. Exit 0 only if all is well, 1 if not, 2 for a usage or settings error.

Owns: the commands and their options, how an error becomes one sentence. Leaves to others: what is looked at (cli.looking, cli.auditing) and changed
(cli.changing), how it is shown (cli.report). Nothing heavy is imported before a command is known.
"""

from __future__ import annotations

import argparse
import importlib
import io
import logging
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NoReturn

from keyrotation.domain.errors import KeyRotationError, SettingsError

if TYPE_CHECKING:
    from keyrotation.cli.report import Report

WELL, NOT_WELL, USAGE = 0, 1, 2
INTERRUPTED, BROKEN_PIPE = 130, 141  # 128 + SIGINT, 128 + SIGPIPE: what a shell sees of other programs
ENTRIES_SHOWN = 10
KID = re.compile(r"-[A-Za-z0-9_-]{42}")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status. Says what went wrong in one sentence on stderr, never in a traceback."""
    _prepare_streams()
    try:
        arguments = _parser().parse_args([_as_argument(text) for text in (sys.argv[1:] if argv is None else argv)])
        report = _command(arguments)(arguments)
        report.show(arguments.format)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is buffered goes nowhere, at exit, too
        return BROKEN_PIPE
    except SettingsError as error:
        return _complain(str(error), USAGE)
    except KeyRotationError as error:
        return _complain(str(error), NOT_WELL)
    except Exception as error:  # noqa: BLE001  a stranger's text may quote a secret: its class and our line say enough
        return _complain(f"failed unexpectedly with {error.__class__.__name__}{_where(error)}: a mistake of this software, please report it", NOT_WELL)
    return WELL if report.well else NOT_WELL


def _complain(sentence: str, status: int) -> int:
    sys.stderr.write(f"keyrotation: {' '.join(sentence.split())}\n")
    return status


def _where(error: BaseException) -> str:
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if f"{os.sep}keyrotation{os.sep}" in frame.filename]
    return f" (keyrotation/{frames[-1].filename.rpartition(f'{os.sep}keyrotation{os.sep}')[2]}:{frames[-1].lineno})" if frames else ""


def _prepare_streams() -> None:
    """Warnings as plain lines on stderr; a terminal that cannot show a character shows another one."""
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # its library writes to stderr by itself; what matters comes as an error
    logging.basicConfig(format="keyrotation: %(message)s", level=logging.ERROR)
    logging.getLogger("keyrotation").setLevel(logging.WARNING)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence, too."""

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE, f"{self.prog}: {message}; try {self.prog} --help\n")


def _parser() -> _Parser:
    parser = _Parser(prog="keyrotation", description="Looks after the signing keys of an environment (the name of its file in deployments/environments).")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, title="commands")

    plan = _add(commands, "plan", "what a rotation would do now, and why; changes nothing", "looking:plan")
    plan.add_argument("--only-if-due", action="store_true", help="decide as a scheduled run does")
    _add(commands, "status", "the keys now, at a glance", "looking:status")
    history = _add(commands, "history", "the rotations, newest first", "looking:history")
    history.add_argument("--limit", type=_count, default=ENTRIES_SHOWN, metavar="N", help=f"so many rotations (default {ENTRIES_SHOWN})")
    history.add_argument("--keys", action="store_true", help="all keys with their instants, instead of the rotations")
    _add(commands, "audit", "verifies the ledger from its first entry to its last", "auditing:audit")
    _add(commands, "doctor", "checks every outside system, with the next thing to do", "looking:doctor")

    hold = _add(commands, "hold", "keeps scheduled rotations and cleanups back; an emergency ignores it", "changing:hold")
    hold.add_argument("--reason", type=_text, required=True, metavar="TEXT", help="for whoever finds it")
    release = _add(commands, "release", "lifts the hold of the environment and of its cleanups", "changing:release")
    release.add_argument("--reason", type=_text, metavar="TEXT", help="for the record")
    republish = _add(commands, "republish", "brings back a key that was cleaned up too early, to verify its tokens", "changing:republish")
    republish.add_argument("kid", type=_kid, metavar="KID", help="of the key (keyrotation history ENVIRONMENT --keys)")
    return parser


def _add(commands: argparse._SubParsersAction[_Parser], name: str, does: str, place: str) -> _Parser:
    command: _Parser = commands.add_parser(name, help=does, description=f"{does[0].upper()}{does[1:]}.")
    command.add_argument("environment", metavar="ENVIRONMENT")
    command.add_argument("--format", choices=("text", "json"), default="text", help="how it is shown (default text)")
    command.set_defaults(command=place)
    return command


def _command(arguments: argparse.Namespace) -> Callable[[argparse.Namespace], Report]:
    module, _, name = arguments.command.partition(":")
    command: Callable[[argparse.Namespace], Report] = getattr(importlib.import_module(f"keyrotation.cli.{module}"), name)
    return command


def _as_argument(text: str) -> str:
    """A kid may begin with a hyphen. argparse takes what holds a space for an argument and not for an option; `_kid` takes it off again."""
    return f" {text}" if KID.fullmatch(text) else text


def _kid(text: str) -> str:
    return text.strip()


def _count(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 100_000:
        raise argparse.ArgumentTypeError("a number from 1 to 100000")
    return int(text)


def _text(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError("a reason is words: whoever finds it asks why")
    return text.strip()
