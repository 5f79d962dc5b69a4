"""Prefect's API, as far as one who looks needs it: does it answer, is a deployment there, does a work pool have a worker.

Plain HTTP, so that neither the shell nor the doctor has to import Prefect, which takes seconds. Credentials are those of Prefect's own client.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Mapping
from typing import Any

from keyrotation.connections.http import exchange, place
from keyrotation.domain.errors import BadAnswer, Denied, Unreachable


class PrefectApi:
    """One server's API; `api_url` ends in /api."""

    def __init__(self, api_url: str) -> None:
        self._url = api_url.rstrip("/")

    def check(self) -> str:
        """That it answers, is Prefect, and lets us in."""
        for path in ("/health", "/admin/version"):  # the second one asks for credentials, where there are any
            if self._ask(path) is None:
                raise BadAnswer(f"{place(self._url)} is not Prefect's API: check prefect.api_url, which ends in /api")
        return f"{place(self._url)} answers"

    def deployment(self, flow: str, name: str) -> Mapping[str, Any] | None:
        """The deployment flow/name; None where there is none."""
        return self._ask(f"/deployments/name/{flow}/{name}")

    def work_pool(self, name: str) -> Mapping[str, Any] | None:
        """The work pool of that name; None where there is none."""
        return self._ask(f"/work_pools/{name}")

    def _ask(self, path: str) -> Mapping[str, Any] | None:
        """The answer's object, empty where it is another value; None for 404."""
        answer = exchange("GET", f"{self._url}{path}", headers={"Accept": "application/json", **_credentials()})
        if answer.status == 404:
            return None
        if answer.status in (401, 403):
            raise Denied(f"{place(self._url)} does not let us in (HTTP {answer.status}): set PREFECT_API_AUTH_STRING or PREFECT_API_KEY")
        if answer.status != 200:
            raise Unreachable(f"{place(self._url)} answers HTTP {answer.status}: see the Prefect server's log")
        try:
            value = json.loads(answer.body)
        except ValueError:
            raise BadAnswer(f"{place(self._url)} is not Prefect's API: check prefect.api_url, which ends in /api") from None
        return value if isinstance(value, dict) else {}


def _credentials() -> dict[str, str]:
    if basic := os.environ.get("PREFECT_API_AUTH_STRING"):
        return {"Authorization": f"Basic {base64.b64encode(basic.encode()).decode()}"}
    if key := os.environ.get("PREFECT_API_KEY"):
        return {"Authorization": f"Bearer {key}"}
    return {}
