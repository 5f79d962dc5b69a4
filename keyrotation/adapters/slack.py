"""Tells people in Slack (ports.Announcer): by a bot token, with threads, or by an incoming webhook, one message at a time.

Owns: escaping, the time a message may cost, Slack's errors in words. Leaves to others: what is said, and that a message which did not arrive
stands in the ledger instead (I14).

A text is plain: it is escaped whole, so that a reason somebody typed can mention nobody and link nothing. Nothing takes longer than `TOTAL`,
whatever Slack does: one retry, and only where it can help in that time.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any, TypeVar
from urllib.parse import urlsplit

from keyrotation.domain.errors import BadAnswer, Denied, KeyRotationError, SettingsError, Unreachable, WorldError
from keyrotation.secrets import SecretRef

T = TypeVar("T")

TOTAL = 5.0  # seconds that a message may cost, retry included
SOCKET = 3  # seconds of silence after which a connection is given up
LONGEST_PAUSE = 2  # a `Retry-After` beyond it would not leave the time for another attempt
LIMIT = 40_000  # characters of a message's text: https://docs.slack.dev/reference/methods/chat.postMessage
LOOPBACK = ("localhost", "127.0.0.1", "::1")

# slack_sdk logs at DEBUG a webhook's whole address, which is its secret, and at ERROR what our own errors say without it.
SILENT = logging.getLogger("keyrotation.adapters.slack.sdk")
SILENT.setLevel(logging.CRITICAL)

CREDENTIAL = {
    "invalid_auth", "not_authed", "account_inactive", "token_revoked", "token_expired", "org_login_required", "access_denied",
    "invalid_token", "no_service", "no_service_id", "no_team", "team_disabled", "no_active_hooks", "user_not_found",
}  # fmt: skip
PLACE = {
    "channel_not_found", "not_in_channel", "is_archived", "channel_is_archived", "restricted_action", "missing_scope", "no_permission",
    "action_prohibited", "posting_to_general_channel_denied", "ekm_access_denied", "team_access_not_granted",
}  # fmt: skip


def escape(text: str) -> str:
    """The text as Slack shows it letter by letter: no mention, no link, no `<!channel>`. Cut with an ellipsis at Slack's limit."""
    escaped = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    if len(escaped) <= LIMIT:
        return escaped
    # An entity that the cut has split would show as rubbish.
    return re.sub(r"&[a-z]*$", "", escaped[: LIMIT - 1]) + "…"


@dataclass(frozen=True, slots=True)
class _Answer:
    """What Slack said: its status, its error code (empty when all is well), and the fields of its answer."""

    status: int
    error: str
    headers: Mapping[str, str]
    fields: Mapping[str, Any]

    def pause(self) -> float | None:
        """Seconds after which one more attempt may help; None where it would not."""
        if self.status >= 500:
            return 0.0
        if self.status != 429:
            return None
        wait = next((value for name, value in self.headers.items() if name.lower() == "retry-after"), "1")
        return float(wait) if re.fullmatch(r"\d{1,3}", wait) and int(wait) <= LONGEST_PAUSE else None


class SlackAnnouncer:
    """Posts to one channel as a bot (scope chat:write), and answers in threads."""

    def __init__(self, token: SecretRef, channel: str, base_url: str | None = None, total: float = TOTAL) -> None:
        self._token, self._channel, self._total = token, channel, total
        self._base_url = None if base_url is None else base_url.rstrip("/") + "/"

    def say(self, text: str, thread: str | None = None) -> str | None:
        """Posts the plain text and returns the message's ts, to answer in; raises WorldError within the total time."""
        message = {"channel": self._channel, "text": escape(text), "thread_ts": thread, "mrkdwn": True, "parse": "none"}
        answer = self._call("chat.postMessage", {**message, "link_names": False, "unfurl_links": False, "unfurl_media": False})
        ts = answer.fields.get("ts")
        if not isinstance(ts, str):
            raise BadAnswer("Slack took the message, but did not say where: the next one begins a new thread")
        return ts

    def check(self) -> str:
        """Whom the token stands for; raises what stands in the way. Whether the bot is in the channel only a message shows."""
        fields = self._call("auth.test", {}).fields
        return f"Slack knows the token as {fields.get('user')} of {fields.get('team')}; messages go to {self._channel}"

    def _call(self, method: str, arguments: Mapping[str, Any]) -> _Answer:
        # Loaded where somebody is told something: the shell looks without.
        from slack_sdk import WebClient  # noqa: PLC0415
        from slack_sdk.errors import SlackApiError  # noqa: PLC0415

        client = WebClient(self._token.reveal(), base_url=self._base_url or WebClient.BASE_URL, timeout=SOCKET, retry_handlers=[], logger=SILENT)
        sent = {name: value for name, value in arguments.items() if value is not None}

        def once() -> _Answer:
            try:
                response = client.api_call(method, json=sent)
            except SlackApiError as error:
                response = error.response
            fields = response.data if isinstance(response.data, Mapping) else {}
            return _Answer(response.status_code, _code(fields.get("error")) if not fields.get("ok") else "", response.headers, fields)

        return _delivered(once, self._total, f"check {self._token}, and that {self._channel} exists and the bot is in it with the scope chat:write")


