"""The rotation as a flow, on the whole world: what it does, what it refuses, and how it ends."""

from __future__ import annotations

import json
import urllib.request
from datetime import timedelta
from typing import Any

import pytest
import requests

from keyrotation.domain.decision import Request
from keyrotation.domain.ledger import broken_links
from tests.flows.conftest import Stage

pytestmark = [pytest.mark.world, pytest.mark.xdist_group("flows")]


def prefect_api(stage: Stage, path: str, body: Any = None) -> Any:
    url = stage.facts["prefect_api_url"] + path
    return (requests.post(url, json=body, timeout=10) if body is not None else requests.get(url, timeout=10)).json()


def test_a_rotation_publishes_waits_promotes_proves_and_schedules_the_cleanup(stage: Stage) -> None:
    """One run: one new key, one promotion, one ledger entry per change, one cleanup scheduled, said in one Slack thread."""
    old, before = stage.ring.current, stage.head()
    state = stage.rotate()
    assert state.is_completed(), state.message
    ring = stage.ring
    assert ring.current is not None and old is not None
    assert ring.current.kid != old.kid
    assert [key.kid for key in ring.previous] == [old.kid]
    changes = [(entry.event, entry.kid, entry.old_status, entry.new_status) for entry in stage.ledger(before) if entry.new_status]
    assert changes == [
        ("generated", ring.current.kid, None, "next"),
        ("demoted", old.kid, "current", "previous"),
        ("promoted", ring.current.kid, "next", "current"),
    ]
    assert broken_links(stage.ledger()) == []
    scheduled = [json.loads(entry.evidence)["cleanup_flow_run_id"] for entry in stage.ledger(before) if entry.event == "schedule cleanup"]
    run = prefect_api(stage, f"/flow_runs/{scheduled[0]}")
    assert run["parameters"]["kid"] == old.kid
    said = [message for message in requests.get(f"{stage.facts['slack_url']}/messages", timeout=5).json()][-2:]
    assert said[1]["thread_ts"] == said[0]["ts"]


def test_i06_no_key_is_promoted_before_every_gateway_had_its_time_and_was_shown_to_know_it(stage: Stage) -> None:
    """Between what was seen to be published and the promotion lies the whole sum, and every gateway's accepted canary."""
    assert stage.rotate().is_completed()
    current = stage.ring.current
    assert current is not None and current.published_seen_at is not None and current.promoted_at is not None and current.accepted_at is not None
    assert current.promoted_at - current.published_seen_at >= timedelta(seconds=3)  # cache_time 2s + clock_skew 1s
    assert current.published_seen_at < current.accepted_at < current.promoted_at


def test_dry_run_changes_nothing(stage: Stage) -> None:
    """A dry run shows the plan, writes no ledger entry and touches no key."""
    before, ring = stage.head(), stage.ring
    state = stage.rotate(dry_run=True)
    assert state.is_completed() and "nothing was changed" in state.message
    assert (stage.head(), stage.ring) == (before, ring)


def test_i21_a_scheduled_run_on_a_fresh_key_does_nothing(stage: Stage) -> None:
    """Not due is COMPLETED, with the reason."""
    before = stage.head()
    state = stage.rotate(only_if_due=True)
    assert state.is_completed() and "not due" in state.message
    assert stage.head() == before


def test_a_hold_is_success_for_the_schedule_and_failure_for_a_person(stage: Stage) -> None:
    """On hold, nothing changes; the schedule did its duty, a person did not get what was asked for."""
    stage.env.keys.hold("release freeze", "shell: tester")
    before = stage.head()
    scheduled, person = stage.rotate(only_if_due=True), stage.rotate()
    assert scheduled.is_completed() and "release freeze" in scheduled.message
    assert person.is_failed() and "keyrotation release" in person.message
    assert stage.head() == before


def test_i09_a_dead_run_is_finished_by_the_next_one_with_one_key_and_one_promotion(stage: Stage) -> None:
    """A run that died after it had published its key: the next one promotes that key and makes no other."""
    from keyrotation.steps.generate import generate
    from keyrotation.steps.rotations import open_rotation

    dead = open_rotation(stage.env, Request("a run that dies")).rotation
    assert dead is not None
    published = generate(stage.env, dead)
    before = stage.head()
    state = stage.rotate()  # waits until the lease is over, then takes over
    assert state.is_completed(), state.message
    assert stage.ring.current is not None and stage.ring.current.kid == published.kid
    assert [entry.event for entry in stage.ledger(before) if entry.new_status] == ["demoted", "promoted"]
    assert "taken over" in [entry.event for entry in stage.ledger(before)]


