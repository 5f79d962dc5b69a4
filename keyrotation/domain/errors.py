"""What can go wrong, in two families: the world's fault, which an operator can mend, and refusals, which protect the keys.

Each text is one sentence or two for an operator: what is wrong, and the next thing to do. None may hold a secret: adapters build
their texts from status codes and names, never from a body, a URL's password, or a driver's message that quotes a row.
"""

from __future__ import annotations


class KeyRotationError(Exception):
    """The root. `retryable` is true only where the same call may succeed a moment later without anybody doing anything."""

    retryable = False

    def __init__(self, message: str, *, retryable: bool | None = None) -> None:
        super().__init__(message)
        if retryable is not None:
            self.retryable = retryable


class SettingsError(KeyRotationError):
    """The environment's file is wrong, or a secret reference leads nowhere. Nothing was touched."""


class Refused(KeyRotationError):
    """Asked for something that must not happen now: on hold, not verified, wrong environment. Nothing was changed."""


class Busy(Refused):
    """Another run works on this environment's keys."""


class Superseded(KeyRotationError):
    """This run's epoch is over: somebody took over. It changed nothing since, and must stop."""


class WorldError(KeyRotationError):
    """An outside system answered wrongly or not at all."""


class Unreachable(WorldError):
    """It did not answer in time: a retry may help."""

    retryable = True


class BadAnswer(WorldError):
    """It answered, and the answer cannot be used (wrong body, too large, a redirect, altered ciphertext)."""


class Denied(WorldError):
    """It knows us and says no: a credential or a grant has to be mended by a person."""


class Ambiguous(KeyRotationError):
    """The facts contradict each other (two current keys, a kid served twice): a person looks, nothing is guessed."""


class Unproven(KeyRotationError):
    """Something that must be shown before going on could not be shown in time. The keys are as they were."""