class SlackWebhook:
    """Posts to the channel of an incoming webhook. Its address is the secret; it knows no threads of its own."""

    def __init__(self, url: SecretRef, total: float = TOTAL) -> None:
        self._url, self._total = url, total

    def say(self, text: str, thread: str | None = None) -> str | None:
        """Posts the plain text; returns None, for a webhook does not say which message it made. Raises WorldError within the total time."""
        from slack_sdk.webhook import WebhookClient  # noqa: PLC0415

        client = WebhookClient(self._address(), timeout=SOCKET, retry_handlers=[], logger=SILENT)
        message = {"text": escape(text), "thread_ts": thread, "mrkdwn": True, "unfurl_links": False, "unfurl_media": False}

        def once() -> _Answer:
            response = client.send_dict(message)
            return _Answer(response.status_code, "" if response.status_code == 200 else _code(response.body), response.headers, {})

        _delivered(once, self._total, f"make a new incoming webhook and put its address where {self._url} leads")
        return None

    def check(self) -> str:
        """That there is an address of the right form: only a message would show more."""
        return f"a webhook at {urlsplit(self._address()).hostname} is set; only a message shows that it works"

    def _address(self) -> str:
        address = self._url.reveal()
        parts = urlsplit(address)
        if parts.hostname and (parts.scheme == "https" or (parts.scheme == "http" and parts.hostname in LOOPBACK)):
            return address
        raise SettingsError(f"{self._url} does not hold a webhook's address: it begins with https://hooks.slack.com/services/")


def _delivered(once: Callable[[], _Answer], total: float, mend: str) -> _Answer:
    """Slack's good answer, after one more attempt at the most; raises WorldError within `total` seconds."""

    def both() -> _Answer:
        answer = _heard(once)
        pause = answer.pause()
        if pause is not None:
            time.sleep(pause)
            answer = _heard(once)
        return answer

    answer = _within(total, both)
    if answer.status != 200 or answer.error:
        raise _in_words(answer, mend)
    return answer


def _heard(once: Callable[[], _Answer]) -> _Answer:
    """One attempt. What went wrong on the way is told by its kind only: the client's texts may quote an address or an answer."""
    problem: KeyRotationError
    try:
        return once()
    except (OSError, HTTPException):
        problem = Unreachable("Slack cannot be reached, or broke off: check that this machine may reach it; the message may not have arrived")
    except Exception as error:  # noqa: BLE001  announcing never decides: whatever the client trips over must not end a rotation
        problem = BadAnswer(f"Slack's answer cannot be read ({type(error).__name__}): look for a proxy that answers in its place")
    raise problem  # outside the handlers: the client's errors hold the request with its token


def _within(seconds: float, call: Callable[[], T]) -> T:
    """The call's result, or Unreachable after so many seconds: a socket's timeout counts from byte to byte, and somebody may drip."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:  # noqa: BLE001  raised again where the result is awaited
            future.set_exception(error)

    # A daemon, left behind when it hangs: a process that wants to end does not wait for Slack.
    threading.Thread(target=run, name="slack", daemon=True).start()
    try:
        return future.result(seconds)
    except TimeoutError:
        raise Unreachable(f"Slack did not answer within {seconds:g} s: the run goes on; the message may or may not have arrived") from None


def _in_words(answer: _Answer, mend: str) -> KeyRotationError:
    if answer.status == 429 or answer.error == "ratelimited":
        return Unreachable("Slack takes no more messages for the moment (HTTP 429): other programs may use the same channel")
    if answer.status >= 500:
        return Unreachable(f"Slack failed twice (HTTP {answer.status}): see https://slack-status.com")
    if answer.error in CREDENTIAL | PLACE or answer.status in (401, 403, 404, 410):
        return Denied(f"Slack refuses the message ({answer.error or f'HTTP {answer.status}'}): {mend}")
    return WorldError(f"Slack refused the message (HTTP {answer.status}, {answer.error or 'no reason given'}): look the word up at https://docs.slack.dev")


def _code(said: object) -> str:
    """Slack's error code; anything that does not look like one is not passed on."""
    return said.strip() if isinstance(said, str) and re.fullmatch(r"[a-z_]{1,60}", said.strip()) else "no error code"
