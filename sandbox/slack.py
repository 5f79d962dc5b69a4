"""Owns the Slack of the sandbox: an inbox on loopback that the real slack-sdk client and incoming webhooks post to.

    python -m sandbox.slack --port P --token-file F [--channel NAME …]

    /api/auth.test, /api/chat.postMessage, /api/chat.update   as Slack's Web API: form or JSON, its answers, its errors
    POST /services/…     an incoming webhook, answers `ok`
    GET  /messages       every message, oldest first: [{channel, ts, thread_ts, text, blocks}, …]
    POST /_faults        what the next calls meet, in place of what was set before:
                         {"status": 429, "times": 3, "retry_after": 1}   {"status": 500, "times": 1}   {"delay": 2}
                         {"error": "channel_not_found"}; without `times` all calls meet it; {} ends it

Without `--channel` every channel exists. Messages live as long as the process. The token file is read at each call.
"""

import argparse
import json
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

# https://docs.slack.dev: chat.postMessage and the block reference. What is longer is refused, not cut.
_TEXT_LIMIT = 40_000
_BLOCKS_LIMIT = 50
_BLOCK_TEXT_LIMIT = {"header": 150, "section": 3000}

_TEAM = {
    "team": "Sandbox",
    "team_id": "T0SANDBOX",
    "user": "keyrotation",
    "user_id": "U0SANDBOX",
    "bot_id": "B0SANDBOX",
}

Answer = dict[str, Any]


class RefusalError(Exception):
    """A call that Slack answers with ok=false; the text is Slack's error code."""


@dataclass(slots=True)
class Faults:
    """What the next calls meet: `take` hands out the fault as often as it was asked for."""

    _fault: dict[str, Any] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def put(self, fault: Mapping[str, Any]) -> None:
        with self._lock:
            self._fault = dict(fault)

    def take(self) -> dict[str, Any]:
        with self._lock:
            if "times" in self._fault:
                if self._fault["times"] <= 0:
                    return {}
                self._fault["times"] -= 1
            return dict(self._fault)


