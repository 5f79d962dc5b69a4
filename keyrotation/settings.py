"""One TOML file per environment, typed and refused when wrong. A secret is a reference, never a value.

Owns: the names and shapes of the settings, their defaults, the sums that must work. Leaves to others: what they are used for (wiring).
Durations are "48h", "15m", "20s", "500ms", "7d". Errors are one sentence that names the file, the setting and the next thing to do.
"""

from __future__ import annotations

import logging
import os
import re
import tomllib
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from keyrotation.domain.errors import SettingsError
from keyrotation.domain.policy import Policy, show
from keyrotation.secrets import SecretRef

log = logging.getLogger(__name__)

ENVIRONMENTS = "KEYROTATION_ENVIRONMENTS"
DEFAULT_FOLDER = Path(__file__).resolve().parent.parent / "deployments" / "environments"
NAME = re.compile(r"[a-z][a-z0-9-]{0,62}")
# Sums of durations are added to dates: one that leads beyond the calendar would fail at 3 a.m. and not when the file is loaded.
LONGEST = timedelta(days=3660)
UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
# Where a secret store with one shared password is good enough, and where the local sealer may run.
PLAYGROUNDS = ("development", "sandbox")


def parse_duration(value: object) -> timedelta:
    """A duration from "48h", "15m", "20s", "500ms" or "7d"; raises ValueError for anything else, a bare number too."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)", value.strip()) if isinstance(value, str) else None
    if match is None:
        raise ValueError(f'{value!r} is not a duration: write a number with a unit in quotes, like "48h", "15m", "20s" or "7d"')
    seconds = float(match[1]) * UNITS[match[2]]
    if seconds > LONGEST.total_seconds():
        raise ValueError(f"a duration is {show(LONGEST)} at the longest")
    return timedelta(seconds=seconds)


def _positive(value: object) -> timedelta:
    duration = parse_duration(value)
    if duration <= timedelta(0):
        raise ValueError("a duration must be positive here")
    return duration


def _secret(value: object) -> SecretRef:
    if not isinstance(value, str):
        raise ValueError('a secret is a reference in quotes: "env:NAME", "file:/path" or "prefect:block-name"')  # noqa: TRY004  pydantic turns ValueErrors into answers
    return SecretRef.parse(value)


def _url(value: str) -> str:
    try:
        parts = urlsplit(value)
        whole = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0 and not re.search(r"[\s@]", value)
    except ValueError:
        whole = False
    if not whole:
        raise ValueError("a URL reads https://host/path (or http:, with a port where it needs one), without a user or password")
    return value


Duration = Annotated[timedelta, BeforeValidator(_positive)]
DurationOrZero = Annotated[timedelta, BeforeValidator(parse_duration)]
Secret = Annotated[SecretRef, BeforeValidator(_secret)]
Url = Annotated[str, AfterValidator(_url)]


class Section(BaseModel):
    """A table of the file: unknown names are refused, nothing changes after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True, hide_input_in_errors=True)


class Refresh(Section):
    """One rung of the ladder that makes a cache forget: nudge (a token with an unknown kid), push (Envoy's file ECDS), webhook."""

    kind: Literal["nudge", "push", "webhook"]
    files: tuple[Path, ...] = ()
    url: Url | None = None
    secret: Secret | None = None
    timeout: Duration = timedelta(seconds=30)

    @model_validator(mode="after")
    def _is_whole(self) -> Refresh:
        if self.kind == "push" and not self.files:
            raise ValueError("a push needs files = [the ECDS file of each gateway, in the order of gateways.urls]")
        if self.kind == "webhook" and self.url is None:
            raise ValueError("a webhook needs its url")
        return self


class Identity(Section):
    """The identity service: where its JWKS and tokens come from."""

    url: Url
    jwks_url: Url
    token_url: Url
    issuer: str
    admin_token: Secret | None = None
    client_id: str
    client_secret: Secret
    scope: str = "api"
    key_cache: DurationOrZero
    shared_cache: bool = False
    max_age_limit: Duration = timedelta(hours=1)
    refresh: tuple[Refresh, ...] = ()


class Database(Section):
    """The identity service's database, by role."""

    url: Secret
    cleaner_url: Secret
    auditor_url: Secret | None = None


