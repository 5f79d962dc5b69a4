"""The verdict over what gateways were seen to do: who is shown to know a key, and who is not.

An *observation* is one probe of one instance. *Accepted* is a 200 and *refused* a 401; everything else (403, 429, 5xx, a timeout) says
nothing about the key and leaves the instance *unproven*. Where an instance caches per worker thread, one 200 proves one thread: so many
probes over fresh connections are asked for that missing one of the workers has a chance below one in a million.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

MISSED_WORKER_CHANCE = 1e-6
# Parts of the reasons that verifiers give for a 401 that is no word about the key: somebody's clock, a set that could not be fetched, no token.
OTHER_REASONS = ("not yet valid", "not active", "in the future", "used before", "expired", "fetch", "missing")


class Answer(StrEnum):
    """What one probe shows about the key."""

    ACCEPTED = "accepted"
    REFUSED = "refused"
    UNPROVEN = "unproven"


@dataclass(frozen=True, slots=True)
class Observation:
    """One probe: which instance, what it answered, and the words for people (status and reason, never the token)."""

    gateway: str
    answer: Answer
    said: str


def classify(status: int, reason: str) -> Answer:
    """What an HTTP status on a probe or API route says about the key.

    A 401 for another cause than the key (not yet valid: somebody's clock; the set could not be fetched) is no word about the key.
    """
    if status == 200:
        return Answer.ACCEPTED
    if status == 401 and not any(words in reason.lower() for words in OTHER_REASONS):
        return Answer.REFUSED
    return Answer.UNPROVEN


def probes_needed(workers: int) -> int:
    """How many accepted probes show that every worker thread knows the key: (1 - 1/workers)^n <= 1e-6."""
    if workers <= 1:
        return 1
    return math.ceil(math.log(MISSED_WORKER_CHANCE) / math.log(1 - 1 / workers))


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a round of probes shows, by gateway."""

    accepted: tuple[str, ...]
    refused: tuple[str, ...]
    unproven: tuple[tuple[str, str], ...]  # gateway, what it said

    @property
    def everywhere(self) -> bool:
        """Accepted by every gateway, and by at least one."""
        return bool(self.accepted) and not self.refused and not self.unproven

    @property
    def lagging(self) -> tuple[str, ...]:
        """Gateways that have not been shown to know the key."""
        return tuple(sorted({*self.refused, *(gateway for gateway, _ in self.unproven)}))

    def explain(self) -> str:
        """One sentence for people."""
        parts = [f"accepted by {', '.join(self.accepted)}"] if self.accepted else []
        parts += [f"refused by {', '.join(self.refused)}"] if self.refused else []
        parts += [f"{gateway}: {said}" for gateway, said in self.unproven]
        return "; ".join(parts) or "no gateway was probed"


def judge(observations: Iterable[Observation], needed: int = 1) -> Verdict:
    """The verdict over one round: a gateway accepts only if `needed` probes were accepted and none was not."""
    by_gateway: dict[str, list[Observation]] = {}
    for observation in observations:
        by_gateway.setdefault(observation.gateway, []).append(observation)
    accepted, refused, unproven = [], [], []
    for gateway, seen in by_gateway.items():
        doubtful = [observation for observation in seen if observation.answer is Answer.UNPROVEN]
        if any(observation.answer is Answer.REFUSED for observation in seen):
            refused.append(gateway)
        elif doubtful:
            unproven.append((gateway, doubtful[0].said))
        elif len(seen) < needed:
            unproven.append((gateway, f"only {len(seen)} of {needed} probes were made: sampled, not proven"))
        else:
            accepted.append(gateway)
    return Verdict(tuple(accepted), tuple(refused), tuple(unproven))
