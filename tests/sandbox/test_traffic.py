"""The load generator, against a real identity service and a gateway that does as it is told."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from sandbox.traffic import Report, Token, Traffic, judge, read_token

if TYPE_CHECKING:  # not to be imported by name: every folder of tests has a conftest
    from tests.sandbox.conftest import Database, Identity

MakeKey = Callable[..., str]
MakeIdentity = Callable[..., "Identity"]
MakeTraffic = Callable[..., Traffic]


class Gateway(ThreadingHTTPServer):
    """Accepts every token but those of the kids in `refused`, which get `refusal`."""

    daemon_threads = True

    def __init__(self, port: int = 0) -> None:
        self.refused: set[str] = set()
        self.refusal = 401
        self.connections = 0
        super().__init__(("127.0.0.1", port), _Verifier)
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/api"

    def stop(self) -> None:
        self.shutdown()
        self.server_close()


class _Verifier(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1
    server: Gateway

    def setup(self) -> None:
        self.server.connections += 1
        super().setup()

    def do_GET(self) -> None:
        token = read_token(self.headers["Authorization"].removeprefix("Bearer "))
        refused = token.kid in self.server.refused
        body = b"Jwks doesn't have key to match kid or alg from Jwt" if refused else b"ok"
        self.send_response(self.server.refusal if refused else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing."""


@pytest.fixture
def gateways() -> Iterator[list[Gateway]]:
    """Two of them; a test may stop one and put another in its place."""
    running = [Gateway(), Gateway()]
    yield running
    for gateway in running:
        gateway.stop()


@pytest.fixture
def kid(make_key: MakeKey) -> str:
    """The current key."""
    return make_key(promoted=True)


@pytest.fixture
def service(kid: str, make_identity: MakeIdentity) -> Identity:
    """It issues tokens of that key."""
    return make_identity()


@pytest.fixture
def make_traffic(service: Identity, gateways: list[Gateway], tmp_path: Path) -> Iterator[MakeTraffic]:
    """Starts traffic from the identity service's tokens to both gateways; it ends with the test."""
    running: list[Traffic] = []

    def make(token_url: str = service.token_url, **otherwise: Any) -> Traffic:
        urls = [gateway.url for gateway in gateways]
        options = {"rate": 200, "every": 0.1, **otherwise}
        traffic = Traffic(token_url, *service.client, gateway_urls=urls, home=tmp_path, **options)
        running.append(traffic)
        traffic.start()
        return traffic

    yield make
    for each in running:
        each.stop()


def sent(at_least: int) -> Callable[[Report], bool]:
    """Whether so many requests have been sent."""
    return lambda report: report.totals["sent"] >= at_least


class TestCounting:
    def test_each_gateway_gets_an_equal_part_at_the_rate_asked_for(self, make_traffic: MakeTraffic, gateways: list[Gateway], kid: str) -> None:
        """All of it is accepted, on one connection for each client and gateway; clients keep their tokens."""
        traffic = make_traffic(clients=8)
        traffic.wait_until(sent(200))
        report = traffic.stop()
        parts = [report.content["gateways"][gateway.url]["sent"] for gateway in gateways]
        lasted = instant(report.content["written_at"]) - instant(report.content["started_at"])
        assert abs(parts[0] - parts[1]) <= 8
        assert sum(parts) <= 200 * lasted + 8  # no more than was asked for; how much less is the machine's matter
        assert report.totals["accepted"] == report.totals["sent"] == report.kids[kid]["accepted"] == sum(parts)
        assert 8 <= report.kids[kid]["issued"] <= 16
        assert [gateway.connections for gateway in gateways] == [8, 8]

    def test_a_rejected_valid_token_is_counted_and_shown(self, make_traffic: MakeTraffic, gateways: list[Gateway], kid: str) -> None:
        """With the gateway, the kid, the token's age and what the gateway said; at most 50 times."""
        gateways[1].refused.add(kid)
        traffic = make_traffic()
        traffic.wait_until(lambda report: report.rejected() > 60)
        report = traffic.stop()
        assert report.rejected() == report.content["gateways"][gateways[1].url]["rejected"]
        assert report.content["gateways"][gateways[0].url]["rejected"] == 0
        assert report.rejected(besides=[kid]) == 0
        assert len(report.content["examples"]) == 50
        example = report.content["examples"][0]
        assert (example["gateway"], example["kid"], example["status"]) == (gateways[1].url, kid, 401)
        assert 0 <= example["age"] < 30
        assert example["body"].startswith("Jwks doesn't have key")

    def test_an_answer_that_says_nothing_about_the_token_stands_apart(self, make_traffic: MakeTraffic, gateways: list[Gateway], kid: str) -> None:
        """A 503 is no rejection."""
        gateways[0].refused.add(kid)
        gateways[0].refusal = 503
        report = make_traffic().wait_until(lambda report: report.totals["other"] > 10)
        assert report.rejected() == 0

    def test_a_refused_connection_stands_apart(self, make_traffic: MakeTraffic, gateways: list[Gateway], kid: str) -> None:
        """It is no rejection, the other gateway's part goes on, and so does this one's when it is back."""
        away = gateways[1].url
        gateways[1].stop()
        traffic = make_traffic()
        report = traffic.wait_until(lambda report: report.totals["errors"] > 20)
        assert report.rejected() == 0
        assert report.content["gateways"][gateways[0].url]["accepted"] > 10
        gateways[1] = Gateway(gateways[1].server_address[1])
        traffic.wait_until(lambda report: report.content["gateways"][away]["accepted"] > 10)

    def test_no_token_is_no_request(self, make_traffic: MakeTraffic, service: Identity) -> None:
        """What could not be sent is counted, as are the failures of the token endpoint; it is asked again."""
        service.meets(token={"status": 503})
        traffic = make_traffic()
        report = traffic.wait_until(lambda report: report.totals["without_token"] > 10)
        assert report.totals["sent"] == 0
        assert report.totals["token_errors"] > 0
        service.meets()
        traffic.wait_until(sent(10))

    @pytest.mark.parametrize(
        ("status", "left", "outcome"),
        [
            (200, 9.0, "accepted"),
            (204, 0.1, "accepted"),
            (401, 1.0, "rejected"),
            (403, 9.0, "rejected"),
            (401, 0.999, "expired"),
            (403, -1.0, "expired"),
            (302, 9.0, "other"),
            (429, 9.0, "other"),
            (503, 9.0, "other"),
        ],
    )
    def test_only_a_valid_token_can_be_rejected(self, status: int, left: float, outcome: str) -> None:
        """It has the margin to live, at least, when it is sent."""
        token = Token("", "", 0.0, 1_000.0)
        assert judge(status, token, sent_at=1_000.0 - left, margin=1.0) == outcome


