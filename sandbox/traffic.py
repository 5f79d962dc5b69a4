"""Owns the live traffic of the sandbox: clients that call the gateways with tokens, and the record of what they met.

    TRAFFIC_CLIENT_SECRET=… python -m sandbox.traffic --token-url URL --client-id ID --gateway URL … --rate 100 --report FILE

It runs until SIGTERM or SIGINT, in a process of its own: nothing that it measures shares its interpreter. The clients
behave like ordinary ones: each keeps a token, renews it some time before it expires, and sends GETs over keep-alive
connections, at its share of the rate, to each gateway in turn. Nothing is sent twice: what fails, counts.

A token was VALID if it had at least `margin` seconds to live when it was sent. A gateway's answer counts as
    accepted    2xx
    rejected    401 or 403 for a valid token: what a rotation must never cause
    expired     401 or 403 for a token that was not valid any more
    other       any other answer
    errors      no answer: the connection was refused, broke, or took too long

The report (JSON, whole at any time, rewritten each second and at the end; instants in UTC with milliseconds)
    started_at, written_at, finished, rate, clients
    totals       the counts above, `sent`, and what was not sent: `without_token`, `skipped` (late by over a second);
                 `token_errors`: token requests that failed
    gateways     URL → its counts, and `kids`: kid → counts, first_accepted_at, last_accepted_at
    kids         kid → its counts, first_accepted_at, last_accepted_at, last_accepted_by, issued, first_issued_at,
                 last_issued_at
    examples     up to 50 rejections: at, gateway, kid, age (seconds since iat), status, body
    timeline     a second each, by the instant of sending: at, kids: kid → sent, accepted, rejected
"""

import argparse
import base64
import http.client
import json
import os
import random
import signal
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple
from urllib.parse import urlencode, urlsplit

from sandbox.processes import Process, SandboxError

_SECRET = "TRAFFIC_CLIENT_SECRET"  # in the environment: everybody on the host can read a command line
_MOST_EXAMPLES = 50
_MOST_SECONDS = 7_200  # of the timeline; a sandbox may be left running for days
_TOKEN_RETRY_AFTER = 0.2
_LATE = 1.0
_POLL = 0.05