class Sealer(Section):
    """What encrypts the private halves."""

    kind: Literal["google-kms", "vault", "local"]
    key: str
    endpoint: str | None = None
    token: Secret | None = None

    @model_validator(mode="after")
    def _is_whole(self) -> Sealer:
        if self.kind == "google-kms" and not re.fullmatch(r"projects/[^/]+/locations/[^/]+/keyRings/[^/]+/cryptoKeys/[^/]+", self.key):
            raise ValueError("key must read projects/…/locations/…/keyRings/…/cryptoKeys/…")
        if self.kind == "vault" and (self.endpoint is None or self.token is None):
            raise ValueError("vault needs its endpoint (a URL) and a token")
        return self


class Gateways(Section):
    """What verifies the tokens."""

    urls: tuple[Url, ...] = ()
    probe_path: str | None = Field(default=None, pattern=r"^/[^\s?#]*$")
    canary_audience: str = "key-rotation-canary"
    cache_time: Duration
    workers: int = Field(default=1, ge=1, le=1024)
    canary_shortens_wait: bool = False
    refresh: tuple[Refresh, ...] = ()

    @model_validator(mode="after")
    def _pushes_reach_all(self) -> Gateways:
        for rung in self.refresh:
            if rung.kind == "push" and len(rung.files) != len(self.urls):
                raise ValueError(f"gateways.refresh: a push names {len(rung.files)} files for {len(self.urls)} gateways; it needs one each")
        if self.canary_shortens_wait and self.probe_path is None:
            raise ValueError("gateways.canary_shortens_wait needs a gateways.probe_path: without one there is no canary")
        return self


class PolicySection(Section):
    """How long things live and wait."""

    cleanup: Literal["automatic", "manual"] = "automatic"
    cleanup_after: Duration = timedelta(hours=48)
    token_lifetime: Duration
    clock_skew: DurationOrZero = timedelta(seconds=30)
    rotate_every: Duration
    max_key_age: Duration
    keep_standby: bool = False
    watch_after_emergency: Duration = timedelta(minutes=5)
    lease: Duration = timedelta(seconds=60)


class Slack(Section):
    """Where people are told. Without the section nobody is."""

    token: Secret | None = None
    webhook: Secret | None = None
    channel: str = "#key-rotation"
    base_url: Url | None = None

    @model_validator(mode="after")
    def _has_a_way(self) -> Slack:
        if (self.token is None) == (self.webhook is None):
            raise ValueError("give either a bot token (threads) or a webhook (single messages)")
        return self


class Prefect(Section):
    """Prefect's API, for the shell and for links in messages."""

    api_url: Url
    ui_url: Url | None = None


class Audit(Section):
    """Where the ledger's head is put outside the database."""

    head_file: Path


class Tombstones(Section):
    """Where compromised kids are written outside the database."""

    path: Path


class Metrics(Section):
    """Where figures about the gateways come from."""

    prometheus_url: Url
    queries: dict[str, str] = Field(default_factory=dict)


class Settings(Section):
    """An environment's file."""

    authority: Literal["database", "api"] = "database"
    identity: Identity
    database: Database
    sealer: Sealer | None = None
    gateways: Gateways
    policy: PolicySection
    slack: Slack | None = None
    prefect: Prefect | None = None
    audit: Audit | None = None
    tombstones: Tombstones | None = None
    metrics: Metrics | None = None
    name: str = ""

    @field_validator("name")
    @classmethod
    def _not_in_the_file(cls, value: str) -> str:
        if value:
            raise ValueError("the environment's name is the file's name")
        return value

    @model_validator(mode="after")
    def _works(self) -> Settings:
        if self.authority == "database" and self.sealer is None:
            raise ValueError('authority = "database" makes the keys itself and needs a [sealer] to encrypt them')
        if self.authority == "api" and self.identity.admin_token is None:
            raise ValueError('authority = "api" needs identity.admin_token for the admin endpoints')
        policy = self.to_policy()
        if policy.rotate_every < policy.shortest_interval():
            raise ValueError(
                f"policy.rotate_every {show(policy.rotate_every)} is shorter than one rotation's waits, {show(policy.shortest_interval())} (twice identity.key_cache, "
                "gateways.cache_time, policy.clock_skew, policy.lease, and identity.max_age_limit where the cache is shared): rotate less often, or shorten those"
            )
        if policy.max_key_age < policy.rotate_every:
            raise ValueError(
                f"policy.max_key_age {show(policy.max_key_age)} is below policy.rotate_every {show(policy.rotate_every)}: every key would be too old in time"
            )
        return self

    def to_policy(self) -> Policy:
        """The durations as the domain knows them."""
        return Policy(
            rotate_every=self.policy.rotate_every,
            max_key_age=self.policy.max_key_age,
            token_lifetime=self.policy.token_lifetime,
            clock_skew=self.policy.clock_skew,
            cleanup_after=self.policy.cleanup_after,
            cache_time=self.gateways.cache_time,
            key_cache=self.identity.key_cache,
            max_age_limit=self.identity.max_age_limit,
            shared_cache=self.identity.shared_cache,
            canary_shortens_wait=self.gateways.canary_shortens_wait,
            keep_standby=self.policy.keep_standby,
            cleanup=self.policy.cleanup,
            lease=self.policy.lease,
        )

    def warnings(self) -> list[str]:
        """What works, but not as written."""
        policy = self.to_policy()
        needed = sum((term for _, term in policy.retention()), timedelta(0))
        if policy.cleanup_after >= needed:
            return []
        return [f"policy.cleanup_after {show(policy.cleanup_after)} is raised to {show(needed)}: tokens of the old key may live that long"]


