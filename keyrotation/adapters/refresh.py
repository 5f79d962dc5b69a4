"""The rungs of the ladder that makes gateways forget a cached JWKS (ports.Refresher): nudge, push, webhook.

Owns: how each rung is climbed, and what it can say about it. Leaves to others: which gateway needs it, and the proof that it helped, which
alone counts (steps): a rung that went well says that it was done, never that a gateway knows a key.

Gateways are named by their URLs, as everywhere. A gateway that cannot be refreshed keeps no other from being refreshed: all are tried, then
the failure is told.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit, urlunsplit

import jwt
from cryptography.hazmat.primitives.asymmetric import ec

from keyrotation.connections.http import exchange, place
from keyrotation.domain.errors import BadAnswer, Denied, SettingsError, Unreachable, WorldError
from keyrotation.secrets import SecretRef

T = TypeVar("T")

AT_ONCE = 16  # gateways; in an emergency, dead ones must not cost their timeouts one after the other
# A nudge looks like a canary up to its signature, so that nothing refuses it before its key is looked for.
CANARY_TYPE = "canary+jwt"
# 2100-01-01. The worker's clock may be wrong by years (I18), and an expired token is refused before its key is looked for. It can wait so
# long because nobody will ever accept it: its private key is gone before it is sent.
NEVER = 4102444800
SIGNATURE, TIMESTAMP = "X-Signature-256", "X-Timestamp"


class Nudge:
    """One token with an unknown kid to each gateway: a verifier that refetches on one forgets what it knew, for free."""

    kind = "nudge"

    def __init__(self, urls: Sequence[str], probe_path: str | None, issuer: str, audience: str) -> None:
        """The probe's `audience` is the canaries'. Without a probe path, the token goes to the gateway's URL itself."""
        self._targets = {url: urlunsplit(urlsplit(url)._replace(path=probe_path, query="")) if probe_path else url for url in urls}
        self._issuer, self._audience = issuer, audience

    def refresh(self, gateways: Sequence[str]) -> str:
        """Sends one token to each; raises WorldError where a gateway did not come as far as looking for the key."""
        _each(gateways, self._nudge)
        return f"nudged {_list(gateways)} by a token with an unknown kid"

    def _nudge(self, gateway: str) -> None:
        target = _known(self._targets, gateway, "gateways.urls")
        answer = exchange("GET", target, headers={"Authorization": f"Bearer {self._token()}"})
        if answer.status == 200:
            raise BadAnswer(f"{place(target)} accepts a token of a key that nobody has published: it does not verify signatures; see to that at once")
        if answer.status != 401:
            raise BadAnswer(
                f"{place(target)} answered the nudge with HTTP {answer.status} and may not have looked for its key: check probe_path and canary_audience"
            )

    def _token(self) -> str:
        # A pair of its own for each token: two gateways that share a cache are both shown a kid that is new to them.
        claims = {"iss": self._issuer, "aud": self._audience, "exp": NEVER, "jti": secrets.token_urlsafe(9)}
        header = {"kid": secrets.token_urlsafe(32), "typ": CANARY_TYPE}
        return jwt.encode(claims, ec.generate_private_key(ec.SECP256R1()), algorithm="ES256", headers=header)


class Push:
    """A changed configuration for each Envoy: its jwt_authn, delivered by file (ECDS), empties its caches and cuts no connection.

    What changes is the query `flush` of the JWKS URI. Envoy takes notice of a rename only, and of a file only if it differs.
    """

    kind = "push"

    def __init__(self, gateways: Sequence[str], files: Sequence[Path]) -> None:
        """One file for each gateway, in the same order."""
        self._files = dict(zip(gateways, files, strict=True))

    def refresh(self, gateways: Sequence[str]) -> str:
        """Puts a changed file in the place of each gateway's; raises WorldError where one cannot be."""
        _each(gateways, self._push)
        return f"pushed a changed configuration to {_list(gateways)}"

    def _push(self, gateway: str) -> None:
        path = _known(self._files, gateway, "gateways.refresh files")
        problem = f"the configuration file {path} of {place(gateway)}"
        if path.is_symlink():
            raise WorldError(f"{problem} is a symbolic link, which a rename would replace: name the file itself")
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            uris = list(_http_uris(document))
            if not uris:
                raise BadAnswer(f"{problem} has no remote_jwks.http_uri.uri: name the file that delivers jwt_authn (ECDS)")
            flush = secrets.token_hex(8)  # never used before, whatever the clock says
            for http_uri in uris:
                http_uri["uri"] = _flushed(http_uri["uri"], flush)
            _replace(path, json.dumps(document, indent=2))
        except FileNotFoundError:
            raise WorldError(f"{problem} is not there: correct gateways.refresh files") from None
        except PermissionError:
            raise Denied(f"{problem} may not be replaced by this user: let it write in that folder, and own the file") from None
        except OSError as error:
            raise WorldError(f"{problem} cannot be replaced ({error.strerror}): mend that, or restart the gateway") from None
        except ValueError:
            raise BadAnswer(f"{problem} is no JSON: Envoy takes JSON, so deliver jwt_authn in that form") from None


