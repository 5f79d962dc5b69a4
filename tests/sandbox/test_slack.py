"""The sandbox's Slack, through the real slack-sdk client and an incoming webhook."""

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from slack_sdk import WebClient
from slack_sdk.errors import SlackApiError
from slack_sdk.http_retry.builtin_handlers import RateLimitErrorRetryHandler, ServerErrorRetryHandler

from sandbox.processes import Process, free_port, listening

TOKEN = "xoxb-sandbox"
CHANNEL = "#key-rotation"
SECTION = [{"type": "section", "text": {"type": "mrkdwn", "text": "*rotated*"}}]


class Slack:
    """The inbox as a process, and a client that talks to it."""

    def __init__(self, home: Path) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        token_file = home / "token"
        token_file.write_text(f"{TOKEN}\n")
        argv = [sys.executable, "-m", "sandbox.slack", "--port", str(self.port), "--token-file", str(token_file)]
        self.process = Process("slack", [*argv, "--channel", CHANNEL], home=home, ready=lambda: listening(self.port))
        self.process.start()

    def client(self, token: str = TOKEN, timeout: int = 5) -> WebClient:
        return WebClient(token, base_url=f"{self.url}/api/", timeout=timeout)

    def messages(self) -> list[dict[str, Any]]:
        messages: list[dict[str, Any]] = requests.get(f"{self.url}/messages", timeout=5).json()
        return messages

    def meet(self, **fault: Any) -> None:
        requests.post(f"{self.url}/_faults", json=fault, timeout=5).raise_for_status()


@pytest.fixture(scope="module")
def inbox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slack]:
    slack = Slack(tmp_path_factory.mktemp("slack"))
    yield slack
    slack.process.stop()


@pytest.fixture
def slack(inbox: Slack) -> Iterator[Slack]:
    yield inbox
    inbox.meet()


def test_the_right_token_is_recognised(slack: Slack) -> None:
    """auth.test says who the token belongs to."""
    assert slack.client().auth_test()["user"] == "keyrotation"


@pytest.mark.parametrize(("token", "error"), [("wrong", "invalid_auth"), ("", "not_authed")])
def test_another_token_is_refused(slack: Slack, token: str, error: str) -> None:
    """A wrong token and none at all have different errors, and nothing is posted."""
    before = slack.messages()
    with pytest.raises(SlackApiError, match=error):
        slack.client(token).chat_postMessage(channel=CHANNEL, text="hello")
    assert slack.messages() == before


def test_a_message_is_kept_as_it_was_posted(slack: Slack) -> None:
    """What was posted is listed with its channel, text, blocks and ts, and without a thread."""
    answer = slack.client().chat_postMessage(channel=CHANNEL, text="rotated", blocks=SECTION)
    expected = {"channel": CHANNEL, "ts": answer["ts"], "thread_ts": None, "text": "rotated", "blocks": SECTION}
    assert slack.messages()[-1] == expected
    assert answer["message"]["text"] == "rotated"
    assert "thread_ts" not in answer["message"]


def test_a_reply_keeps_its_thread(slack: Slack) -> None:
    """thread_ts goes through, and every ts is later than the one before."""
    parent = slack.client().chat_postMessage(channel=CHANNEL, text="begun")["ts"]
    reply = slack.client().chat_postMessage(channel=CHANNEL, text="done", thread_ts=parent)
    assert slack.messages()[-1]["thread_ts"] == reply["message"]["thread_ts"] == parent
    assert float(reply["ts"]) > float(parent)


def test_an_update_replaces_text_and_blocks(slack: Slack) -> None:
    """chat.update alters the message in its place."""
    ts = slack.client().chat_postMessage(channel=CHANNEL, text="waiting", blocks=SECTION)["ts"]
    slack.client().chat_update(channel=CHANNEL, ts=ts, text="promoted")
    [message] = [message for message in slack.messages() if message["ts"] == ts]
    assert (message["text"], message["blocks"]) == ("promoted", [])


def test_an_unknown_message_is_not_updated(slack: Slack) -> None:
    """chat.update of a ts that was never given is an error."""
    with pytest.raises(SlackApiError, match="message_not_found"):
        slack.client().chat_update(channel=CHANNEL, ts="1.000001", text="x")


