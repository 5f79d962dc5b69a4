"""The authority where the identity service makes and promotes its keys, by the runbook's admin endpoints.

A call's answer may be lost after its effect (F20): what happened is then read back from the key table, and nothing is posted twice blindly.
The fence and the waiting rule are asked for right before each call; between that look and the call lies what the service cannot be asked.
"""

from __future__ import annotations

import json
from collections.abc import Callable

from keyrotation.connections.http import Answer, exchange, place
from keyrotation.domain.decision import Rotation
from keyrotation.domain.errors import BadAnswer, Denied, Refused, Superseded, Unreachable, WorldError
from keyrotation.domain.keys import Key, KeyRing
from keyrotation.ports import Gate, KeyStore
from keyrotation.secrets import SecretRef


class ApiAuthority:
    """POST /api/v1/admin/keys/rotate and /{kid}/promote."""

    def __init__(self, url: str, admin_token: SecretRef, keys: KeyStore) -> None:
        self._url, self._admin_token, self._keys = url.rstrip("/"), admin_token, keys

    def generate(self, rotation: Rotation, reason: str) -> str:
        """Asks the service for the next key, at the most once; returns its kid."""
        self._keys.renew(rotation)
        # The key helps a service, or a proxy in between, that knows such keys to answer a repeated request from memory (F21).
        self._post_once(f"{self._url}/api/v1/admin/keys/rotate", f"rotation-{rotation.environment}-{rotation.id}", lambda ring: ring.next is not None)
        made = self._keys.look().ring.next
        if made is None:
            raise BadAnswer(f"{place(self._url)} said that it made a key, but no key of the table is next")
        self._keys.adopt(rotation, made.kid)
        return made.kid

    def promote(self, rotation: Rotation, kid: str, gate: Gate, reason: str) -> None:
        """Asks the service to promote, after the same gate as our own statement's."""
        before = self._keys.look().ring.current
        if not self._keys.gate_is_open(rotation, kid, gate):
            raise Refused(f"key {kid} may not be promoted yet: it is not next, not published long enough, or not shown to be known everywhere")
        # Named before the call: a run that dies right after it must still find the way back, and the key to clean up.
        self._keys.name_promoted(rotation, before.kid if before else None, kid)
        try:
            self._promote(kid)
        except WorldError:
            now = self._keys.look().ring.current
            if before is not None and now is not None and now.kid != before.kid:
                raise Superseded(f"the identity service made key {now.kid} current meanwhile: key {kid} was not promoted by this run") from None
            raise

    def roll_back(self, rotation: Rotation, kid: str, reason: str) -> None:
        """Asks the service to promote the previous key again."""
        failed: Key = self._keys.look().ring.require_current()
        self._keys.renew(rotation)
        if failed.kid == kid:  # done already, by a run that died before it could say so
            self._keys.mark_rolled_back(rotation, self._keys.rotation(rotation.id).new_kid or "")
            return
        self._promote(kid)
        self._keys.mark_rolled_back(rotation, failed.kid)

    def _promote(self, kid: str) -> None:
        def promoted(ring: KeyRing) -> bool:
            return ring.current is not None and ring.current.kid == kid

        self._post_once(f"{self._url}/api/v1/admin/keys/{kid}/promote", None, promoted)
        if not promoted(self._keys.look().ring):
            raise BadAnswer(f"{place(self._url)} said that it promoted key {kid}, but the table has another current key")

    def _post_once(self, url: str, idempotency_key: str | None, happened: Callable[[KeyRing], bool]) -> None:
        """Posts; where the answer says no or is lost, it counts what the table shows."""
        headers = {"Idempotency-Key": idempotency_key} if idempotency_key else {}
        try:
            answer = self._post(url, headers)
        except WorldError:
            if happened(self._keys.look().ring):
                return
            raise
        if answer.status in (200, 201, 202, 204) or happened(self._keys.look().ring):
            return
        raise _refusal(url, answer)

    def _post(self, url: str, headers: dict[str, str]) -> Answer:
        """One POST; a second one only after a 401, with the secret read anew: it may have been renewed since (F24)."""
        answer = self._send(url, headers)
        return self._send(url, headers) if answer.status == 401 else answer

    def _send(self, url: str, headers: dict[str, str]) -> Answer:
        return exchange(
            "POST", url, headers={**headers, "Authorization": f"Bearer {self._admin_token.reveal()}", "Accept": "application/json"}, data=b"", timeout=15
        )


def _refusal(url: str, answer: Answer) -> WorldError:
    if answer.status in (401, 403):
        return Denied(f"the admin API {place(url)} refuses identity.admin_token (HTTP {answer.status}): renew it, then run the rotation again")
    if answer.status >= 500 or answer.status == 429:
        return Unreachable(f"the admin API {place(url)} answers HTTP {answer.status}; no key was changed", retryable=False)
    return BadAnswer(f"the admin API {place(url)} answers HTTP {answer.status}{_said(answer)}; no key was changed")


def _said(answer: Answer) -> str:
    try:
        text = json.loads(answer.body).get("error")
        return f" ({text[:120]})" if isinstance(text, str) else ""
    except (ValueError, AttributeError):
        return ""