class Webhook:
    """A POST to something of the operator's own, which restarts or flushes the gateways it is told.

    The body is {"action": "refresh-jwks", "gateways": [URL, …]}. With a secret, `X-Signature-256: sha256=HEX` is the HMAC-SHA-256 of
    `X-Timestamp` (Unix seconds), a dot and the body; the receiver refuses old timestamps, so that a recorded call cannot be played again.
    """

    kind = "webhook"

    def __init__(self, url: str, secret: SecretRef | None, timeout: timedelta) -> None:
        self._url, self._secret, self._timeout = url, secret, timeout

    def refresh(self, gateways: Sequence[str]) -> str:
        """Calls once and waits for the answer; raises WorldError for anything but a 2xx within the timeout."""
        body = json.dumps({"action": "refresh-jwks", "gateways": list(gateways)}).encode()
        status = exchange("POST", self._url, headers=self._headers(body), data=body, timeout=self._timeout.total_seconds()).status
        if 200 <= status < 300:
            return f"{place(self._url)} was asked to refresh {_list(gateways)} and answered HTTP {status}"
        if status in (401, 403):
            raise Denied(
                f"{place(self._url)} refuses the call (HTTP {status}): check that both sides hold the same secret"
                + (f" ({self._secret})" if self._secret else "")
            )
        if status == 429 or status >= 500:
            raise Unreachable(f"{place(self._url)} failed (HTTP {status}): see its own log; the gateways may have been refreshed or not")
        raise BadAnswer(f"{place(self._url)} answered HTTP {status}: it does not take a POST of that form; nothing was refreshed")

    def _headers(self, body: bytes) -> dict[str, str]:
        timestamp = str(int(time.time()))
        headers = {"Content-Type": "application/json", TIMESTAMP: timestamp}
        if self._secret is None:
            return headers
        try:
            secret = self._secret.reveal().encode()
        except SettingsError as error:
            raise Denied(f"the webhook's call cannot be signed: {error}") from None
        return headers | {SIGNATURE: "sha256=" + hmac.new(secret, f"{timestamp}.".encode() + body, hashlib.sha256).hexdigest()}


def _each(gateways: Sequence[str], act: Callable[[str], None]) -> None:
    """Acts on every gateway, whether or not another one fails, then raises what went wrong."""

    def attempt(gateway: str) -> WorldError | None:
        try:
            act(gateway)
        except WorldError as error:
            return error
        return None

    with ThreadPoolExecutor(AT_ONCE) as pool:
        failed = [error for error in pool.map(attempt, gateways) if error is not None]
    if len(failed) == 1:
        raise failed[0]
    if failed:
        raise WorldError(f"{len(failed)} of {len(gateways)} gateways: " + "; ".join(map(str, failed)), retryable=all(error.retryable for error in failed))


def _known(places: dict[str, T], gateway: str, setting: str) -> T:
    if gateway not in places:
        raise WorldError(f"it is not known how to reach {place(gateway)}: add it to {setting}")
    return places[gateway]


def _http_uris(node: Any) -> Iterator[dict[str, Any]]:
    """Every http_uri of a remote_jwks, however deep. Envoy reads both spellings of a protobuf field."""
    if isinstance(node, list):
        for item in node:
            yield from _http_uris(item)
    if not isinstance(node, dict):
        return
    for name, value in node.items():
        http_uri = _field(value, "http_uri", "httpUri") if name in ("remote_jwks", "remoteJwks") else None
        if isinstance(http_uri, dict) and isinstance(http_uri.get("uri"), str):
            yield http_uri
        yield from _http_uris(value)


def _field(node: Any, *names: str) -> Any:
    return next((node[name] for name in names if name in node), None) if isinstance(node, dict) else None


def _flushed(uri: str, flush: str) -> str:
    """The URI with that flush, the rest of its query untouched."""
    parts = urlsplit(uri)
    kept = [item for item in parts.query.split("&") if item and not item.startswith("flush=")]
    return urlunsplit(parts._replace(query="&".join([*kept, f"flush={flush}"])))


def _replace(path: Path, text: str) -> None:
    """Puts the text in the file's place by a rename, under the same owner and mode."""
    before = path.stat()
    unfinished, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(unfinished, "w", encoding="utf-8") as file:
            file.write(text)
            os.fchmod(file.fileno(), before.st_mode & 0o7777)
            if (before.st_uid, before.st_gid) != (os.geteuid(), os.getegid()):
                os.fchown(file.fileno(), before.st_uid, before.st_gid)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _list(gateways: Sequence[str]) -> str:
    return ", ".join(place(gateway) for gateway in gateways) or "no gateway"
