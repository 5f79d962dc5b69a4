"""What a step says happened: the value that goes unchanged into ledger, log, Slack, artifact and run state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class Proof(StrEnum):
    """What was shown about a promotion."""

    PROVEN = "proven"
    WRONG = "wrong"  # the new key itself does not work: roll back
    UNPROVEN = "unproven"  # something else is in the way: hold, and page


@dataclass(frozen=True, slots=True)
class Happened:
    """A step's result: the key it was about, a sentence, the evidence (plain values, no secrets), and what it proves."""

    kid: str | None
    message: str
    evidence: Mapping[str, Any] = field(default_factory=dict)
    proof: Proof = Proof.PROVEN
    changed: bool = True  # False: it was so already
