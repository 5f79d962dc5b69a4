"""Prefect's API, as an outsider uses it."""

from __future__ import annotations

import time
from typing import Any

import requests


class PrefectApi:
    """Deployments and runs by plain HTTP."""

    def __init__(self, url: str) -> None:
        self._url = url

    def post(self, path: str, body: Any) -> Any:
        return requests.post(self._url + path, json=body, timeout=15).json()

    def get(self, path: str) -> Any:
        return requests.get(self._url + path, timeout=15).json()

    def start(self, deployment: str, **parameters: Any) -> str:
        """The id of a new run of that deployment."""
        found = self.get(f"/deployments/name/{deployment}")
        return str(self.post(f"/deployments/{found['id']}/create_flow_run", {"parameters": {**found["parameters"], **parameters}})["id"])

    def ended(self, run_id: str, within: float = 180) -> dict[str, Any]:
        """The run's final state."""
        for _ in range(int(within / 0.25)):
            state: dict[str, Any] = self.get(f"/flow_runs/{run_id}")["state"]
            if state["type"] in ("COMPLETED", "FAILED", "CRASHED", "CANCELLED"):
                return state
            time.sleep(0.25)
        raise AssertionError(f"run {run_id} did not end within {within} s")

    def run(self, deployment: str, **parameters: Any) -> dict[str, Any]:
        return self.ended(self.start(deployment, **parameters))
