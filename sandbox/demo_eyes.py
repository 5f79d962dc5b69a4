"""Owns what the demo sees of a world, all of it from outside: Prefect's API, the database (SELECTs only), the JWKS, the
token endpoint, the Slack inbox, and the `keyrotation` command as any shell would call it.

Instants are seconds since the epoch, as `time.time()` gives them: everything runs on one machine, by one clock.
"""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import psycopg2
import requests
from requests.adapters import HTTPAdapter
from urllib3 import Retry

from sandbox.conductor import loopback_session
from sandbox.processes import SandboxError
from sandbox.traffic import read_token

FINAL = frozenset({"COMPLETED", "FAILED", "CRASHED", "CANCELLED"})

_TIMEOUT = 20
_COMMAND_WITHIN = 60.0
# A machine under load drops a connection now and then. Every call here may be made twice: starting a run has a key for that.
_AGAIN = Retry(total=3, backoff_factor=0.2, status_forcelist=(500, 502, 503, 504), allowed_methods=None)

_KEYS = """SELECT kid, status, enabled, greatest(created_at, promoted_at, demoted_at, disabled_at)
           FROM public.signing_keys ORDER BY created_at, kid"""
_LEDGER = "SELECT seq, at, event, kid, actor FROM key_rotation.ledger WHERE seq > %s ORDER BY seq"
_LAST_ENTRY = "SELECT seq FROM key_rotation.ledger_head"


@dataclass(frozen=True, slots=True)
class Step:
    """A task run: one step of a flow run."""

    id: str
    name: str
    state: str
    message: str
    started_at: float | None
    ended_at: float | None

    @property
    def seconds(self) -> float:
        return self.ended_at - self.started_at if self.started_at is not None and self.ended_at is not None else 0.0


@dataclass(frozen=True, slots=True)
class Run:
    """A flow run with its steps, in the order in which they began, and the bar of the step that shows one."""

    id: str
    name: str
    state: str
    message: str
    due_at: float | None
    started_at: float | None
    ended_at: float | None
    steps: tuple[Step, ...]
    bar: tuple[float, str] | None  # share from 0 to 1, and what it says

    @property
    def over(self) -> bool:
        return self.state in FINAL

    @property
    def seconds(self) -> float:
        """From its hour to its end."""
        return self.ended_at - self.due_at if self.due_at is not None and self.ended_at is not None else 0.0


@dataclass(frozen=True, slots=True)
class Key:
    """A row of the keys, without anything secret."""

    kid: str
    status: str
    enabled: bool
    changed_at: float


@dataclass(frozen=True, slots=True)
class Entry:
    """An entry of the ledger."""

    seq: int
    at: float
    event: str
    kid: str | None
    actor: str


@dataclass(frozen=True, slots=True)
class Audit:
    """Whether the ledger's chain is whole, how many entries it has, and what is wrong with it."""

    whole: bool
    entries: int
    problem: str = ""


