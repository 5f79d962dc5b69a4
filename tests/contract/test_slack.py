"""Telling people (F56, I14): the real slack-sdk against the sandbox's inbox, and against peers that misbehave."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keyrotation.adapters.slack import LIMIT, SlackAnnouncer, SlackWebhook, escape
from keyrotation.domain.errors import BadAnswer, Denied, SettingsError, Unreachable, WorldError
from keyrotation.ports import Announcer
from keyrotation.secrets import SecretRef

if TYPE_CHECKING:
    from tests.contract.conftest import Peer, Slack

TOKEN, WEBHOOK = "xoxb-token-of-the-tests", "secret-of-the-webhook"
LetsOut = Callable[..., list[str]]


@pytest.fixture
def bot(slack: Slack, secret: Callable[[str], SecretRef]) -> SlackAnnouncer:
    """A bot of the inbox."""
    return SlackAnnouncer(secret(TOKEN), "#keys", slack.base_url)


@pytest.fixture
def webhook(slack: Slack, secret: Callable[[str], SecretRef]) -> SlackWebhook:
    """A webhook of the inbox."""
    return SlackWebhook(secret(slack.webhook))


@pytest.fixture(params=["bot", "webhook"])
def announcer(request: pytest.FixtureRequest) -> Announcer:
    """Either of them."""
    announcer: Announcer = request.getfixturevalue(request.param)
    return announcer


@pytest.fixture(params=["bot", "webhook"])
def announcer_at(request: pytest.FixtureRequest, peer: Peer, secret: Callable[[str], SecretRef]) -> Callable[[float], Announcer]:
    """An announcer that talks to the peer, with that many seconds for a message."""
    if request.param == "bot":
        return lambda total: SlackAnnouncer(secret(TOKEN), "#keys", peer.url, total)
    return lambda total: SlackWebhook(secret(f"{peer.url}/services/{WEBHOOK}"), total)


class TestSaying:
    """A message arrives."""

    def test_a_bot_answers_in_the_thread(self, slack: Slack, bot: SlackAnnouncer) -> None:
        """The first message's ts is the thread of the second."""
        thread = bot.say("rotation 7 has begun")
        bot.say("rotation 7 is done", thread)
        assert [(message["text"], message["thread_ts"]) for message in slack.messages()] == [("rotation 7 has begun", None), ("rotation 7 is done", thread)]

    def test_a_webhook_posts_without_a_thread(self, slack: Slack, webhook: SlackWebhook) -> None:
        """A webhook's message arrives, and gives no thread to answer in."""
        assert webhook.say("rotation 7 has begun") is None
        assert [message["text"] for message in slack.messages()] == ["rotation 7 has begun"]

    def test_a_reason_mentions_nobody(self, slack: Slack, announcer: Announcer) -> None:
        """What a person typed is shown letter by letter."""
        announcer.say("emergency: <!channel> <https://evil.example|click> & <@U1>")
        assert slack.messages()[0]["text"] == "emergency: &lt;!channel&gt; &lt;https://evil.example|click&gt; &amp; &lt;@U1&gt;"

    def test_nothing_is_unfurled(self, peer: Peer, announcer_at: Callable[[float], Announcer]) -> None:
        """Slack is told to fetch no link, and to make none."""
        peer.says({"body": b'{"ok": true, "ts": "1.2"}'})
        announcer_at(5).say("see https://evil.example")
        assert b'"unfurl_links": false' in peer.seen[0].body
        assert b'"unfurl_media": false' in peer.seen[0].body

    def test_a_text_that_is_too_long_is_cut(self, slack: Slack, announcer: Announcer) -> None:
        """Slack would refuse it; what it takes ends with an ellipsis."""
        announcer.say("x" * (LIMIT + 1))
        assert slack.messages()[0]["text"] == "x" * (LIMIT - 1) + "…"

    def test_a_bot_is_checked_without_a_message(self, slack: Slack, bot: SlackAnnouncer) -> None:
        """`check` tells whom the token stands for, and posts nothing."""
        assert bot.check() == "Slack knows the token as keyrotation of Sandbox; messages go to #keys"
        assert slack.messages() == []

    def test_a_webhook_is_checked_without_a_message(self, slack: Slack, webhook: SlackWebhook) -> None:
        """`check` tells that an address is set, not which, and posts nothing."""
        assert WEBHOOK not in webhook.check()
        assert slack.messages() == []