_OUTCOMES = ("accepted", "rejected", "expired", "other", "errors")


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What the clients do. Seconds, and requests per second for all clients together."""

    token_url: str
    client_id: str
    client_secret: str = field(repr=False)
    gateways: tuple[str, ...]
    scope: str = "api"
    rate: float = 100
    clients: int = 8
    seed: int = 0
    # How much of a token's life is left when it is renewed, beside the margin. Some are used nearly to their end (a key
    # that is disabled too early), some are young (one that is promoted too early).
    renew_at_least: float = 0.05
    renew_at_most: float = 0.5
    renew_when_rejected: bool = False  # fetch a new token on a 401, as some client libraries do
    margin: float = 1.0
    timeout: float = 5.0


# ------------------------------------------------------------------------------------------------ the clients


class Token(NamedTuple):
    text: str
    kid: str
    issued_at: float
    expires_at: float


class Line:
    """A keep-alive connection to one URL, made again after it broke."""

    def __init__(self, url: str, timeout: float) -> None:
        self._parts = urlsplit(url)
        self._path = (self._parts.path or "/") + (f"?{self._parts.query}" if self._parts.query else "")
        self._connection = http.client.HTTPConnection(self._parts.netloc, timeout=timeout)

    def ask(self, method: str, headers: Mapping[str, str], body: str | None = None) -> tuple[int, bytes]:
        """Status and body; ConnectionError when there was no whole answer."""
        try:
            self._connection.request(method, self._path, body, dict(headers))
            answer = self._connection.getresponse()
            return answer.status, answer.read()
        except (OSError, http.client.HTTPException) as error:
            self._connection.close()
            raise ConnectionError(f"{type(error).__name__}: {error}") from None


class Client:
    """One client: its token, its connections, its share of the rate."""

    def __init__(self, number: int, plan: Plan, tally: "Tally", ending: threading.Event) -> None:
        self._plan, self._tally, self._ending = plan, tally, ending
        self._random = random.Random(f"{plan.seed}/{number}")
        self._tokens = Line(plan.token_url, plan.timeout)
        self._gateways = [(url, Line(url, plan.timeout)) for url in plan.gateways]
        self._turn = number  # clients begin at different gateways
        self._offset = number / plan.rate
        self._token: Token | None = None
        self._renew_at = 0.0

    def run(self) -> None:
        """Sends at even intervals until it is told to end."""
        interval = self._plan.clients / self._plan.rate
        due = time.monotonic() + self._offset
        while not self._ending.wait(max(0.0, due - time.monotonic())):
            self._send()
            due += interval
            if (late := time.monotonic() - due) > _LATE:
                # Made up for in a burst, it would be another rate.
                self._tally.skip(int(late / interval))
                due += late

    def _send(self) -> None:
        token = self._current_token()
        url, line = self._gateways[self._turn % len(self._gateways)]
        self._turn += 1
        if token is None:
            self._tally.miss()
            return
        sent_at = time.time()
        try:
            status, body = line.ask("GET", {"Authorization": f"Bearer {token.text}"})
        except ConnectionError:
            self._tally.count(url, token, sent_at, "errors")
            return
        outcome = judge(status, token, sent_at, self._plan.margin)
        self._tally.count(url, token, sent_at, outcome)
        if outcome == "rejected":
            self._tally.exemplify(url, token, sent_at, status, body)
            if self._plan.renew_when_rejected:
                self._renew_at = 0.0

    def _current_token(self) -> Token | None:
        now = time.time()
        if now >= self._renew_at:
            self._renew(now)
        if self._token is not None and self._token.expires_at - self._plan.margin <= now:
            self._token = None
        return self._token

    def _renew(self, now: float) -> None:
        self._renew_at = now + _TOKEN_RETRY_AFTER  # unless this works; until then the old token is used on
        try:
            token = self._fetch()
        except (ConnectionError, KeyError, ValueError):
            self._tally.fail_token()
            return
        life = token.expires_at - token.issued_at
        # The first one at any moment of its life: clients that began together would renew together for a long time.
        most = 1.0 if self._token is None else self._plan.renew_at_most
        spare = life * self._random.uniform(self._plan.renew_at_least, most)
        self._token, self._renew_at = token, token.expires_at - self._plan.margin - spare
        self._tally.issue(token.kid, now)

    def _fetch(self) -> Token:
        credentials = f"{self._plan.client_id}:{self._plan.client_secret}".encode()
        headers = {
            "Authorization": f"Basic {base64.b64encode(credentials).decode()}",
            "Content-Type": "application/x-www-form-urlencoded",
        }
        form = urlencode({"grant_type": "client_credentials", "scope": self._plan.scope})
        status, body = self._tokens.ask("POST", headers, form)
        if status != 200:
            raise ConnectionError(f"the token endpoint answered {status}")
        return read_token(json.loads(body)["access_token"])


def read_token(text: str) -> Token:
    """A token's kid and instants, unverified: clients do not look into tokens, this one only keeps the record."""
    header, claims = (json.loads(base64.urlsafe_b64decode(part + "==")) for part in text.split(".")[:2])
    return Token(text, header["kid"], claims["iat"], claims["exp"])


def judge(status: int, token: Token, sent_at: float, margin: float) -> str:
    """Which of the outcomes an answer is."""
    if 200 <= status < 300:
        return "accepted"
    if status not in (401, 403):
        return "other"
    return "rejected" if token.expires_at - sent_at >= margin else "expired"


# ------------------------------------------------------------------------------------------------ the record


@dataclass(slots=True)
class Record:
    """What one gateway answered to the tokens of one kid, or a sum of such."""

    outcomes: Counter[str] = field(default_factory=Counter)
    first_accepted_at: float | None = None
    last_accepted_at: float | None = None

    def add(self, outcome: str, answered_at: float) -> None:
        self.outcomes[outcome] += 1
        if outcome == "accepted":
            self.first_accepted_at = self.first_accepted_at or answered_at
            self.last_accepted_at = answered_at

    def counts(self) -> dict[str, int]:
        return {"sent": self.outcomes.total(), **{outcome: self.outcomes[outcome] for outcome in _OUTCOMES}}

    def shown(self) -> dict[str, Any]:
        instants = {"first_accepted_at": self.first_accepted_at, "last_accepted_at": self.last_accepted_at}
        return {**self.counts(), **{name: instant and _shown(instant) for name, instant in instants.items()}}


