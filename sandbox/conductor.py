"""Owns Prefect in the sandbox: the server, the worker, and what is asked of the server's API from outside.

Imports nothing of Prefect: that takes seconds, which its processes spend side by side. Not named `prefect`, so that no
`import prefect` can ever mean this file.
"""

import os
import sys
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import requests

from sandbox.processes import LOOPBACK, Process, SandboxError, listening

CHECKOUT = Path(__file__).resolve().parent.parent
POOL = "sandbox"
WORKER = "sandbox"

_SERVER_WITHIN = 90.0  # migrations on a loaded machine
_RUN_WITHIN = 180.0
_ASK_EVERY = 0.2
_FINAL = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}

# Nothing leaves the machine, nothing starts a server by itself; the V2 UI calls an outside host even without analytics.
_QUIET = {
    "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "false",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_UI_V2_ENABLED": "false",
    "DO_NOT_TRACK": "1",
    # Nobody here uses the catalogue of block types, and it costs 3 s at the first start; a block that Python saves
    # registers its own type.
    "PREFECT_SERVER_REGISTER_BLOCKS_ON_START": "false",
}
_FAST = {
    "PREFECT_WORKER_QUERY_SECONDS": "1",
    "PREFECT_CLIENT_SERVER_VERSION_CHECK_ENABLED": "false",
    "PREFECT_CLIENT_CSRF_SUPPORT_ENABLED": "false",
}


class Conductor:
    """Prefect's server on PostgreSQL, and a worker that starts flow runs from this checkout."""

    def __init__(self, home: Path, port: int, database_url: str, environments: Path) -> None:
        self._url = f"http://{LOOPBACK}:{port}"
        self._session = loopback_session()
        # Prefect's runner leaves a folder in the temporary one.
        temporary = home.resolve() / "tmp"
        temporary.mkdir(parents=True, exist_ok=True)
        own = clean_environment() | _QUIET | {"PREFECT_HOME": str(home.resolve() / "prefect"), "TMPDIR": str(temporary)}
        self.server = Process(
            "prefect-server",
            # What `prefect server start --background` runs, without the 5 s that its command line takes to import.
            [
                *(sys.executable, "-m", "uvicorn", "--factory", "prefect.server.api.server:create_app"),
                *(
                    "--host",
                    LOOPBACK,
                    "--port",
                    str(port),
                    "--timeout-graceful-shutdown",
                    "1",
                    "--log-level",
                    "warning",
                ),
            ],
            home=home,
            env=own | self._server_settings(home, database_url),
            ready=lambda: listening(port),  # uvicorn listens once the application has started
            ready_within=_SERVER_WITHIN,
            stop_within=3,  # its truth is in PostgreSQL; while it starts, it heeds no signal
        )
        self.worker = _Worker(home, own | _FAST | self._run_settings(environments), self.api_url)

    @property
    def api_url(self) -> str:
        return f"{self._url}/api"

    @property
    def ui_url(self) -> str:
        return self._url

    def run(self, flow: str) -> None:
        """Runs the deployment of a flow and waits for its end: COMPLETED, else it is an error, with the log."""
        deployment = self._session.get(f"{self.api_url}/deployments/name/{flow}/{POOL}", timeout=10)
        if deployment.status_code == requests.codes.not_found:
            raise SandboxError(f"there is no deployment {flow}/{POOL}: is its flow in flows/? (--no-bootstrap does without)")
        run = self._ask("POST", f"/deployments/{deployment.json()['id']}/create_flow_run", {"state": {"type": "SCHEDULED"}})
        deadline = time.monotonic() + _RUN_WITHIN
        while run["state"]["type"] not in _FINAL:
            if time.monotonic() > deadline:
                raise SandboxError(f"the run of {flow} is still {run['state']['name']} after {_RUN_WITHIN:g} s")
            time.sleep(_ASK_EVERY)
            run = self._ask("GET", f"/flow_runs/{run['id']}")
        if run["state"]["type"] != "COMPLETED":
            # The worker's own log, because Prefect's has not got the last lines yet.
            ended = f"the run of {flow} ended {run['state']['name']}: {run['state']['message']}"
            raise SandboxError(f"{ended}\n{self.worker.last_words()}")

    def _ask(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        answer = self._session.request(method, f"{self.api_url}{path}", json=body, timeout=10)
        answer.raise_for_status()
        return answer.json()

    def _server_settings(self, home: Path, database_url: str) -> dict[str, str]:
        return {
            "PREFECT_SERVER_DATABASE_CONNECTION_URL": database_url.replace("postgresql:", "postgresql+asyncpg:", 1),
            "PREFECT_SERVER_UI_API_URL": self.api_url,
            # Prefect copies its pages there when it starts; by default into the package, where a user may not write.
            "PREFECT_SERVER_UI_STATIC_DIRECTORY": str(home.resolve() / "prefect" / "ui"),
            "PREFECT_SERVER_LOGGING_LEVEL": "WARNING",
        }

    def _run_settings(self, environments: Path) -> dict[str, str]:
        # The worker hands its environment down to every flow run.
        return {
            "PREFECT_API_URL": self.api_url,
            "KEYROTATION_ENVIRONMENTS": str(environments.resolve()),
            "PYTHONPATH": str(CHECKOUT),
        }


class _Worker(Process):
    """The worker's process, ready once the server has heard of it."""

    def __init__(self, home: Path, env: Mapping[str, str], api_url: str) -> None:
        self._workers_url = f"{api_url}/work_pools/{POOL}/workers/filter"
        self._session, self._started_at = loopback_session(), datetime.now(UTC)
        super().__init__(
            "prefect-worker",
            [sys.executable, "-m", "sandbox.worker"],
            home=home,
            env=env,
            cwd=CHECKOUT,
            ready=self._is_heard_of,
            ready_within=_SERVER_WITHIN + 30,
        )

    def start(self) -> None:
        self._started_at = datetime.now(UTC)
        super().start()

    def _is_heard_of(self) -> bool:
        # A worker before this one is listed under the same name: only a sign of life since the start counts.
        time.sleep(_ASK_EVERY)
        try:
            answer = self._session.post(self._workers_url, json={}, timeout=10)
        except requests.RequestException:
            return False
        heartbeats = [worker["last_heartbeat_time"] for worker in answer.json()] if answer.ok else []
        return any(datetime.fromisoformat(heartbeat) > self._started_at for heartbeat in heartbeats)


def loopback_session() -> requests.Session:
    """A session that no proxy of the host's environment comes between."""
    session = requests.Session()
    session.trust_env = False
    return session


def clean_environment() -> dict[str, str]:
    """The caller's environment without what would point Prefect at another server, or loopback at a proxy."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    return kept | {"NO_PROXY": LOOPBACK, "no_proxy": LOOPBACK}


def wait_for_server() -> None:
    """Returns when the server of PREFECT_API_URL listens: for processes that start beside it."""
    port, deadline = urlsplit(os.environ["PREFECT_API_URL"]).port or 80, time.monotonic() + _SERVER_WITHIN
    while not listening(port):
        if time.monotonic() > deadline:
            raise SandboxError(f"Prefect's server did not listen on port {port} within {_SERVER_WITHIN:g} s")
        time.sleep(_ASK_EVERY)
