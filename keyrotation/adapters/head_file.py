"""The ledger's head outside the database: a small file that says which entry was the last, with its hash.

Who rewrites the ledger inside the database cannot rewrite this as well: `keyrotation audit` holds the two against each other. Put it where the
database's administrators cannot write (a mounted bucket with retention, another host).
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from keyrotation.domain.errors import WorldError


class HeadFile:
    """The newest published head."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def publish(self, seq: int, digest: str) -> None:
        """Puts the head there, whole or not at all; an older head never replaces a newer one."""
        try:
            published = self.read()
            if published is not None and published[0] >= seq:
                return
            self._path.parent.mkdir(parents=True, exist_ok=True)
            written = self._path.with_name(f"{self._path.name}.{os.getpid()}")
            written.write_text(json.dumps({"seq": seq, "hash": digest}) + "\n", encoding="utf-8")
            written.replace(self._path)
        except OSError as error:
            raise WorldError(f"the ledger's head cannot be written to {self._path} (audit.head_file): {error.__class__.__name__}") from None

    def read(self) -> tuple[int, str] | None:
        """The head that was published last; None where none was."""
        try:
            head = json.loads(self._path.read_text(encoding="utf-8"))
            return int(head["seq"]), str(head["hash"])
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError):
            raise WorldError(f"{self._path} (audit.head_file) is not a published head: find out who changed it") from None
