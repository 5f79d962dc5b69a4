"""Owns what a home remembers from one sandbox to the next: its secrets, and the ports of its parts.

Secrets lie in `home/secrets`, one to a file, readable by their owner only. Ports are kept so that a bookmark, a shell
or a test that outlives a sandbox finds the next one at the same address; one that somebody else has taken meanwhile is
replaced.
"""

import json
import os
import secrets
from pathlib import Path

from sandbox.processes import free_port, listening

_BYTES = 24


class Secrets:
    """Random words by name, made when first asked for."""

    def __init__(self, home: Path) -> None:
        self.folder = home.resolve() / "secrets"
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.folder.chmod(0o700)

    def word(self, name: str) -> str:
        """The secret of this name, kept over restarts."""
        path = self.folder / name
        if not path.exists():
            self.keep(name, secrets.token_urlsafe(_BYTES))
        return path.read_text()

    def keep(self, name: str, text: str) -> Path:
        """Puts a text of the sandbox's own making beside the words; gives its file."""
        path = self.folder / name
        path.parent.mkdir(exist_ok=True, mode=0o700)
        write_private(path, text)
        return path


class Ports:
    """Loopback ports by name. Asking twice gives the same one."""

    def __init__(self, home: Path) -> None:
        self._path = home / "ports.json"
        self._kept: dict[str, int] = json.loads(self._path.read_text()) if self._path.exists() else {}
        self._given: dict[str, int] = {}

    def port(self, name: str) -> int:
        if name not in self._given:
            kept = self._kept.get(name)
            self._given[name] = free_port() if kept is None or listening(kept) else kept
            write_private(self._path, json.dumps(self._kept | self._given, indent=2))
        return self._given[name]


def write_private(path: Path, text: str) -> None:
    """Writes a file for its owner only, whole or not at all."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    with os.fdopen(os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(text)
    unfinished.replace(path)