@pytest.mark.parametrize(
    ("message", "error"),
    [
        ({"channel": "#elsewhere", "text": "x"}, "channel_not_found"),
        ({"channel": CHANNEL}, "no_text"),
        ({"channel": CHANNEL, "text": "x" * 40_001}, "msg_too_long"),
        ({"channel": CHANNEL, "text": "x", "blocks": "{"}, "invalid_blocks_format"),
        ({"channel": CHANNEL, "text": "x", "blocks": [{"type": "divider"}] * 51}, "invalid_blocks"),
        (
            {"channel": CHANNEL, "text": "x", "blocks": [{"type": "section", "text": {"text": "x" * 3001}}]},
            "invalid_blocks",
        ),
    ],
)
def test_what_slack_refuses_is_refused(slack: Slack, message: dict[str, Any], error: str) -> None:
    """The errors and limits are Slack's own."""
    headers = {"Authorization": f"Bearer {TOKEN}"}
    answer = requests.post(f"{slack.url}/api/chat.postMessage", json=message, headers=headers, timeout=5)
    assert (answer.status_code, answer.json()) == (200, {"ok": False, "error": error})


def test_a_form_is_read_like_json(slack: Slack) -> None:
    """Form bodies, with the token inside and blocks as JSON text, are Slack's older way, and work."""
    form = {"token": TOKEN, "channel": CHANNEL, "text": "as a form", "blocks": '[{"type": "divider"}]'}
    assert requests.post(f"{slack.url}/api/chat.postMessage", data=form, timeout=5).json()["ok"]
    assert slack.messages()[-1]["blocks"] == [{"type": "divider"}]


def test_an_unknown_method_is_named(slack: Slack) -> None:
    """A method that the inbox does not know is an error of Slack's kind, not a crash."""
    with pytest.raises(SlackApiError, match="unknown_method"):
        slack.client().api_call("chat.delete")


def test_a_webhook_answers_ok(slack: Slack) -> None:
    """An incoming webhook takes JSON without a token; what it cannot read it refuses with 400."""
    url = f"{slack.url}/services/T0/B0/secret"
    answer = requests.post(url, json={"channel": CHANNEL, "text": "by webhook"}, timeout=5)
    assert (answer.status_code, answer.text) == (200, "ok")
    assert slack.messages()[-1]["text"] == "by webhook"
    assert requests.post(url, json={"channel": CHANNEL}, timeout=5).status_code == 400


def test_rate_limits_are_waited_out_by_the_client(slack: Slack) -> None:
    """429 comes with Retry-After, as often as asked for, and the message gets through once after it."""
    client = slack.client()
    client.retry_handlers.append(RateLimitErrorRetryHandler(max_retry_count=1))
    slack.meet(status=429, times=1, retry_after=1)
    begun, before = time.monotonic(), len(slack.messages())
    client.chat_postMessage(channel=CHANNEL, text="patient")
    assert time.monotonic() - begun >= 1
    assert len(slack.messages()) == before + 1


def test_server_errors_can_be_retried(slack: Slack) -> None:
    """A 500 is over after as many calls as asked for."""
    client = slack.client()
    client.retry_handlers.append(ServerErrorRetryHandler(max_retry_count=1))
    slack.meet(status=500, times=1)
    assert client.chat_postMessage(channel=CHANNEL, text="again")["ok"]


def test_a_revoked_token_can_be_played(slack: Slack) -> None:
    """Any error of Slack's can be set, for all calls until it is lifted."""
    slack.meet(error="token_revoked")
    for _ in range(2):
        with pytest.raises(SlackApiError, match="token_revoked"):
            slack.client().auth_test()
    slack.meet()
    slack.client().auth_test()


def test_a_slow_answer_runs_into_the_clients_timeout(slack: Slack) -> None:
    """A delay longer than the client's patience is a timeout, and the inbox goes on working."""
    slack.meet(delay=1.5, times=1)
    with pytest.raises(TimeoutError):
        slack.client(timeout=1).auth_test()
    slack.client().auth_test()
