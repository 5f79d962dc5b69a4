"""One HTTP exchange, bounded in time and size, over a fresh connection, following nothing.

A peer that drips octets meets a deadline for the whole exchange, not only for each read (F26). Redirects are not followed: what we ask is
configured, and an answer from elsewhere proves nothing (F69). A JSON body is parsed by the caller.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

import requests

from keyrotation.domain.errors import BadAnswer, SettingsError, Unreachable

TIMEOUT = 5.0
MAX_OCTETS = 256 * 1024
CHUNK = 16 * 1024


@dataclass(frozen=True, slots=True)
class Answer:
    """Status, headers (case-insensitive) and body of an answer that came whole and in time."""

    status: int
    headers: Mapping[str, str]
    body: bytes = field(repr=False)
    round_trip: timedelta

    @property
    def date(self) -> datetime | None:
        """The peer's clock, in whole seconds, where it tells."""
        try:
            told = parsedate_to_datetime(self.headers["Date"])
        except (KeyError, ValueError, TypeError, OverflowError):
            return None
        return told if told.tzinfo else told.replace(tzinfo=UTC)  # "-0000": UTC, and nothing said about where the peer is


def place(url: str) -> str:
    """A URL for messages: scheme, host, port and path, no query and no user."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.hostname}{f':{parts.port}' if parts.port else ''}{parts.path}"


def exchange(
    method: str,
    url: str,
    *,
    headers: Mapping[str, str] | None = None,
    data: bytes | Mapping[str, str] | None = None,
    auth: tuple[str, str] | None = None,
    timeout: float = TIMEOUT,
) -> Answer:
    """The answer; raises Unreachable where none came in time, BadAnswer where it is too large or a redirect."""
    result: queue.SimpleQueue[Answer | Exception] = queue.SimpleQueue()

    def run() -> None:
        try:
            result.put(_exchange(method, url, headers or {}, data, auth, timeout))
        except Exception as error:  # noqa: BLE001  carried to the caller, who tells them apart
            result.put(error)

    # A thread, because no timeout of a socket bounds a header that comes one octet at a time. The caller is free in time; the thread ends with the peer.
    threading.Thread(target=run, daemon=True).start()
    try:
        outcome = result.get(timeout=timeout + 1)
    except queue.Empty:
        raise Unreachable(f"{place(url)} did not finish its answer within {timeout:g} s") from None
    if isinstance(outcome, Answer):
        return outcome
    if isinstance(outcome, requests.Timeout):
        raise Unreachable(f"{place(url)} did not answer within {timeout:g} s") from None
    if isinstance(outcome, requests.exceptions.SSLError):
        raise BadAnswer(f"{place(url)} shows a certificate that is not valid for it: nothing was sent") from None
    if isinstance(outcome, requests.RequestException):
        raise Unreachable(f"{place(url)} does not answer ({outcome.__class__.__name__}): check that it runs and may be reached from here") from None
    if isinstance(outcome, UnicodeError):  # its text and arguments hold what could not be sent
        raise SettingsError(f"a secret for {place(url)} holds a character that no HTTP header can carry: look at what its reference leads to") from None
    raise outcome from None


def _exchange(
    method: str, url: str, headers: Mapping[str, str], data: bytes | Mapping[str, str] | None, auth: tuple[str, str] | None, timeout: float
) -> Answer:
    begun = time.monotonic()
    # A function in place of no credentials: else requests looks into ~/.netrc, and a line for that host replaces our own Authorization header.
    # As octets: requests would write text in Latin-1 (RFC 7617 asks for UTF-8).
    credentials: Any = (auth[0].encode(), auth[1].encode()) if auth else lambda prepared: prepared
    with requests.Session() as session:
        response = session.request(
            method, url, headers={"Connection": "close", **headers}, data=data, auth=credentials, timeout=timeout, allow_redirects=False, stream=True
        )
        with response:
            round_trip = timedelta(seconds=time.monotonic() - begun)
            if response.is_redirect or response.status_code in (301, 302, 303, 307, 308):
                raise BadAnswer(f"{place(url)} answers with a redirect, which is not followed: configure the final URL")
            body = b""
            for chunk in response.iter_content(CHUNK):
                body += chunk
                if len(body) > MAX_OCTETS:
                    raise BadAnswer(f"{place(url)} answers with more than {MAX_OCTETS // 1024} KiB: this is not what is asked for")
                if time.monotonic() - begun > timeout:
                    raise Unreachable(f"{place(url)} did not finish its answer within {timeout:g} s")
            return Answer(response.status_code, response.headers, body, round_trip)
