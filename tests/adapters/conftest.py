"""A peer on loopback that does what a test says: answers, redirects, drips, hangs up, or hands the request on to somebody real. It counts everything."""

from __future__ import annotations

import socketserver
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal

import pytest

from keyrotation.secrets import SecretRef


@dataclass(frozen=True)
class Asked:
    """A request that reached the peer."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes


@dataclass(frozen=True)
class Reply:
    """What the peer answers. `drip`: one octet at a time, for ever. `cut`: hangs up without an answer."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    drip: Literal["", "headers", "body"] = ""
    cut: bool = False
    date: str | None = "Tue, 06 Jan 2026 03:00:00 GMT"


class Peer(ThreadingHTTPServer):
    """`answers` decides what each request gets; `asked` and `connections` are what came."""

    daemon_threads = True
    request_queue_size = 256

    def __init__(self) -> None:
        self.asked: list[Asked] = []
        self.connections = 0
        self.answers: Callable[[Asked], Reply] = lambda asked: Reply()
        self.over = threading.Event()
        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # HTTPServer's own asks the name service for our name
        self.server_name, self.server_port = "127.0.0.1", int(self.server_address[1])

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def says(self, status: int = 200, body: bytes | str = b"", **more: Any) -> None:
        """The same answer to everybody."""
        reply = Reply(status, body.encode() if isinstance(body, str) else body, **more)
        self.answers = lambda asked: reply

    def get_request(self) -> Any:
        self.connections += 1
        return super().get_request()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hung up is no news."""

    def stop(self) -> None:
        self.over.set()
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Peer

    def do_GET(self) -> None:
        asked = Asked(self.command, self.path, dict(self.headers.items()), self.rfile.read(int(self.headers.get("Content-Length", 0))))
        self.server.asked.append(asked)
        reply = self.server.answers(asked)
        self.close_connection = reply.cut or bool(reply.drip) or self.close_connection
        if reply.drip == "headers":
            self._drip(b"HTTP/1.1 200 OK\r\nX-Slow: ")
        elif reply.drip == "body":
            self._drip(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
        elif not reply.cut:
            self._send(reply)

    def do_POST(self) -> None:
        self.do_GET()

    def _send(self, reply: Reply) -> None:
        self.send_response_only(reply.status)
        for name, value in {**({"Date": reply.date} if reply.date is not None else {}), "Content-Length": str(len(reply.body)), **reply.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(reply.body)

    def _drip(self, head: bytes) -> None:
        self.wfile.write(head)
        while not self.server.over.wait(0.02):
            self.wfile.write(b".")

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


@pytest.fixture
def make_peer() -> Iterator[Callable[[], Peer]]:
    running: list[Peer] = []

    def make() -> Peer:
        running.append(Peer())
        return running[-1]

    yield make
    for each in running:
        each.stop()


@pytest.fixture
def peer(make_peer: Callable[[], Peer]) -> Peer:
    return make_peer()


@pytest.fixture
def secret(tmp_path: Path) -> Callable[[str], SecretRef]:
    """Puts a secret into a file and gives the reference to it."""

    def keep(text: str) -> SecretRef:
        path = tmp_path / f"secret-{len(list(tmp_path.iterdir()))}"
        path.write_text(text)
        return SecretRef("file", str(path))

    return keep
