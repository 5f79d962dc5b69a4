"""References to secrets: `env:NAME`, `file:/path`, `prefect:block-name`. A reference can be shown; what it leads to can not.

The value is read where it is used and at each use, so that a secret that was renewed is taken without a restart.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from keyrotation.domain.errors import SettingsError


@dataclass(frozen=True, slots=True)
class SecretRef:
    """Where a secret lies."""

    kind: Literal["env", "file", "prefect"]
    place: str

    @classmethod
    def parse(cls, text: str) -> SecretRef:
        """The reference in that text; raises ValueError without quoting it, for it may be a secret in the wrong place."""
        kind, colon, place = text.partition(":")
        if not colon or kind not in ("env", "file", "prefect") or not place.strip():
            raise ValueError('a secret is a reference, never a value: write "env:NAME", "file:/path" or "prefect:block-name"')
        return cls(cast("Literal['env', 'file', 'prefect']", kind), place.strip())

    def __str__(self) -> str:
        return f"{self.kind}:{self.place}"

    def reveal(self) -> str:
        """The secret; raises SettingsError where the reference leads nowhere."""
        match self.kind:
            case "env":
                value = os.environ.get(self.place)
            case "file":
                value = self._from_file()
            case "prefect":
                value = self._from_block()
        if not value:
            raise SettingsError(f"the secret {self} leads nowhere: it is not set, or empty")
        return value

    def _from_file(self) -> str:
        try:
            return Path(self.place).expanduser().read_text(encoding="utf-8").strip()
        except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: ~somebody who is not there
            raise SettingsError(f"the secret {self} cannot be read: {error.__class__.__name__}") from None

    def _from_block(self) -> str:
        # Prefect is only needed, and only imported, where somebody chose to keep a secret there.
        from prefect.blocks.system import Secret  # noqa: PLC0415

        load: Any = Secret.load  # typed for async callers only
        try:
            return str(load(self.place, _sync=True).get())
        except Exception as error:  # noqa: BLE001  Prefect's text may quote the block
            raise SettingsError(f"the secret {self} cannot be loaded from Prefect: {error.__class__.__name__}") from None
