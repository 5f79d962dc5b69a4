"""One world for all flow tests: real PostgreSQL, KMS, identity service, two Envoys, Slack inbox, Prefect server and worker.

Flows are called in this process (quick, and their state is in hand) or through their deployments. Each test leaves the world fit for the next:
no fault set, nothing on hold, no rotation open.
"""

from __future__ import annotations

import contextvars
import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg2
import pytest
import requests
from prefect.settings import PREFECT_API_URL, temporary_settings

from keyrotation.domain.keys import KeyRing
from keyrotation.domain.ledger import Entry
from keyrotation.ports import Environment
from sandbox.world import World

SHORT = {"gateways.cache_time": "2s", "policy.token_lifetime": "6s", "policy.cleanup_after": "8s", "policy.lease": "3s"}


class Stage:
    """The world, and the flows on it."""

    def __init__(self, world: World, folder: Path) -> None:
        self.world, self.folder = world, folder
        self.facts = world.facts

    @property
    def env(self) -> Environment:
        from tasks import skin

        return skin.environment("sandbox")

    @property
    def ring(self) -> KeyRing:
        return self.env.keys.look().ring

    def rotate(self, **parameters: Any) -> Any:
        """The final state of rotate-signing-keys, run here."""
        from flows.rotate import rotate_signing_keys

        return rotate_signing_keys("sandbox", **parameters, return_state=True)

    def clean_up(self, **parameters: Any) -> Any:
        from flows.cleanup import cleanup_old_keys

        return cleanup_old_keys("sandbox", **parameters, return_state=True)

    def bootstrap(self) -> Any:
        from flows.bootstrap import bootstrap_signing_keys

        return bootstrap_signing_keys("sandbox", return_state=True)

    def ledger(self, after: int = 0) -> list[Entry]:
        return list(self.env.records.entries(after))

    def head(self) -> int:
        return self.env.records.head()[0]

    def settings(self, change: Callable[[str], str]) -> None:
        """The same environment with other settings, for this test."""
        from tasks import skin

        (self.folder / "sandbox.toml").write_text(change(Path(self.facts["config"]).read_text()))
        skin.environment.cache_clear()

    def set(self, name: str, value: str) -> None:
        """One setting, by its last name, as TOML."""
        self.settings(lambda text: re.sub(rf"(?m)^{name} = .*$", lambda _: f"{name} = {value}", text))

    def fault(self, part: str, faults: dict[str, Any]) -> None:
        """What the next calls of the identity service or the KMS meet."""
        (self.world.home / "secrets" / part / "faults.json").write_text(json.dumps(faults))

    def sql(self, statement: str, *values: Any) -> list[tuple[Any, ...]]:
        """As the owner of the tables."""
        with psycopg2.connect(self.facts["owner_database_url"]) as connection, connection.cursor() as cursor:
            cursor.execute(statement, values)
            return cursor.fetchall() if cursor.description else []

    def messages(self) -> list[str]:
        return [message["text"] for message in requests.get(f"{self.facts['slack_url']}/messages", timeout=5).json()]

    def until(self, happened: Callable[[], Any], within: float = 40) -> Any:
        """What `happened` returns once it is true."""
        for _ in range(int(within / 0.05)):
            if result := happened():
                return result
            time.sleep(0.05)
        raise AssertionError(f"it did not happen within {within} s")

    def in_background(self, work: Callable[[], Any]) -> Callable[[], Any]:
        """Starts it in a thread; calling what is returned waits for its result."""
        result: list[Any] = []
        here = contextvars.copy_context()  # Prefect's settings are the context's
        thread = threading.Thread(target=lambda: result.append(here.run(work)), daemon=True)
        thread.start()

        def join() -> Any:
            thread.join(60)
            assert result, "the background work did not end"
            return result[0]

        return join


@pytest.fixture(scope="session")
def flow_world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with World(tmp_path_factory.mktemp("flows") / "home", SHORT) as world:
        yield world


@pytest.fixture
def stage(flow_world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stage]:
    from tasks import skin

    stage = Stage(flow_world, tmp_path)
    (tmp_path / "sandbox.toml").write_text(Path(stage.facts["config"]).read_text())
    monkeypatch.setenv("KEYROTATION_ENVIRONMENTS", str(tmp_path))
    monkeypatch.setenv("PREFECT_SERVER_ALLOW_EPHEMERAL_MODE", "false")
    skin.environment.cache_clear()
    with temporary_settings({PREFECT_API_URL: stage.facts["prefect_api_url"]}):
        yield stage
    for part in ("identity", "kms"):
        (flow_world.home / "secrets" / part / "faults.json").unlink(missing_ok=True)
    requests.post(f"{stage.facts['slack_url']}/_faults", json={}, timeout=5)
    stage.sql("UPDATE key_rotation.environment SET hold_reason = NULL, hold_by = NULL, held_at = NULL")
    stage.sql("UPDATE public.signing_keys SET cleanup_hold = NULL WHERE cleanup_hold IS NOT NULL")
    stage.sql("UPDATE key_rotation.rotations SET ended_at = now(), outcome = 'failed', message = 'the test ended' WHERE ended_at IS NULL")
    stage.sql("UPDATE public.signing_keys SET enabled = FALSE WHERE status IN ('next', 'previous')")
    skin.environment.cache_clear()
    os.environ.pop("KEYROTATION_ENVIRONMENTS", None)
