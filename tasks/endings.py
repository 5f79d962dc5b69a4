"""How a flow run ends: Prefect's own states with our sentence as the message, and never an exception that Prefect would store."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec

from prefect.client.schemas.objects import State
from prefect.states import Cancelled, Completed, Failed

from keyrotation.domain.decision import Action, Decision, Rotation
from keyrotation.domain.errors import KeyRotationError, Superseded
from keyrotation.domain.events import Happened
from tasks.skin import UnexpectedError, log

P = ParamSpec("P")
# A message is stored with the run's state; longer ones are cut by the UI anyway.
LONGEST = 1500


def ending(end: Decision | Rotation, *, only_if_due: bool = False, dry_run: bool = False, also: Happened | None = None) -> State[Any]:
    """The state that says what came of a run."""
    if isinstance(end, Rotation):
        message = f"{end.outcome}: {end.message}"
        match end.outcome:
            case "done":
                return Completed(message=message[:LONGEST])
            case "superseded":
                return Cancelled(message=message[:LONGEST])
            case _:
                return Failed(message=message[:LONGEST])
    message = (f"dry run, nothing was changed: {end.message}" if dry_run else end.message) + (f"; {also.message}" if also and also.changed else "")
    # A schedule that finds a hold has done what it should; a person who asked for a rotation did not get it.
    refused = end.action is Action.ON_HOLD and not only_if_due and not dry_run
    return Failed(message=message[:LONGEST]) if refused else Completed(message=message[:LONGEST])


def cleaned(done: Sequence[Happened]) -> State[Any]:
    """The state of a cleanup run."""
    return Completed(message="; ".join(happened.message for happened in done)[:LONGEST] or "nothing to do: no old key is waiting")


def in_words(flow: Callable[P, State[Any]]) -> Callable[P, State[Any]]:
    """Turns every error into a state with its sentence."""

    @functools.wraps(flow)
    def run(*args: P.args, **kwargs: P.kwargs) -> State[Any]:
        try:
            return flow(*args, **kwargs)
        except Superseded as error:
            return Cancelled(message=str(error)[:LONGEST])
        except KeyRotationError as error:
            log().error("%s", error)
            return Failed(message=str(error)[:LONGEST])
        except Exception as error:  # noqa: BLE001  Prefect would store the text
            log().error("the run failed with %s", error.__class__.__name__)
            return Failed(message=str(UnexpectedError(f"the run failed unexpectedly with {error.__class__.__name__}: the next run goes on from the database")))

    return run