def test_i22_a_superseded_run_ends_as_cancelled_and_changes_nothing_more(stage: Stage) -> None:
    """Somebody takes over during the wait: the run ends by itself, as cancelled, and names its successor."""
    old = stage.ring.current
    running = stage.in_background(lambda: stage.rotate())
    work = stage.until(lambda: (work := stage.env.keys.look().open_rotation) and work.new_kid and work)
    stage.sql("UPDATE key_rotation.rotations SET epoch = epoch + 1, actor = 'the successor', lease_until = now() + '1 minute' WHERE id = %s", work.id)
    state = running()
    assert state.is_cancelled() and "the successor" in state.message
    assert stage.ring.current == old


def test_a_person_who_finds_live_work_waits_and_is_told_its_outcome(stage: Stage) -> None:
    """Two people click at once: one promotion, both are told the same outcome. A schedule's run leaves at once."""
    first = stage.in_background(lambda: stage.rotate())
    before = stage.until(lambda: stage.env.keys.look().open_rotation)
    scheduled, second = stage.rotate(only_if_due=True), stage.rotate()
    assert scheduled.is_completed() and "under way" in scheduled.message
    assert first().message == second.message
    promoted = stage.sql("SELECT count(*) FROM key_rotation.ledger WHERE event = 'promoted' AND rotation_id >= %s", before.id)
    assert promoted == [(1,)]


def test_i13_a_key_that_does_not_verify_is_rolled_back(stage: Stage) -> None:
    """The identity service signs wrongly after the promotion: the old key signs again, the new one is never promoted again."""
    old = stage.ring.current
    running = stage.in_background(lambda: stage.rotate())
    stage.until(lambda: stage.ring.next and stage.ring.next.accepted_at)
    stage.fault("identity", {"token": {"sign_wrong": True, "times": 12}})
    state = running()
    ring = stage.ring
    assert state.is_failed() and "rolled back" in state.message, state.message
    assert ring.current is not None and old is not None and ring.current.kid == old.kid
    failed = [key for key in ring.previous if key.never_promote]
    assert len(failed) == 1 and failed[0].retain_until is not None
    assert any("rolled back" in message for message in stage.messages()[-2:])


def test_i13_what_cannot_be_shown_after_the_promotion_holds_the_cleanup_and_pages(stage: Stage) -> None:
    """The token endpoint goes down after the promotion: no roll back, the old key is kept until a person releases it."""
    from keyrotation.steps import verify

    running = stage.in_background(lambda: stage.rotate())
    stage.until(lambda: stage.ring.next and stage.ring.next.accepted_at)
    stage.fault("identity", {"token": {"status": 503}})
    state = running()
    assert state.is_failed() and "503" in state.message, (state.message, verify.PATIENCE)
    held = stage.ring.previous[-1]
    assert held.cleanup_hold is not None
    assert "on hold" in stage.clean_up(kid=held.kid).message or "503" in stage.clean_up(kid=held.kid).message
    stage.fault("identity", {})
    stage.env.keys.release("shell: tester")
    assert stage.ring.previous[-1].cleanup_hold is None


def test_f30_a_gateway_that_never_refreshes_is_pushed_before_the_run_gives_up(stage: Stage) -> None:
    """A gateway caches for an hour: the ladder's push makes it forget, and the rotation is proven."""
    freeze(stage, 0, seconds=3600)
    try:
        state = stage.rotate()
    finally:
        freeze(stage, 0, seconds=2)
    assert state.is_completed(), state.message
    waited = [json.loads(entry.evidence) for entry in stage.ledger() if entry.event == "wait for gateway cache"][-1]
    assert any("flush" in told or "push" in told for told in waited["refreshed"]), waited


def test_f30_a_gateway_that_cannot_be_refreshed_stops_the_rotation_before_the_promotion(stage: Stage) -> None:
    """No rung helps: the run fails and names the gateway; the current key is as it was, the next run uses the same key."""
    stage.set("refresh", "[]")
    freeze(stage, 0, seconds=3600)
    old = stage.ring.current
    try:
        state = stage.rotate()
    finally:
        freeze(stage, 0, seconds=2)
    assert state.is_failed() and stage.facts["gateways"][0]["url"] in state.message
    assert stage.ring.current == old
    left = stage.ring.next
    assert left is not None
    assert stage.rotate().is_completed()
    assert stage.ring.current is not None and stage.ring.current.kid == left.kid