@settings(max_examples=100, deadline=None, database=None)
@given(st.text(alphabet="&<>!@#|;amplt x*", max_size=60), st.integers(0, 5))
def test_escaping_leaves_no_way_out(text: str, over: int) -> None:
    """No text keeps a bare `<`, `>` or `&`, however it is cut; and Slack's own unescaping gives back what was meant."""
    escaped = escape("x" * (LIMIT - over) + text)
    assert len(escaped) <= LIMIT
    assert not re.search(r"[<>]|&(?!(amp|lt|gt);)", escaped)
    shown = escape(text).replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
    assert shown == text


class TestFailing:
    """F56: Slack is away, slow or against us; the error says so, in time, and the next step is the caller's."""

    def test_f56_a_short_limit_is_waited_out(self, slack: Slack, announcer: Announcer) -> None:
        """429 with a Retry-After of one second, then well: the message arrives once."""
        slack.meets(status=429, retry_after=1, times=1)
        announcer.say("rotation 7 has begun")
        assert len(slack.messages()) == 1

    @pytest.mark.parametrize("wait", ["3", "30", "soon", ""])
    def test_f56_a_long_limit_is_not(self, wait: str, peer: Peer, announcer_at: Callable[[float], Announcer]) -> None:
        """429 with a Retry-After beyond our time, or none that can be read: one attempt, and an error that says what is the matter."""
        peer.says({"status": 429, "body": b'{"ok": false, "error": "ratelimited"}', "headers": {"Retry-After": wait}})
        with pytest.raises(Unreachable, match="HTTP 429"):
            announcer_at(5).say("rotation 7 has begun")
        assert len(peer.seen) == 1

    @pytest.mark.parametrize("body", [b'{"ok": false, "error": "internal_error"}', b"<html>", b""])
    def test_f56_a_broken_slack_is_tried_twice(self, body: bytes, peer: Peer, announcer_at: Callable[[float], Announcer]) -> None:
        """500 for ever: two attempts, whatever stands in the body."""
        peer.says({"status": 500, "body": body})
        with pytest.raises(Unreachable, match="failed twice"):
            announcer_at(5).say("rotation 7 has begun")
        assert len(peer.seen) == 2

    def test_f56_a_cut_connection_is_not_repeated(self, peer: Peer, announcer_at: Callable[[float], Announcer]) -> None:
        """The message may have arrived: it is not said twice, and the error leaves it open."""
        peer.says({"cut": True})
        with pytest.raises(Unreachable, match="may not have arrived"):
            announcer_at(5).say("rotation 7 has begun")
        assert len(peer.seen) == 1

    def test_f56_a_short_failure_is_survived(self, slack: Slack, announcer: Announcer) -> None:
        """500 once, then well: the message arrives once."""
        slack.meets(status=500, times=1)
        announcer.say("rotation 7 has begun")
        assert len(slack.messages()) == 1

    def test_f56_a_slack_that_drips_is_left(self, peer: Peer, announcer_at: Callable[[float], Announcer], lets_out: LetsOut) -> None:
        """An answer that never ends, octet by octet, costs no more than a message may cost."""
        peer.says({"drip": True})
        with pytest.raises(Unreachable, match=r"within 0\.3 s") as caught:
            announcer_at(0.3).say("rotation 7 has begun")
        assert lets_out(caught.value, TOKEN, WEBHOOK) == []

    def test_f56_a_slow_slack_is_left(self, slack: Slack, secret: Callable[[str], SecretRef]) -> None:
        """An answer that does not come costs no more than a message may cost."""
        slack.meets(delay=20)
        with pytest.raises(Unreachable):
            SlackAnnouncer(secret(TOKEN), "#keys", slack.base_url, total=0.3).say("rotation 7 has begun")

    def test_f56_nobody_there(self, peer: Peer, announcer_at: Callable[[float], Announcer], lets_out: LetsOut) -> None:
        """A closed port is unreachable, and the error shows neither token nor address."""
        peer.stop()
        with pytest.raises(Unreachable, match="cannot be reached") as caught:
            announcer_at(5).say("rotation 7 has begun")
        assert lets_out(caught.value, TOKEN, WEBHOOK) == []

    def test_f56_a_revoked_token_is_told(self, slack: Slack, secret: Callable[[str], SecretRef], lets_out: LetsOut) -> None:
        """A token that Slack does not know is for a person to mend, also when it is only checked."""
        stranger = SlackAnnouncer(secret("xoxb-revoked"), "#keys", slack.base_url)
        with pytest.raises(Denied, match=r"invalid_auth.*check file:/"):
            stranger.check()
        with pytest.raises(Denied, match=r"invalid_auth.*check file:/") as caught:
            stranger.say("rotation 7 has begun")
        assert lets_out(caught.value, "xoxb-revoked") == []

    def test_f56_a_missing_channel_is_told(self, slack: Slack, secret: Callable[[str], SecretRef]) -> None:
        """A channel that the bot cannot post to is for a person to mend."""
        with pytest.raises(Denied, match=r"channel_not_found.*#nowhere exists"):
            SlackAnnouncer(secret(TOKEN), "#nowhere", slack.base_url).say("rotation 7 has begun")

    def test_f56_a_removed_webhook_is_told(self, peer: Peer, secret: Callable[[str], SecretRef], lets_out: LetsOut) -> None:
        """404 with Slack's word: the error says to make a new one, and does not show the old one."""
        peer.says({"status": 404, "body": b"no_service"})
        with pytest.raises(Denied, match=r"no_service.*make a new incoming webhook") as caught:
            SlackWebhook(secret(f"{peer.url}/services/{WEBHOOK}")).say("rotation 7 has begun")
        assert lets_out(caught.value, WEBHOOK) == []

    def test_f56_any_other_refusal_is_told(self, slack: Slack, bot: SlackAnnouncer) -> None:
        """Slack's word for it is passed on, once."""
        slack.meets(error="fatal_error")
        with pytest.raises(WorldError, match="fatal_error"):
            bot.say("rotation 7 has begun")

    @pytest.mark.parametrize("body", [b"<html>please log in</html>", b"[1]", b'{"ok": true}', b'{"ok": false, "error": "Bearer xoxb-leak"}', b"\xff"])
    def test_f56_an_answer_that_is_none(self, body: bytes, peer: Peer, secret: Callable[[str], SecretRef]) -> None:
        """A page in front of Slack, or nonsense, is an error that quotes nothing of it."""
        peer.says({"body": body})
        with pytest.raises(WorldError) as caught:
            SlackAnnouncer(secret(TOKEN), "#keys", peer.url).say("rotation 7 has begun")
        assert "xoxb" not in str(caught.value)
        assert "html" not in str(caught.value)
        assert not isinstance(caught.value, Unreachable)

    def test_a_message_without_a_ts_is_told(self, peer: Peer, secret: Callable[[str], SecretRef]) -> None:
        """Without the message's name there is no thread: better said than guessed."""
        peer.says({"body": b'{"ok": true}'})
        with pytest.raises(BadAnswer, match="begins a new thread"):
            SlackAnnouncer(secret(TOKEN), "#keys", peer.url).say("rotation 7 has begun")

    @pytest.mark.parametrize("address", ["hooks.slack.com/services/T/B/x", "http://hooks.slack.com/services/T/B/x", "file:///etc/passwd"])
    def test_an_address_of_no_use_is_not_shown(self, address: str, secret: Callable[[str], SecretRef], lets_out: LetsOut) -> None:
        """A webhook's address goes over TLS; one that does not is refused without being quoted."""
        with pytest.raises(SettingsError, match="begins with https") as caught:
            SlackWebhook(secret(address)).say("rotation 7 has begun")
        assert lets_out(caught.value, address) == []

    def test_i05_nothing_is_logged(self, announcer: Announcer, lets_out: LetsOut) -> None:
        """slack-sdk would log a webhook's address at DEBUG; ours lets it not."""
        announcer.say("rotation 7 has begun")
        assert lets_out(Exception(), TOKEN, WEBHOOK) == []


def test_a_slow_retry_still_ends(peer: Peer, announcer_at: Callable[[float], Any]) -> None:
    """500, then silence: the second attempt has only what is left of the time."""
    peer.says({"status": 500}, {"drip": True})
    with pytest.raises(Unreachable, match=r"within 1\.5 s"):
        announcer_at(1.5).say("rotation 7 has begun")
    assert len(peer.seen) == 2