class Inbox:
    """The messages, and the rules by which one is taken in."""

    def __init__(self, channels: Sequence[str]) -> None:
        self._channels = set(channels)
        self._messages: list[dict[str, Any]] = []
        self._lock = threading.Lock()
        self._last_ts = 0

    def messages(self) -> list[dict[str, Any]]:
        with self._lock:
            return [dict(message) for message in self._messages]

    def post(self, call: Mapping[str, Any]) -> Answer:
        """chat.postMessage."""
        channel, content = self._channel(call), _content(call)
        with self._lock:
            message = {"channel": channel, "ts": self._next_ts(), "thread_ts": call.get("thread_ts"), **content}
            self._messages.append(message)
        return {"ok": True, "channel": channel, "ts": message["ts"], "message": _shown(message)}

    def update(self, call: Mapping[str, Any]) -> Answer:
        """chat.update."""
        channel, content = self._channel(call), _content(call)
        with self._lock:
            for message in self._messages:
                if (message["channel"], message["ts"]) == (channel, call.get("ts")):
                    message.update(content)
                    return {"ok": True, **message, "message": _shown(message)}
        raise RefusalError("message_not_found")

    def _channel(self, call: Mapping[str, Any]) -> str:
        channel = str(call.get("channel") or "")
        if not channel or (self._channels and channel not in self._channels):
            raise RefusalError("channel_not_found")
        return channel

    def _next_ts(self) -> str:
        # A message's name within its channel, and its time: never the same twice, always rising.
        self._last_ts = max(self._last_ts + 1, time.time_ns() // 1000)
        seconds, micros = divmod(self._last_ts, 1_000_000)
        return f"{seconds}.{micros:06d}"


class Server(ThreadingHTTPServer):
    """The inbox on a loopback port."""

    daemon_threads = True

    def __init__(self, port: int, token_file: Path, channels: Sequence[str] = ()) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.token_file, self.inbox, self.faults = token_file, Inbox(channels), Faults()

    def handle_error(self, request: Any, client_address: Any) -> None:
        # A client that gave up waiting is part of what is tested; anything else is worth a trace in the log.
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        if path == "/messages":
            self._reply(HTTPStatus.OK, self.server.inbox.messages())
        elif path.startswith("/api/"):
            self._meet_fault_or(self._api, path.removeprefix("/api/"))
        else:
            self._reply(HTTPStatus.NOT_FOUND, {"error": "not_found"})

    def do_POST(self) -> None:
        path = urlsplit(self.path).path
        # Read in any case: what stays unread would be taken for the next request of this connection.
        self._body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if path == "/_faults":
            self._put_faults()
        elif path.startswith("/api/"):
            self._meet_fault_or(self._api, path.removeprefix("/api/"))
        elif path.startswith("/services/"):
            self._meet_fault_or(self._webhook, path)
        else:
            self._reply(HTTPStatus.NOT_FOUND, {"error": "not_found"})

    def log_message(self, format: str, *arguments: Any) -> None:  # noqa: A002 - the name in http.server
        """Nothing: a line for each call would be all the log ever held."""

    def _put_faults(self) -> None:
        self.server.faults.put(json.loads(self._body or b"{}"))
        self._reply(HTTPStatus.OK, {"ok": True})

    def _meet_fault_or(self, answer: Any, what: str) -> None:
        fault = self.server.faults.take()
        time.sleep(fault.get("delay", 0))
        if "status" in fault:
            wait = {"Retry-After": str(fault["retry_after"])} if "retry_after" in fault else {}
            error = "ratelimited" if fault["status"] == HTTPStatus.TOO_MANY_REQUESTS else "internal_error"
            self._reply(fault["status"], {"ok": False, "error": error}, wait)
        elif "error" in fault:
            self._reply(HTTPStatus.OK, {"ok": False, "error": fault["error"]})
        else:
            answer(what)

    def _api(self, method: str) -> None:
        try:
            call = self._call()
            self._check_token(call)
            self._reply(HTTPStatus.OK, self._answer(method, call))
        except RefusalError as refusal:
            self._reply(HTTPStatus.OK, {"ok": False, "error": str(refusal)})

    def _answer(self, method: str, call: Mapping[str, Any]) -> Answer:
        match method:
            case "auth.test":
                return {"ok": True, "url": f"http://{self.headers.get('Host', '')}/", **_TEAM}
            case "chat.postMessage":
                return self.server.inbox.post(call)
            case "chat.update":
                return self.server.inbox.update(call)
            case _:
                raise RefusalError("unknown_method")

    def _webhook(self, path: str) -> None:
        # A webhook is bound to its channel; its address stands for it here, unless the payload names one.
        try:
            call = self._call()
            self.server.inbox.post({"channel": path, **call})
        except RefusalError as refusal:
            self._reply(HTTPStatus.BAD_REQUEST, str(refusal))
        else:
            self._reply(HTTPStatus.OK, "ok")

    def _check_token(self, call: Mapping[str, Any]) -> None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ") or str(call.get("token") or "")
        if not token:
            raise RefusalError("not_authed")
        if token != self.server.token_file.read_text().strip():
            raise RefusalError("invalid_auth")

    def _call(self) -> dict[str, Any]:
        """The arguments, of the query and of the body, whichever way they were sent."""
        arguments: dict[str, Any] = dict(parse_qsl(urlsplit(self.path).query))
        body = getattr(self, "_body", b"")
        if self.headers.get("Content-Type", "").startswith("application/json"):
            return arguments | _json_object(body)
        form = dict(parse_qsl(body.decode(errors="replace"), keep_blank_values=True))
        return arguments | form | (_json_object(form["payload"].encode()) if "payload" in form else {})

    def _reply(self, status: int, content: Any, headers: Mapping[str, str] | None = None) -> None:
        plain = isinstance(content, str)
        body = content.encode() if plain else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/plain" if plain else "application/json; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m sandbox.slack", description="A Slack inbox on loopback.")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--token-file", type=Path, required=True)
    parser.add_argument("--channel", action="append", default=[], help="a channel that exists; without any, all do")
    arguments = parser.parse_args()
    asked_to_end = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: asked_to_end.set())
    server = Server(arguments.port, arguments.token_file, arguments.channel)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    asked_to_end.wait()
    server.shutdown()


def _content(call: Mapping[str, Any]) -> dict[str, Any]:
    text, blocks = str(call.get("text") or ""), _blocks(call.get("blocks"))
    if not text and not blocks:
        raise RefusalError("no_text")
    if len(text) > _TEXT_LIMIT:
        raise RefusalError("msg_too_long")
    return {"text": text, "blocks": blocks}


def _blocks(sent: Any) -> list[Any]:
    try:
        blocks = json.loads(sent) if isinstance(sent, str) and sent else sent or []
    except json.JSONDecodeError:
        raise RefusalError("invalid_blocks_format") from None
    if not isinstance(blocks, list) or not all(isinstance(block, dict) and "type" in block for block in blocks):
        raise RefusalError("invalid_blocks_format")
    if len(blocks) > _BLOCKS_LIMIT or any(map(_is_too_long, blocks)):
        raise RefusalError("invalid_blocks")
    return blocks


def _is_too_long(block: Mapping[str, Any]) -> bool:
    text = block.get("text")
    limit = _BLOCK_TEXT_LIMIT.get(block["type"])
    return limit is not None and isinstance(text, dict) and len(str(text.get("text", ""))) > limit


def _json_object(body: bytes) -> dict[str, Any]:
    try:
        value = json.loads(body or b"{}")
    except ValueError:
        raise RefusalError("invalid_json") from None
    if not isinstance(value, dict):
        raise RefusalError("json_not_object")
    return value


def _shown(message: Mapping[str, Any]) -> Answer:
    """The message as Slack's answers show it: without a thread, there is no thread_ts at all."""
    about = {"type": "message", "subtype": "bot_message", "bot_id": _TEAM["bot_id"]}
    return about | {name: value for name, value in message.items() if name != "channel" and value is not None}


if __name__ == "__main__":
    main()