class Eyes:
    """Looks at the world that these facts (its `sandbox.json`) describe; only `start` changes anything."""

    def __init__(self, facts: Mapping[str, Any]) -> None:
        self._facts, self._api = facts, facts["prefect_api_url"]
        self._session = loopback_session()
        self._session.mount("http://", HTTPAdapter(max_retries=_AGAIN))

    # ------------------------------------------------------------------------------------------------ Prefect

    def start(self, deployment: str, idempotency_key: str) -> str:
        """The id of a new flow run of this deployment (`flow/name`), made as Prefect's UI makes one: over the API."""
        found = self._ask("GET", f"{self._api}/deployments/name/{deployment}")
        wanted = {"state": {"type": "SCHEDULED"}, "idempotency_key": idempotency_key}
        return str(self._ask("POST", f"{self._api}/deployments/{found['id']}/create_flow_run", wanted)["id"])

    def run(self, run_id: str) -> Run:
        found = self._ask("GET", f"{self._api}/flow_runs/{run_id}")
        ours = {"flow_runs": {"id": {"any_": [run_id]}}}
        steps = tuple(map(_step, self._ask("POST", f"{self._api}/task_runs/filter", {**ours, "sort": "EXPECTED_START_TIME_ASC"})))
        return Run(
            id=run_id,
            name=found["name"],
            state=found["state"]["type"],
            message=found["state"]["message"] or "",
            due_at=_instant(found["state"]["state_details"].get("scheduled_time")) or _instant(found["expected_start_time"]),
            started_at=_instant(found["start_time"]),
            ended_at=_instant(found["end_time"]),
            steps=steps,
            bar=self._bar(ours, {step.id for step in steps if step.state not in FINAL}),
        )

    def run_about(self, deployment: str, kid: str) -> str | None:
        """The id of the newest flow run of this deployment that was made for this key."""
        flow, name = deployment.split("/")
        wanted = {"flows": {"name": {"any_": [flow]}}, "deployments": {"name": {"any_": [name]}}, "sort": "EXPECTED_START_TIME_DESC"}
        runs = self._ask("POST", f"{self._api}/flow_runs/filter", wanted)
        return next((str(run["id"]) for run in runs if run["parameters"].get("kid") == kid), None)

    def _bar(self, ours: Mapping[str, Any], running: set[str]) -> tuple[float, str] | None:
        if not running:
            return None
        artifacts = self._ask("POST", f"{self._api}/artifacts/filter", {**ours, "artifacts": {"type": {"any_": ["progress"]}}})
        shown = [each for each in artifacts if each["task_run_id"] in running]
        return (float(shown[-1]["data"]) / 100, shown[-1]["description"] or "") if shown else None

    # ------------------------------------------------------------------------------------------------ keys and tokens

    def all_keys(self) -> tuple[Key, ...]:
        """Every key that was ever made, oldest first."""
        return tuple(Key(kid, status, enabled, changed.timestamp()) for kid, status, enabled, changed in self._rows(_KEYS))

    def published(self) -> frozenset[str]:
        """The kids that the JWKS shows."""
        return frozenset(key["kid"] for key in self._ask("GET", self._facts["jwks_url"])["keys"])

    def signer(self) -> str:
        """The kid that a fresh token names."""
        form = {"grant_type": "client_credentials", "scope": "api"}
        who = (self._facts["client_id"], self._facts["client_secret"])
        answer = self._session.post(self._facts["token_url"], auth=who, data=form, timeout=_TIMEOUT)
        answer.raise_for_status()
        return read_token(answer.json()["access_token"]).kid

    # ------------------------------------------------------------------------------------------------ the records

    def last_entry(self) -> int:
        """The number of the ledger's newest entry."""
        return int(self._rows(_LAST_ENTRY)[0][0])

    def ledger(self, after: int) -> tuple[Entry, ...]:
        """The entries made since that one, oldest first."""
        return tuple(Entry(seq, at.timestamp(), event, kid, actor) for seq, at, event, kid, actor in self._rows(_LEDGER, after))

    def messages(self) -> list[dict[str, Any]]:
        """Everything in the Slack inbox, oldest first."""
        return list(self._ask("GET", f"{self._facts['slack_url']}/messages"))

    def audit(self, environment: Mapping[str, str]) -> Audit:
        """What `keyrotation audit` says of the ledger: the product's own command, in a process of its own."""
        command = [str(Path(sys.executable).with_name("keyrotation")), "audit", self._facts["environment"], "--format", "json"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, env=dict(environment), timeout=_COMMAND_WITHIN, check=False)
        except (OSError, subprocess.TimeoutExpired) as failed:
            return Audit(False, 0, str(failed))
        return read_audit(done.returncode, done.stdout, done.stderr)

    def _rows(self, statement: str, *values: object) -> Sequence[tuple[Any, ...]]:
        try:
            with closing(psycopg2.connect(self._facts["database_url"], connect_timeout=_TIMEOUT)) as connection, connection.cursor() as cursor:
                connection.set_session(readonly=True)
                cursor.execute(statement, values)
                return cursor.fetchall()
        except psycopg2.Error as failed:
            raise SandboxError(f"the database did not answer: {failed}") from None

    def _ask(self, method: str, url: str, body: Mapping[str, Any] | None = None) -> Any:
        try:
            answer = self._session.request(method, url, json=body, timeout=_TIMEOUT)
            answer.raise_for_status()
            return answer.json()
        except (requests.RequestException, json.JSONDecodeError) as failed:
            raise SandboxError(f"{method} {url} did not work: {failed}") from None


def read_audit(status: int, printed: str, complained: str) -> Audit:
    """The answer of `keyrotation audit … --format json`; whole only if it ended with 0 as well."""
    try:
        answer = json.loads(printed)
        problem = "; ".join(map(str, answer["problems"]))
        return Audit(status == 0 and answer["whole"] is True, int(answer["entries"]), problem)
    except (ValueError, KeyError, TypeError):
        said = (complained + printed).strip().splitlines()
        return Audit(False, 0, said[-1] if said else f"it said nothing and ended with {status}")


def _step(found: Mapping[str, Any]) -> Step:
    state = found["state"] or {"type": "PENDING", "message": None}
    # A task run is called after its step only once it runs; until then it has a suffix.
    name = found["name"].rpartition("-")[0] or found["name"] if state["type"] == "PENDING" else found["name"]
    return Step(found["id"], name, state["type"], state["message"] or "", _instant(found["start_time"]), _instant(found["end_time"]))


def _instant(text: str | None) -> float | None:
    return None if text is None else datetime.fromisoformat(text).timestamp()
