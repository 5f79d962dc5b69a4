"""The cleanup as a flow, and the initial key: on the whole world."""

from __future__ import annotations

import pytest

from tests.flows.conftest import Stage

pytestmark = [pytest.mark.world, pytest.mark.xdist_group("flows")]


def rotate(stage: Stage) -> None:
    """A rotation that schedules no cleanup: else the world's own worker would be as quick as the test."""
    stage.set("cleanup", '"manual"')
    assert stage.rotate().is_completed()
    stage.settings(lambda text: text)


def wait_until_due(stage: Stage) -> None:
    until = stage.ring.previous[-1].retain_until
    assert until is not None
    while stage.env.keys.look().now <= until:
        stage.env.pause(0.2)


def test_i07_an_old_key_goes_when_its_time_has_come_and_not_before(stage: Stage) -> None:
    """Too early: left, with the sum. Due: out of the JWKS, private half erased, recorded once."""
    rotate(stage)
    old = stage.ring.previous[-1]
    early = stage.clean_up()
    assert early.is_completed() and "not cleaned up before" in early.message
    wait_until_due(stage)
    before = stage.head()
    assert "disabled" in stage.clean_up().message
    assert old.kid not in stage.env.identity.published().jwks.kids
    assert stage.sql("SELECT private_key_ciphertext, enabled FROM public.signing_keys WHERE kid = %s", old.kid) == [(None, False)]
    assert [(entry.event, entry.kid) for entry in stage.ledger(before) if entry.new_status] == [("disabled", old.kid)]
    assert "nothing to do" in stage.clean_up(kid=old.kid).message


def test_manual_cleanup_waits_for_a_person(stage: Stage) -> None:
    """cleanup = manual: no run is scheduled, the sweep says what waits, a person who names the key gets it done."""
    stage.set("cleanup", '"manual"')
    before = stage.head()
    assert stage.rotate().is_completed()
    assert all("cleanup_flow_run_id" not in entry.evidence for entry in stage.ledger(before))
    wait_until_due(stage)
    old = stage.ring.previous[-1]
    assert "waits for a person" in stage.clean_up().message
    assert "disabled" in stage.clean_up(kid=old.kid).message


def test_f53_a_cleanup_made_for_another_demotion_does_nothing(stage: Stage) -> None:
    """Scheduled for a demotion that was undone since: the key has a cleanup of its own."""
    rotate(stage)
    old = stage.ring.previous[-1]
    wait_until_due(stage)
    assert old.demoted_at is not None
    state = stage.clean_up(kid=old.kid, demoted_at=old.demoted_at.replace(year=2020))
    assert "demoted again" in state.message
    assert stage.ring.find(old.kid).published


def test_f52_after_a_roll_back_the_delayed_cleanup_leaves_the_current_key_alone(stage: Stage) -> None:
    """The cleanup was scheduled, then the key was promoted again: nothing is disabled."""
    current = stage.ring.current
    assert current is not None
    state = stage.clean_up(kid=current.kid)
    assert state.is_completed() and "is current" in state.message
    assert stage.ring.current == current


def test_f54_a_token_that_lives_longer_than_configured_stops_the_cleanup(stage: Stage) -> None:
    """The settings say 2 s, real tokens live 6 s: the key is kept, with the reason."""
    rotate(stage)
    wait_until_due(stage)
    stage.set("token_lifetime", '"2s"')
    state = stage.clean_up()
    assert "lives 6s" in state.message, state.message
    assert len(stage.ring.previous) == 1


def test_bootstrap_where_there_is_a_key_does_nothing(stage: Stage) -> None:
    """COMPLETED, with the reason."""
    before = stage.head()
    state = stage.bootstrap()
    assert state.is_completed() and "nothing to do" in state.message
    assert stage.head() == before


def test_an_unknown_kid_is_refused_with_the_ones_there_are(stage: Stage) -> None:
    """FAILED, the valid kids listed, nothing changed."""
    state = stage.clean_up(kid="no-such-key")
    assert state.is_failed() and stage.ring.current is not None and stage.ring.current.kid in state.message
