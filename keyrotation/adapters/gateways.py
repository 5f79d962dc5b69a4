"""The gateways, seen from outside: probes with canaries, calls with tokens, their clocks. Each over a fresh connection.

What a gateway's answer means for a key is the domain's (propagation); here is only the asking.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from urllib.parse import urlsplit, urlunsplit

from keyrotation.connections.http import Answer, exchange, place
from keyrotation.domain.errors import BadAnswer, WorldError
from keyrotation.domain.propagation import Answer as Shown
from keyrotation.domain.propagation import Observation, classify
from keyrotation.ports import Dated

REASON_LENGTH = 80
QUOTED_TOKEN = re.compile(r"[\w.~+/=-]{40,}")


class HttpGateways:
    """All gateways of an environment, by their URLs."""

    def __init__(self, urls: Sequence[str], probe_path: str | None) -> None:
        self._urls = tuple(urls)
        self._probes = {url: urlunsplit(urlsplit(url)._replace(path=probe_path, query="")) for url in urls} if probe_path else {}

    @property
    def names(self) -> Sequence[str]:
        """Their URLs, for messages."""
        return self._urls

    @property
    def can_probe(self) -> bool:
        """Whether there is a route that takes canaries."""
        return bool(self._probes)

    def probe(self, canaries: Sequence[str]) -> Sequence[Observation]:
        """Every canary at every gateway's probe route."""
        return _ask_all(self._probes.items(), canaries)

    def call(self, token: str) -> Sequence[Observation]:
        """One token at every gateway's API route."""
        return _ask_all(((url, url) for url in self._urls), (token,))

    def dates(self) -> Sequence[Dated]:
        """The gateways' clocks; one without a Date header is left out."""
        answers = ((url, exchange("GET", url)) for url in self._urls)
        return [Dated(place(url), answer.date, answer.round_trip) for url, answer in answers if answer.date is not None]


def _ask_all(targets: Iterable[tuple[str, str]], tokens: Sequence[str]) -> list[Observation]:
    seen: list[Observation] = []
    for name, url in targets:
        for token in tokens:
            observation = _ask(name, lambda url=url, token=token: exchange("GET", url, headers={"Authorization": f"Bearer {token}"}))  # type: ignore[misc]
            seen.append(observation)
            if observation.answer is not Shown.ACCEPTED:
                break  # one that does not accept settles the round; a dead one would cost its timeout each time
    return seen


def _ask(name: str, ask: Callable[[], Answer]) -> Observation:
    try:
        answer = ask()
    except BadAnswer as error:
        return Observation(name, Shown.UNPROVEN, str(error))
    except WorldError:
        return Observation(name, Shown.UNPROVEN, "does not answer")
    said = f"HTTP {answer.status}" + (f" ({reason})" if (reason := _reason(answer.body)) and answer.status != 200 else "")
    return Observation(name, classify(answer.status, said), said)


def _reason(body: bytes) -> str:
    """Envoy and most others give the reason as a short text. One that quotes the token, or sends more than a line of text, is cut: it goes into the ledger."""
    lines = body[:4096].decode("utf-8", "replace").strip().splitlines() or [""]
    return "".join(letter if letter.isprintable() else " " for letter in QUOTED_TOKEN.sub("…", lines[0]))[:REASON_LENGTH].strip()