class TestTokens:
    def test_they_are_renewed_before_they_expire(self, make_traffic: MakeTraffic, make_identity: MakeIdentity, kid: str) -> None:
        """No client is ever without one, none is used at its end."""
        traffic = make_traffic(clients=4, token_url=make_identity(token_lifetime=3).token_url)
        report = traffic.wait_until(lambda report: sum(its["issued"] for its in report.kids.values()) >= 8)
        assert (report.totals["without_token"], report.totals["expired"], report.rejected()) == (0, 0, 0)

    @pytest.mark.parametrize("renew", [False, True])
    def test_a_client_may_renew_when_rejected(
        self,
        make_traffic: MakeTraffic,
        gateways: list[Gateway],
        database: Database,
        make_key: MakeKey,
        kid: str,
        renew: bool,
    ) -> None:
        """One that does loses one request and goes on with the new key; one that does not, stays with the old token."""
        traffic = make_traffic(clients=4, renew_when_rejected=renew)
        traffic.wait_until(sent(20))
        new = make_key(promoted=True)
        for gateway in gateways:
            gateway.refused.add(kid)
        report = traffic.wait_until(lambda report: report.rejected() >= 4)
        report = traffic.wait_until(sent(report.totals["sent"] + 40))
        assert (report.rejected() > 4) is not renew
        assert (new in report.kids) is renew


class TestReport:
    def test_it_tells_when_a_key_was_last_accepted(self, make_traffic: MakeTraffic, gateways: list[Gateway], kid: str) -> None:
        """To the millisecond: the last acceptance anywhere is what an emergency is measured by."""
        traffic = make_traffic()
        traffic.wait_until(sent(50))
        gateways[0].refused.add(kid)
        first = time.time()
        traffic.wait_until(lambda report: report.rejected() > 0)
        gateways[1].refused.add(kid)
        last = time.time()
        report = traffic.wait_until(lambda report: report.rejected() > 50)
        accepted = report.last_accepted([kid, "unknown"])
        assert accepted is not None
        assert first < accepted.timestamp() < last + 0.2
        assert report.kids[kid]["last_accepted_by"] == gateways[1].url
        stopped = report.content["gateways"][gateways[0].url]["kids"][kid]["last_accepted_at"]
        assert instant(stopped) < first + 0.2
        assert report.last_accepted(["unknown"]) is None

    def test_its_timeline_adds_up(self, make_traffic: MakeTraffic, gateways: list[Gateway], make_key: MakeKey, kid: str) -> None:
        """Second by second and kid by kid, nothing is missing."""
        gateways[0].refused.add(kid)
        traffic = make_traffic(renew_when_rejected=True)
        traffic.wait_until(sent(20))
        new = make_key(promoted=True)
        traffic.wait_until(lambda report: new in report.kids)
        report = traffic.stop()
        timeline = report.content["timeline"]
        for counted in ("sent", "accepted", "rejected"):
            for its in (kid, new):
                assert sum(second["kids"].get(its, {counted: 0})[counted] for second in timeline) == (report.kids[its][counted])
        assert [second["at"] for second in timeline] == sorted({second["at"] for second in timeline})

    def test_it_is_whole_at_any_time_and_finished_at_the_end(self, make_traffic: MakeTraffic) -> None:
        """A reader never finds half a file, nor an old one."""
        traffic = make_traffic()
        while (report := traffic.read()).totals["sent"] == 0:
            assert not report.finished
        assert traffic.stop().finished

    def test_no_secret_stands_in_it_or_on_the_command_line(self, make_traffic: MakeTraffic, service: Identity) -> None:
        """The client's secret travels in the environment."""
        traffic = make_traffic()
        traffic.wait_until(sent(10))
        command = subprocess.run(["ps", "-o", "args=", "-p", str(traffic.pid)], capture_output=True, text=True, check=True).stdout
        traffic.stop()
        assert "--token-url" in command
        assert service.config.client_secret not in command + traffic.report_path.read_text()


def test_it_needs_its_gateways_named() -> None:
    """A usage error, not a run that measures nothing."""
    asked = [
        sys.executable,
        "-m",
        "sandbox.traffic",
        "--token-url=http://127.0.0.1:9/",
        "--client-id=x",
        "--report=/dev/null",
    ]
    assert subprocess.run(asked, capture_output=True, check=False).returncode == 2


def instant(shown: str) -> float:
    """Seconds since the epoch."""
    return datetime.fromisoformat(shown).astimezone(UTC).timestamp()
