"""Rotations in a row under live traffic, with both authorities: what a year of a service looks like, in minutes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import psycopg2
import pytest
import requests

from sandbox.processes import born
from sandbox.traffic import Traffic
from sandbox.world import World
from tests.long.prefect_api import PrefectApi

pytestmark = pytest.mark.long
ROTATIONS = 10
# The longest retention that a demoted key needs here: key cache 0s + token lifetime 8s + skew 1s, raised from a cleanup_after of 8s.
SHORT = {"gateways.cache_time": "2s", "policy.token_lifetime": "8s", "policy.cleanup_after": "8s", "policy.lease": "5s"}


@pytest.mark.parametrize("authority", ["database", "api"])
@pytest.mark.parametrize("replicas", [1, 3])
def test_i11_ten_rotations_in_a_row_under_traffic_reject_no_valid_token(tmp_path: Path, authority: str, replicas: int) -> None:
    """0 valid tokens rejected; no more keys published than the retention asks for; one ledger entry per change; not one admin call too many."""
    cache = {"sandbox.identity_replicas": replicas, "identity.key_cache": "1s"} if replicas > 1 else {}
    with World(tmp_path / "home", {**SHORT, **cache, "authority": authority}) as world:
        facts, api = world.facts, PrefectApi(world.facts["prefect_api_url"])
        urls = [gateway["url"] for gateway in facts["gateways"]]
        rotations = ROTATIONS if replicas == 1 else 3
        with Traffic(facts["token_url"], facts["client_id"], facts["client_secret"], urls, home=tmp_path, rate=60, clients=12) as traffic:
            for _ in range(rotations):
                state = api.run("rotate-signing-keys/sandbox")
                assert state["type"] == "COMPLETED", state["message"]
                # A rotation takes longer than half the retention here: of the old keys, two at the most have tokens alive.
                assert len(requests.get(facts["jwks_url"], timeout=5).json()["keys"]) <= 4
            report = traffic.stop()
        assert report.rejected() == 0, report.content["examples"][:5]
        assert report.totals["accepted"] > 300 * rotations
        assert report.totals["errors"] == 0
        changes = every_change(facts["owner_database_url"])
        assert changes["generated"] == changes["promoted"] == rotations + 1
        assert changes["demoted"] == rotations
        audit = subprocess.run(
            [Path(sys.executable).with_name("keyrotation"), "audit", "sandbox"], env=world.environment, capture_output=True, text=True, check=False
        )
        assert audit.returncode == 0, audit.stdout + audit.stderr
        if authority == "api":
            log = (world.home / "logs" / "identity.log").read_text()
            assert len(re.findall(r"POST '/api/v1/admin/keys/rotate'", log)) == rotations + 1
            assert len(re.findall(r"POST '/api/v1/admin/keys/[\w-]+/promote'", log)) == rotations + 1


def every_change(url: str) -> dict[str, int]:
    """How many ledger entries of changes there are, by event; each change must have exactly one."""
    with psycopg2.connect(url) as connection, connection.cursor() as cursor:
        cursor.execute("SELECT kid, event, count(*) FROM key_rotation.ledger WHERE new_status IS NOT NULL GROUP BY kid, event")
        rows = cursor.fetchall()
    assert all(count == 1 for _, _, count in rows), rows
    events: dict[str, int] = {}
    for _, event, _ in rows:
        events[event] = events.get(event, 0) + 1
    return events


def test_the_scheduled_cleanup_survives_a_kill_of_server_and_worker_and_runs_once(tmp_path: Path) -> None:
    """It stands in Prefect as scheduled for its hour; server and worker are killed and started again; at its hour it runs, once."""
    settings = {**SHORT, "policy.cleanup_after": "45s"}
    with World(tmp_path / "home", settings) as world:
        facts, api = world.facts, PrefectApi(world.facts["prefect_api_url"])
        assert api.run("rotate-signing-keys/sandbox")["type"] == "COMPLETED"
        runs = cleanups(api)
        assert [run["state"]["type"] for run in runs] == ["SCHEDULED"]
        killed = [pid for name, pid in facts["pids"].items() if name.startswith("prefect")]
        for pid in killed:
            os.kill(pid, 9)
        while any(born(pid) for pid in killed):
            time.sleep(0.05)
        world.revive()
        assert api.ended(runs[0]["id"], within=240)["type"] == "COMPLETED"
        assert [run["id"] for run in cleanups(api)] == [runs[0]["id"]]
        assert every_change(facts["owner_database_url"])["disabled"] == 1
        assert len(requests.get(facts["jwks_url"], timeout=5).json()["keys"]) == 1


def cleanups(api: PrefectApi) -> list[dict[str, object]]:
    found = api.get("/deployments/name/cleanup-old-keys/sandbox")
    runs: list[dict[str, object]] = api.post("/flow_runs/filter", {"deployments": {"id": {"any_": [found["id"]]}}})
    return json.loads(json.dumps(runs))
