"""Settings to adapters: the only place that names concrete ones. Nothing connects here, nothing is imported that is not used."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

from keyrotation.adapters.api_authority import ApiAuthority
from keyrotation.adapters.database_authority import CanaryTerms, DatabaseAuthority
from keyrotation.adapters.gateways import HttpGateways
from keyrotation.adapters.google_kms import GoogleKmsSealer
from keyrotation.adapters.head_file import HeadFile
from keyrotation.adapters.identity_api import HttpIdentity
from keyrotation.adapters.key_store import PostgresCleaner, PostgresKeyStore, PostgresRecords
from keyrotation.adapters.local_sealer import LocalSealer
from keyrotation.adapters.refresh import Nudge, Push, Webhook
from keyrotation.adapters.slack import SlackAnnouncer, SlackWebhook
from keyrotation.adapters.vault import VaultSealer
from keyrotation.connections.database import Database
from keyrotation.domain.errors import SettingsError
from keyrotation.ports import Announcer, Authority, Environment, KeyStore, Refresher, Sealer
from keyrotation.settings import Refresh, Settings, load, require_named

# A canary outlives its key's longest life by a week: an emergency needs one that is not expired.
CANARY_MARGIN = timedelta(days=7)


def connect(name: str) -> Environment:
    """The environment of that name; raises SettingsError, also where its database belongs to another one."""
    settings = load(name)
    env = wire(settings)
    require_named(settings, env.keys.environment_name())
    return env


def wire(settings: Settings) -> Environment:
    """The parts, not connected yet."""
    keys = PostgresKeyStore(Database(settings.database.url, "rotator"), settings.name, settings.policy.lease)
    sealer = _sealer(settings)
    identity = settings.identity
    return Environment(
        name=settings.name,
        policy=settings.to_policy(),
        workers=settings.gateways.workers,
        keys=keys,
        cleaner=PostgresCleaner(Database(settings.database.cleaner_url, "cleaner"), settings.name),
        records=PostgresRecords(Database(settings.database.auditor_url or settings.database.url, "auditor"), settings.name),
        authority=_authority(settings, keys, sealer),
        sealer=sealer,
        identity=HttpIdentity(identity.jwks_url, identity.token_url, identity.issuer, identity.client_id, identity.client_secret, identity.scope),
        gateways=HttpGateways(settings.gateways.urls, settings.gateways.probe_path),
        ladder=tuple(_rung(rung, settings) for rung in settings.gateways.refresh),
        announcer=_announcer(settings),
        head=HeadFile(settings.audit.head_file) if settings.audit else None,
    )


def _authority(settings: Settings, keys: KeyStore, sealer: Sealer | None) -> Authority:
    if settings.authority == "api" and settings.identity.admin_token is not None:
        return ApiAuthority(settings.identity.url, settings.identity.admin_token, keys)
    if sealer is None:
        raise SettingsError('authority = "database" needs a [sealer]')
    return DatabaseAuthority(settings.name, keys, sealer, _canaries(settings))


def _canaries(settings: Settings) -> CanaryTerms | None:
    if settings.gateways.probe_path is None:
        return None
    lifetime = settings.policy.max_key_age + settings.policy.cleanup_after + CANARY_MARGIN
    return CanaryTerms(settings.identity.issuer, settings.gateways.canary_audience, lifetime, settings.gateways.workers)


def _sealer(settings: Settings) -> Sealer | None:
    sealer = settings.sealer
    if sealer is None:
        return None
    match sealer.kind:
        case "google-kms":
            return GoogleKmsSealer(sealer.key, sealer.endpoint, sealer.token)
        case "vault":
            if sealer.endpoint is None or sealer.token is None:
                raise SettingsError("a vault sealer needs its endpoint and token")
            return VaultSealer(sealer.endpoint, sealer.token, sealer.key)
        case "local":
            return LocalSealer(Path(sealer.key))


def _rung(rung: Refresh, settings: Settings) -> Refresher:
    if rung.kind == "nudge":
        return Nudge(settings.gateways.urls, settings.gateways.probe_path, settings.identity.issuer, settings.gateways.canary_audience)
    if rung.kind == "push":
        return Push(settings.gateways.urls, rung.files)
    if rung.url is None:
        raise SettingsError("a webhook needs its url")
    return Webhook(rung.url, rung.secret, rung.timeout)


def _announcer(settings: Settings) -> Announcer | None:
    slack = settings.slack
    if slack is None:
        return None
    if slack.webhook is not None:
        return SlackWebhook(slack.webhook)
    if slack.token is None:
        raise SettingsError("[slack] needs a token or a webhook")
    return SlackAnnouncer(slack.token, slack.channel, slack.base_url)