def freeze(stage: Stage, index: int, seconds: int) -> None:
    """Gives a gateway another cache time, by its own control plane's file, and lets it fetch once."""
    ecds = stage.world.home / "gateways" / f"gateway-{index + 1}" / "jwt_authn.json"
    document = json.loads(ecds.read_text())
    remote = document["resources"][0]["typed_config"]["providers"]["identity"]["remote_jwks"]
    remote["cache_duration"] = f"{seconds}s"
    remote["http_uri"]["uri"] = remote["http_uri"]["uri"].split("?")[0] + f"?freeze={seconds}"
    written = ecds.with_suffix(".new")
    written.write_text(json.dumps(document))
    written.rename(ecds)
    url, token = stage.facts["gateways"][index]["url"], stage.env.identity.fresh_token().raw
    seen = [urllib.request.urlopen(urllib.request.Request(url, headers={"Authorization": f"Bearer {token}", "Connection": "close"})).status for _ in range(30)]
    assert set(seen) == {200}


def test_keep_standby_leaves_a_key_published_ahead(stage: Stage) -> None:
    """With keep_standby the rotation ends by publishing the next key, in a rotation of its own, and the following one passes the first wait at once."""
    stage.set("keep_standby", "true")
    assert stage.rotate().is_completed()
    standby = stage.ring.next
    assert standby is not None
    assert stage.sql("SELECT kind FROM key_rotation.rotations WHERE id = %s", standby.rotation_id) == [("standby",)]
    stage.env.pause(3.2)  # the standby's own sum
    assert stage.rotate().is_completed()
    opened = stage.sql("SELECT opened_at FROM key_rotation.rotations WHERE kind = 'rotation' ORDER BY id DESC LIMIT 1")[0][0]
    assert standby.published_seen_at is not None and standby.published_seen_at + timedelta(seconds=3) < opened  # its wait was over before the run began
    assert stage.ring.current is not None and stage.ring.current.kid == standby.kid


def test_f12_f13_a_kms_that_refuses_stops_the_rotation_before_any_key_is_made(stage: Stage) -> None:
    """PERMISSION_DENIED: no retry, one sentence that names the role, nothing published."""
    ring = stage.ring
    stage.fault("kms", {"Encrypt": {"error": "PERMISSION_DENIED"}})
    state = stage.rotate()
    assert state.is_failed() and "cryptoKeyEncrypter" in state.message
    assert stage.ring == ring


@pytest.mark.parametrize(
    ("fault", "word"),
    [
        ({"jwks": {"jwks": {"keys": []}}}, "empty"),
        ({"jwks": {"body": "<html>hello</html>"}}, "JWKS"),
        ({"jwks": {"redirect": "http://127.0.0.1:1/"}}, "redirect"),
        ({"token": {"status": 401}}, "client"),
        ({"*": {"clock_offset": 3600}}, "clocks"),
    ],
)
def test_a_world_that_is_not_fit_refuses_the_rotation_with_one_sentence(stage: Stage, fault: dict[str, Any], word: str) -> None:
    """Empty JWKS, HTML, a redirect, 401 of the token endpoint, a clock an hour ahead: failed with a sentence, nothing changed, nothing lost."""
    before, ring = stage.head(), stage.ring
    stage.fault("identity", fault)
    state = stage.rotate()
    assert state.is_failed() and word in state.message, state.message
    assert (stage.head(), stage.ring) == (before, ring)


def test_i14_without_slack_the_keys_end_in_the_same_state_and_the_message_is_in_the_ledger(stage: Stage) -> None:
    """Slack answers 500 for ever: the rotation is done, what could not be said is kept."""
    requests.post(f"{stage.facts['slack_url']}/_faults", json={"status": 500}, timeout=5)
    before = stage.head()
    assert stage.rotate().is_completed()
    assert [entry.event for entry in stage.ledger(before)].count("announcement missed") == 2


def test_a_wrong_environment_or_setting_is_one_sentence_and_a_failed_run(stage: Stage) -> None:
    """A setting without a unit, an unknown environment: the run fails with what to do, and no exception is stored."""
    stage.set("cache_time", "10")
    state = stage.rotate()
    assert state.is_failed() and "duration" in state.message and "gateways.cache_time" in state.message
    from flows.rotate import rotate_signing_keys

    unknown = rotate_signing_keys("atlantis", return_state=True)
    assert unknown.is_failed() and "atlantis" in unknown.message
