"""prefect.yaml against a real server: deployed, deployed again, and scheduled."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml

from tests.flows.conftest import Stage

pytestmark = [pytest.mark.world, pytest.mark.xdist_group("flows")]
ROOT = Path(__file__).parents[2]
DECLARED = yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]


def test_each_flow_is_declared_for_each_environment_with_its_own_schedule() -> None:
    """Development monthly, staging every two weeks, production weekly; a time zone named; due by age; the sweep daily; no concurrency limit anywhere."""
    seen = {(entry["entrypoint"].split("/")[1].split(".")[0], entry["name"]): entry for entry in DECLARED}
    assert set(seen) == {(flow, name) for flow in ("rotate", "cleanup", "bootstrap") for name in ("development", "staging", "production")}
    rotations = {name: seen["rotate", name]["schedules"][0] for name in ("development", "staging", "production")}
    assert rotations["development"]["cron"] == "0 3 1 * *"
    assert rotations["staging"]["rrule"] == "DTSTART:20260105T030000\nRRULE:FREQ=WEEKLY;INTERVAL=2;BYDAY=MO"
    assert rotations["production"]["cron"] == "0 3 * * 2"
    for schedule in rotations.values():
        assert schedule["timezone"] == "Etc/UTC"
        assert schedule["parameters"] == {"only_if_due": True}
    for entry in DECLARED:
        assert "concurrency_limit" not in entry
        assert entry["parameters"] == {"environment": entry["name"]}
        assert entry["work_pool"] == {"name": f"keyrotation-{entry['name']}"}
        assert len(entry["description"]) > 60
        assert entry["name"] in entry["tags"]


def deploy(stage: Stage) -> None:
    environment = {
        **os.environ,
        "PREFECT_API_URL": stage.facts["prefect_api_url"],
        "KEYROTATION_HOME": str(ROOT),
        "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "false",
    }
    done = subprocess.run(
        [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_deploy_all_works_on_a_fresh_server_and_twice_and_makes_scheduled_runs(stage: Stage) -> None:
    """Nine deployments, once each; the server makes the scheduled runs by itself (a wrong SQLAlchemy silently would not)."""
    deploy(stage)
    first = deployed(stage)
    deploy(stage)
    assert deployed(stage) == first
    assert len(first) == 9
    assert scheduled(stage, "production")["parameters"] == {"environment": "production", "only_if_due": True}


def deployed(stage: Stage) -> dict[str, str]:
    """Id by flow and name, of those that prefect.yaml declares."""
    api = stage.facts["prefect_api_url"]
    flows = {flow["id"]: flow["name"] for flow in requests.post(f"{api}/flows/filter", json={}, timeout=10).json()}
    every: list[dict[str, Any]] = requests.post(f"{api}/deployments/filter", json={}, timeout=10).json()
    return {f"{flows[entry['flow_id']]}/{entry['name']}": entry["id"] for entry in every if entry["name"] != "sandbox"}


def scheduled(stage: Stage, name: str) -> dict[str, Any]:
    """A run that the server's own scheduler made for the rotation of that environment."""
    wanted = {"deployments": {"id": {"any_": [deployed(stage)[f"rotate-signing-keys/{name}"]]}}}
    for _ in range(60):
        runs: list[dict[str, Any]] = requests.post(f"{stage.facts['prefect_api_url']}/flow_runs/filter", json=wanted, timeout=10).json()
        if runs:
            return runs[0]
        time.sleep(1)
    raise AssertionError("the server makes no scheduled runs")