class Tally:
    """Everything counted so far; clients write it, the reporter reads it."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._started_at = time.time()
        self._lock = threading.Lock()
        self._records: defaultdict[tuple[str, str], Record] = defaultdict(Record)
        self._issued: defaultdict[str, list[float]] = defaultdict(lambda: [0, 0.0, 0.0])  # how many, first, last
        self._not_sent: Counter[str] = Counter()
        self._examples: list[dict[str, Any]] = []
        self._timeline: dict[int, defaultdict[str, Counter[str]]] = {}

    def count(self, gateway: str, token: Token, sent_at: float, outcome: str) -> None:
        with self._lock:
            # Taken under the lock, so that the last one written is the last one.
            self._records[gateway, token.kid].add(outcome, time.time())
            second = self._second(int(sent_at))[token.kid]
            second["sent"] += 1
            second[outcome] += 1

    def exemplify(self, gateway: str, token: Token, sent_at: float, status: int, body: bytes) -> None:
        with self._lock:
            if len(self._examples) < _MOST_EXAMPLES:
                self._examples.append(
                    {
                        "at": _shown(sent_at),
                        "gateway": gateway,
                        "kid": token.kid,
                        "age": round(sent_at - token.issued_at, 3),
                        "status": status,
                        "body": body[:200].decode(errors="replace"),
                    }
                )

    def issue(self, kid: str, at: float) -> None:
        with self._lock:
            how_many, first, _ = self._issued[kid]
            self._issued[kid] = [how_many + 1, first or at, at]

    def fail_token(self) -> None:
        with self._lock:
            self._not_sent["token_errors"] += 1

    def miss(self) -> None:
        with self._lock:
            self._not_sent["without_token"] += 1

    def skip(self, requests: int) -> None:
        with self._lock:
            self._not_sent["skipped"] += requests

    def report(self, *, finished: bool) -> dict[str, Any]:
        with self._lock:
            kids = sorted({kid for _, kid in self._records} | self._issued.keys())
            return {
                "started_at": _shown(self._started_at),
                "written_at": _shown(time.time()),
                "finished": finished,
                "rate": self._plan.rate,
                "clients": self._plan.clients,
                "totals": self._totals(),
                "gateways": {url: self._of_gateway(url) for url in self._plan.gateways},
                "kids": {kid: self._of_kid(kid) for kid in kids},
                "examples": list(self._examples),
                "timeline": [_shown_second(second, kids) for second, kids in sorted(self._timeline.items())],
            }

    def _second(self, second: int) -> defaultdict[str, Counter[str]]:
        if second not in self._timeline:
            self._timeline[second] = defaultdict(Counter)
            if len(self._timeline) > _MOST_SECONDS:
                del self._timeline[min(self._timeline)]
        return self._timeline[second]

    def _totals(self) -> dict[str, int]:
        not_sent = {name: self._not_sent[name] for name in ("without_token", "skipped", "token_errors")}
        return {**_sum(self._records.values()).counts(), **not_sent}

    def _of_gateway(self, url: str) -> dict[str, Any]:
        kids = {kid: record for (gateway, kid), record in self._records.items() if gateway == url}
        return {**_sum(kids.values()).counts(), "kids": {kid: record.shown() for kid, record in kids.items()}}

    def _of_kid(self, kid: str) -> dict[str, Any]:
        gateways = {gateway: record for (gateway, its), record in self._records.items() if its == kid}
        last = max(gateways, key=lambda url: gateways[url].last_accepted_at or 0.0, default=None)
        issued, first_at, last_at = self._issued.get(kid, [0, 0.0, 0.0])
        return {
            **(total := _sum(gateways.values())).shown(),
            "last_accepted_by": last if total.last_accepted_at else None,
            "issued": int(issued),
            "first_issued_at": _shown(first_at) if issued else None,
            "last_issued_at": _shown(last_at) if issued else None,
        }


def _sum(records: Iterable[Record]) -> Record:
    total = Record()
    for record in records:
        total.outcomes.update(record.outcomes)
        if record.first_accepted_at is not None and record.last_accepted_at is not None:
            total.first_accepted_at = min(total.first_accepted_at or record.first_accepted_at, record.first_accepted_at)
            total.last_accepted_at = max(total.last_accepted_at or 0.0, record.last_accepted_at)
    return total


def _shown(instant: float) -> str:
    return datetime.fromtimestamp(instant, UTC).isoformat(timespec="milliseconds")


def _shown_second(second: int, kids: Mapping[str, Counter[str]]) -> dict[str, Any]:
    counted = ("sent", "accepted", "rejected")
    shown = {kid: {name: counts[name] for name in counted} for kid, counts in kids.items()}
    return {"at": datetime.fromtimestamp(second, UTC).isoformat(), "kids": shown}


# ------------------------------------------------------------------------------------------------ the handle


class Report:
    """The report as read from its file."""

    def __init__(self, content: Mapping[str, Any]) -> None:
        self.content = content

    @classmethod
    def read(cls, path: Path) -> "Report":
        return cls(json.loads(path.read_text()))

    @property
    def finished(self) -> bool:
        return bool(self.content["finished"])

    @property
    def totals(self) -> Mapping[str, int]:
        totals: Mapping[str, int] = self.content["totals"]
        return totals

    @property
    def kids(self) -> Mapping[str, Mapping[str, Any]]:
        kids: Mapping[str, Mapping[str, Any]] = self.content["kids"]
        return kids

    def rejected(self, besides: Iterable[str] = ()) -> int:
        """Valid tokens that were rejected; those of the kids named (compromised ones) must be, and do not count."""
        left_out = set(besides)
        return sum(counts["rejected"] for kid, counts in self.kids.items() if kid not in left_out)

    def last_accepted(self, kids: Iterable[str]) -> datetime | None:
        """When any gateway last accepted a token of any of these kids."""
        accepted = [self.kids[kid]["last_accepted_at"] for kid in kids if kid in self.kids]
        return max((datetime.fromisoformat(at) for at in accepted if at is not None), default=None)


class Traffic:
    """A traffic process: start it, read it while it runs, stop it for the last word."""

    def __init__(
        self,
        token_url: str,
        client_id: str,
        client_secret: str,
        gateway_urls: Sequence[str],
        *,
        home: Path,
        rate: float = 100,
        clients: int = 8,
        seed: int = 0,
        scope: str = "api",
        every: float = 1.0,
        name: str = "traffic",
        renew_when_rejected: bool = False,
    ) -> None:
        self.report_path = home / f"{name}.json"
        who = {"token-url": token_url, "client-id": client_id, "scope": scope}
        how = {"rate": rate, "clients": clients, "seed": seed, "every": every}
        options = [f"--{option}={value}" for option, value in {**who, **how}.items()]
        options += [f"--gateway={url}" for url in gateway_urls]
        options += ["--renew-when-rejected"] if renew_when_rejected else []
        self._process = Process(
            name,
            [sys.executable, "-m", "sandbox.traffic", *options, f"--report={self.report_path.resolve()}"],
            home=home,
            ready=self.report_path.exists,
            env={**os.environ, _SECRET: client_secret},
            cwd=Path(__file__).resolve().parent.parent,
        )

    def __enter__(self) -> "Traffic":
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        return self._process.pid

    def start(self) -> None:
        self.report_path.unlink(missing_ok=True)
        self._process.start()

    def read(self) -> Report:
        """The report so far: `every` seconds old at most."""
        return Report.read(self.report_path)

    def wait_until(self, holds: Callable[[Report], bool], within: float = 30.0) -> Report:
        """The first report of which this holds."""
        deadline = time.monotonic() + within
        while not holds(report := self.read()):
            if time.monotonic() > deadline or not self._process.running:
                raise SandboxError(f"the traffic did not get there within {within:g} s: {dict(report.totals)}")
            time.sleep(_POLL)
        return report

    def stop(self) -> Report:
        """Ends the traffic and gives its whole report."""
        self._process.stop()
        return self.read()


# ------------------------------------------------------------------------------------------------ the process


def generate(plan: Plan, report: Path, every: float, ending: threading.Event) -> None:
    """Runs the clients until `ending` is set, and keeps the report, rewritten every so many seconds."""
    tally = Tally(plan)
    clients = [Client(number, plan, tally, ending) for number in range(plan.clients)]
    threads = [threading.Thread(target=client.run, daemon=True) for client in clients]
    write_report(report, tally.report(finished=False))
    for thread in threads:
        thread.start()
    while not ending.wait(every):
        write_report(report, tally.report(finished=False))
    for thread in threads:
        thread.join(plan.timeout)
    write_report(report, tally.report(finished=True))


def write_report(path: Path, content: Mapping[str, Any]) -> None:
    unfinished = path.with_name(f"{path.name}.unfinished")
    unfinished.write_text(json.dumps(content, indent=1))
    unfinished.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m sandbox.traffic", description="Clients that call the gateways.")
    parser.add_argument("--token-url", required=True)
    parser.add_argument("--client-id", required=True, help=f"its secret comes from ${_SECRET}")
    parser.add_argument("--gateway", action="append", required=True, dest="gateways", help="URL; may be repeated")
    parser.add_argument("--report", type=Path, required=True, help="JSON, rewritten while it runs")
    parser.add_argument("--every", type=float, default=1.0, help="seconds from one report to the next")
    parser.add_argument("--scope", default="api")
    parser.add_argument("--rate", type=float, default=100, help="requests per second in total")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--margin", type=float, default=1.0, help="a token with fewer seconds to live is not used")
    parser.add_argument("--renew-when-rejected", action="store_true")
    options = vars(parser.parse_args())
    report, every, gateways = options.pop("report"), options.pop("every"), tuple(options.pop("gateways"))
    ending = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ending.set())
    generate(Plan(client_secret=os.environ[_SECRET], gateways=gateways, **options), report, every, ending)


if __name__ == "__main__":
    main()