def folder() -> Path:
    """Where the environments' files lie."""
    return Path(os.environ.get(ENVIRONMENTS) or DEFAULT_FOLDER)


def load(environment: str) -> Settings:
    """The settings of that environment; raises SettingsError with one sentence."""
    path = _path(environment)
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        there = ", ".join(sorted(file.stem for file in path.parent.glob("*.toml"))) or "none"
        raise SettingsError(
            f"there is no environment {environment!r} in {path.parent} (there are: {there}); set {ENVIRONMENTS} if its file lies elsewhere"
        ) from None
    except (OSError, UnicodeDecodeError, RecursionError, tomllib.TOMLDecodeError) as error:
        raise SettingsError(f"{path} cannot be read: {error}") from None
    try:
        settings = Settings.model_validate(document)
    except ValidationError as error:
        raise SettingsError(f"{path}: {_first(error)}") from None
    _refuse_unfit_secrets(environment, settings)
    for warning in settings.warnings():
        log.warning("%s: %s", path, warning)
    return settings.model_copy(update={"name": environment})


def _path(environment: str) -> Path:
    if not NAME.fullmatch(environment):
        raise SettingsError(f"{environment[:60]!r} is not an environment's name: lower-case letters, digits and hyphens")
    return folder() / f"{environment}.toml"


def _first(error: ValidationError) -> str:
    """The first complaint, without the value that caused it (it could be a secret in the wrong place)."""
    problem: Any = error.errors(include_url=False, include_input=False)[0]
    name = ".".join(str(part) for part in problem["loc"])
    count = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if problem["type"] == "extra_forbidden":
        return f"{name} is not a setting: see docs/settings.md for those there are{count}"
    if problem["type"] == "missing":
        return f"{name} is missing: see docs/settings.md{count}"
    text = problem["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    return f"{name}: {text}{count}" if name else f"{text}{count}"


def _refuse_unfit_secrets(environment: str, settings: Settings) -> None:
    if environment in PLAYGROUNDS:
        return
    held = {
        "database.url": settings.database.url,
        "database.cleaner_url": settings.database.cleaner_url,
        "database.auditor_url": settings.database.auditor_url,
        "identity.client_secret": settings.identity.client_secret,
        "identity.admin_token": settings.identity.admin_token,
    }
    for name, secret in held.items():
        if secret is not None and secret.kind == "prefect":
            raise SettingsError(f"{environment}: {name} may not lie in a Prefect block: one shared password reads all blocks; use env: or file:")
    if settings.sealer is not None and settings.sealer.kind == "local":
        raise SettingsError(
            f"{environment}: the local sealer keeps its key beside the data and is refused outside {' and '.join(PLAYGROUNDS)}; use google-kms or vault"
        )


def require_named(settings: Settings, name_in_database: str | None) -> None:
    """Raises SettingsError where the database belongs to another environment (F66)."""
    if name_in_database != settings.name:
        raise SettingsError(f"the file is for {settings.name!r}, its database for {name_in_database!r}: check database.url; nothing was changed")
