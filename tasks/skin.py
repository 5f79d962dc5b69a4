"""How a step becomes a Prefect task: its name, its retries, its sentence as the state's message, its entry in the ledger.

A step called outside a flow run (the shell, the fault campaign) runs as the plain function it is: the order of a rotation is written once,
in flows/, and is the same with and without Prefect. No exception leaves here with a text that is not ours: Prefect stores it.
"""

from __future__ import annotations

import functools
import getpass
import logging
import time
import traceback
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any, ParamSpec, cast

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.context import FlowRunContext
from prefect.exceptions import MissingContextError
from prefect.logging import get_run_logger
from prefect.states import Completed
from prefect.utilities.annotations import quote

from keyrotation import wiring
from keyrotation.domain.decision import Request, Rotation
from keyrotation.domain.errors import KeyRotationError
from keyrotation.domain.events import Happened
from keyrotation.ports import Environment

if TYPE_CHECKING:
    from prefect.client.schemas.objects import FlowRun

P = ParamSpec("P")
NOTHING = "nothing to do"
RETRIES, RETRY_DELAYS = 3, [1.0, 3.0, 8.0]  # seconds; only for errors that say a retry can help


class UnexpectedError(KeyRotationError):
    """A mistake of ours. The text names where, and nothing that was being worked on."""


@cache
def environment(name: str) -> Environment:
    """The wired environment, once a process: its connections are pooled, its memory is this run's."""
    return wiring.connect(name)


def log() -> logging.Logger | logging.LoggerAdapter[Any]:
    """Prefect's logger within a run, else the module's."""
    try:
        return get_run_logger()
    except MissingContextError:
        return logging.getLogger("keyrotation")


def current_flow_run() -> FlowRun | None:
    """The flow run that this code works for, if Prefect runs it."""
    context = FlowRunContext.get()
    return context.flow_run if context else None


def request(only_if_due: bool = False, reason: str = "asked for by a person") -> Request:
    """Who asks: the schedule, a person through Prefect (a self-hosted server knows no names), or a shell."""
    run = current_flow_run()
    if run is None:
        return Request(f"shell: {getpass.getuser()}", None, only_if_due, reason)
    by = run.created_by
    named = f" ({by.display_value})" if by is not None and by.display_value else ""
    who = f"schedule{named}" if run.auto_scheduled else f"Prefect, flow run {run.name}{named}"
    return Request(who, str(run.id), only_if_due, reason)


def step(name: str, *, retries: int = RETRIES) -> Callable[[Callable[P, Happened]], Callable[P, Happened]]:
    """Decorates a step that works on a rotation (its first argument) and says what happened."""

    def decorate(work: Callable[P, Happened]) -> Callable[P, Happened]:
        return prefect_task(name, retries)(_recorded(name, work))

    return decorate


def prefect_task(name: str, retries: int = RETRIES) -> Callable[[Callable[P, Any]], Callable[P, Any]]:
    """The Prefect task around a function within a flow run, the function itself outside of one."""

    def decorate(work: Callable[P, Any]) -> Callable[P, Any]:
        guarded = _in_words(name, work)
        as_task: Any = task(
            name=name,
            task_run_name=name,
            retries=retries,
            retry_delay_seconds=RETRY_DELAYS,
            retry_condition_fn=_may_help,
            cache_policy=NO_CACHE,
            persist_result=False,
        )(_with_message(guarded))

        @functools.wraps(work)
        def call(*args: P.args, **kwargs: P.kwargs) -> Any:
            if FlowRunContext.get() is None:
                return guarded(*args, **kwargs)
            # Every step is given the rotation. The arrows of the run graph shall show the order of the work, from result to result, and not that.
            shown = (quote(args[0]), *args[1:]) if len(args) > 1 and isinstance(args[0], Rotation) else args
            result = as_task(*shown, **kwargs)
            # The value itself, not the state around it: handed on to the next task it draws the arrow in the run graph.
            return result.result() if isinstance(result, State) else result

        return call

    return decorate


def _may_help(_task: Any, _run: Any, state: Any) -> bool:
    try:
        state.result()
    except KeyRotationError as error:
        return error.retryable
    except Exception:  # noqa: BLE001  anything else is no reason to repeat
        return False
    return False


def _with_message(work: Callable[P, Any]) -> Callable[P, Any]:
    """The step's sentence becomes the task run's state message."""

    @functools.wraps(work)
    def run(*args: P.args, **kwargs: P.kwargs) -> Any:
        result = work(*args, **kwargs)
        return Completed(message=_words(result), data=result)

    return run


def _words(result: Any) -> str:
    if isinstance(result, str):
        return result
    if isinstance(result, list | tuple):
        return "; ".join(_words(each) for each in result) or NOTHING
    return str(getattr(result, "message", NOTHING))


def _recorded(name: str, work: Callable[P, Happened]) -> Callable[P, Happened]:
    """Logs the step's sentence and puts it into the ledger, with its evidence and duration."""

    @functools.wraps(work)
    def run(*args: P.args, **kwargs: P.kwargs) -> Happened:
        rotation = cast("Rotation", args[0])
        begun = time.monotonic()
        happened = work(*args, **kwargs)
        log().info("%s", happened.message)
        environment(rotation.environment).keys.record(
            name,
            Request(rotation.actor, rotation.flow_run_id),
            rotation_id=rotation.id,
            kid=happened.kid,
            reason=happened.message,
            evidence={**happened.evidence, "proof": str(happened.proof), "seconds": round(time.monotonic() - begun, 3)},
        )
        return happened

    return run


def _in_words(name: str, work: Callable[P, Any]) -> Callable[P, Any]:
    """Lets only our own errors out: a driver's text may quote what must not be stored."""

    @functools.wraps(work)
    def run(*args: P.args, **kwargs: P.kwargs) -> Any:
        try:
            return work(*args, **kwargs)
        except KeyRotationError:
            raise
        except Exception as error:  # noqa: BLE001  the whole point
            where = "".join(traceback.format_tb(error.__traceback__)[-6:])
            log().error("%s failed with %s (its text is not shown, it may hold a secret):\n%s", name, error.__class__.__name__, where)
            raise UnexpectedError(
                f"{name} failed unexpectedly with {error.__class__.__name__}: a mistake of this software; the log shows where. "
                "The next run goes on from the database"
            ) from None

    return run
