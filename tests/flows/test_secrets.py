"""I5: no secret stands where it does not belong, in any form. Searched for, after everything that the other tests did."""

from __future__ import annotations

import base64
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest
import requests

from sandbox.postgres import binary
from tests.flows.conftest import Stage

pytestmark = [pytest.mark.world, pytest.mark.xdist_group("flows")]


def forms(secret: bytes) -> Iterator[bytes]:
    """The secret as it might leak: raw, hex, base64, base64url, escaped."""
    yield secret
    yield secret.hex().encode()
    yield base64.b64encode(secret).rstrip(b"=")
    yield base64.urlsafe_b64encode(secret).rstrip(b"=")
    text = secret.decode("latin-1")
    yield quote(text, safe="").encode()
    yield json.dumps(text)[1:-1].encode()


def planted(stage: Stage) -> dict[str, bytes]:
    """What must not be found: every secret of the world, and the canaries."""
    found = {}
    for file in (stage.world.home / "secrets").rglob("*"):
        if file.is_file() and file.suffix != ".json":
            found[file.name] = file.read_bytes().strip()
    found["a fresh token's signature"] = stage.env.identity.fresh_token().raw.rsplit(".", 1)[1].encode()
    for kid, canary in stage.sql("SELECT kid, canaries ->> 0 FROM public.signing_keys WHERE canaries IS NOT NULL"):
        found[f"canary of {kid}"] = canary.rsplit(".", 1)[1].encode()
    for kid, ciphertext in stage.sql("SELECT kid, private_key_ciphertext FROM public.signing_keys WHERE private_key_ciphertext IS NOT NULL"):
        found[f"ciphertext of {kid}"] = bytes(ciphertext)
    return {name: secret for name, secret in found.items() if len(secret) >= 12}


def places(stage: Stage) -> Iterator[tuple[str, bytes]]:
    """Where nothing secret may stand: logs, Prefect's whole database and folder, Slack, the ledger, rotations."""
    for file in (stage.world.home / "logs").iterdir():
        yield f"log {file.name}", file.read_bytes()
    for file in (stage.world.home / "prefect").rglob("*"):
        if file.is_file() and "/ui/" not in str(file):
            yield f"Prefect's file {file.name}", file.read_bytes()
    yield "Slack", requests.get(f"{stage.facts['slack_url']}/messages", timeout=5).content
    yield "ledger", "\n".join(str(entry) for entry in stage.ledger()).encode()
    yield "rotations", str(stage.sql("SELECT * FROM key_rotation.rotations")).encode()
    yield "Prefect's database", prefect_database(stage)


def prefect_database(stage: Stage) -> bytes:
    """All of it, as pg_dump prints it."""
    password = (stage.world.home / "secrets" / "postgres_password").read_text().strip()
    host = stage.facts["owner_database_url"].split("@")[1].split("/")[0]
    dump: list[str | Path] = [binary("pg_dump"), "--data-only", "--dbname", f"postgresql://postgres:{password}@{host}/prefect"]
    return subprocess.run(dump, capture_output=True, check=True).stdout


def test_i05_no_secret_stands_in_logs_prefect_slack_or_the_ledger(stage: Stage) -> None:
    """After a rotation, a roll back's tokens and failed runs: every secret, canary and ciphertext is searched for everywhere, in six forms."""
    assert stage.rotate().is_completed()
    secrets = planted(stage)
    assert len(secrets) > 12
    for place, content in places(stage):
        for name, secret in secrets.items():
            for form in forms(secret):
                assert form not in content, f"{name} stands in {place}"


def test_the_search_would_find_a_secret(stage: Stage) -> None:
    """The search itself works: a secret that is put into Slack is found there."""
    secret = next(iter(planted(stage).values()))
    assert any(form in b"something " + secret.hex().encode() for form in forms(secret))
