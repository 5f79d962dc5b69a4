"""Owns the sandbox's settings: their defaults, what `--set` changes, and the environment file they end up in.

A setting is one of three kinds: fixed here by default, given by the world once its parts have addresses, or absent
unless somebody sets it. `--set` beats all three, for the file and for the parts alike. Those named `sandbox.…` shape
the world and are not in the file. `--set KEY=` leaves a setting out of the file, as in `--set gateways.probe_path=`.
"""

import difflib
import json
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sandbox.keepsakes import write_private
from sandbox.processes import SandboxError

CANARY_AUDIENCE = "key-rotation-canary"
KMS_KEY = "projects/sandbox/locations/local/keyRings/identity/cryptoKeys/signing"

# What is fixed here. A rotation waits for the gateways' cache, twice: these make it end within a minute.
_DEFAULTS: Mapping[str, Any] = {
    "authority": "database",
    "identity.issuer": "https://identity.sandbox",  # a name, no address: tokens outlive a restart on other ports
    "identity.client_id": "sandbox-client",
    "identity.scope": "api",
    "identity.key_cache": "0s",
    "identity.shared_cache": False,
    "identity.max_age_limit": "10m",
    "identity.refresh": [],
    "sealer.kind": "google-kms",
    "sealer.key": KMS_KEY,
    "gateways.probe_path": "/canary",
    "gateways.canary_audience": CANARY_AUDIENCE,
    "gateways.cache_time": "10s",
    "gateways.workers": 2,
    "gateways.canary_shortens_wait": False,
    "policy.cleanup": "automatic",
    "policy.cleanup_after": "48h",
    "policy.token_lifetime": "30s",
    "policy.clock_skew": "1s",
    "policy.rotate_every": "7d",
    "policy.max_key_age": "30d",
    "policy.keep_standby": False,
    "policy.watch_after_emergency": "3s",
    "policy.lease": "20s",
    "slack.channel": "#key-rotation",
    "sandbox.identity_replicas": 1,
    "sandbox.jwks_max_age": 0,
    "sandbox.gateways": 2,
    "sandbox.on_death": "leave",  # the others live on when a part dies or is killed to see what happens; "end": the world ends
    "sandbox.jwt_cache": False,  # Envoy's cache of tokens that it has verified once
}

# What only the running world knows.
_GIVEN = {
    *("identity.url", "identity.jwks_url", "identity.token_url", "identity.admin_token", "identity.client_secret"),
    *("database.url", "database.cleaner_url", "database.auditor_url", "sealer.endpoint", "sealer.token"),
    *("gateways.urls", "gateways.refresh", "slack.token", "slack.base_url", "prefect.api_url", "prefect.ui_url"),
    *("audit.head_file", "tombstones.path"),
}
_ABSENT = {"metrics.prometheus_url", "metrics.queries"}
KNOWN = frozenset({*_DEFAULTS, *_GIVEN, *_ABSENT})

_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)")
_DURATIONS = (
    *("identity.key_cache", "identity.max_age_limit", "gateways.cache_time"),
    *(f"policy.{name}" for name in ("cleanup_after", "token_lifetime", "clock_skew", "rotate_every", "max_key_age")),
    *("policy.watch_after_emergency", "policy.lease"),
)
_CHOICES = {"authority": ("database", "api"), "sandbox.on_death": ("end", "leave")}
_IN_SECONDS = {"sandbox.jwks_max_age"}  # as in Cache-Control; a duration will do as well
_LEAST = {"sandbox.identity_replicas": 1, "sandbox.jwks_max_age": 0, "sandbox.gateways": 2, "gateways.workers": 1}


class SettingError(SandboxError):
    """A setting that was given is not known, or its value is of no use."""


class Settings:
    """The defaults with what was set over them."""

    def __init__(self, overrides: Mapping[str, Any]) -> None:
        for name in overrides:
            _require_known(name)
        self._set = dict(overrides)
        self._values = {**_DEFAULTS, **overrides}
        self._check()

    @classmethod
    def parse(cls, words: Iterable[str]) -> "Settings":
        """From the `KEY=VALUE` words of a command line; the last one counts."""
        return cls(dict(map(_assignment, words)))

    def word(self, name: str) -> str:
        return str(self._values[name])

    def number(self, name: str) -> int:
        value = self._values[name]
        return int(parse_duration(value)) if isinstance(value, str) else int(value)

    def flag(self, name: str) -> bool:
        return bool(self._values[name])

    def seconds(self, name: str) -> float:
        return parse_duration(self.word(name))

    def secret(self, name: str, otherwise: str) -> str:
        """What the reference that was set leads to, for the part that needs the secret itself."""
        reference = self._set.get(name)
        if reference is None:
            return otherwise
        try:
            return Path(str(reference).removeprefix("file:")).read_text().strip()
        except OSError as unreadable:
            raise SettingError(f"{name} is file:/path here, and the sandbox must be able to read it: {unreadable}") from None

    def write_environment(self, path: Path, given: Mapping[str, Any]) -> None:
        """The environment file: the defaults, what the world gives, and over both what was set."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_private(path, as_toml({**_DEFAULTS, **given, **self._set}))

    def _check(self) -> None:
        for name, choice in _CHOICES.items():
            if self._values[name] not in choice:
                raise SettingError(f"{name} is {' or '.join(map(repr, choice))}, not {self._values[name]!r}")
        for name in _DURATIONS:
            if not isinstance(value := self._values[name], str) or not _DURATION.fullmatch(value):
                raise SettingError(f"{name} is a duration such as '20s', '15m', '48h' or '7d', not {value!r}")
        for name, least in _LEAST.items():
            value = self._values[name]
            if not (isinstance(value, int) or name in _IN_SECONDS) or self.number(name) < least:
                raise SettingError(f"{name} is a whole number, at least {least}, not {value!r}")


def parse_duration(text: str) -> float:
    """Seconds of a duration such as "500ms", "20s", "15m", "48h" or "7d"."""
    if (match := _DURATION.fullmatch(text)) is None:
        raise SettingError(f"not a duration: {text!r}; write '20s', '15m', '48h' or '7d'")
    return float(match[1]) * _UNITS[match[2]]


def as_toml(values: Mapping[str, Any]) -> str:
    """A TOML document of settings by dotted name, at most one section deep."""
    sections: dict[str, list[str]] = {"": []}
    for name, value in values.items():
        section, _, key = name.rpartition(".")
        if section != "sandbox" and value is not None:
            sections.setdefault(section, []).append(f"{key} = {as_value(value)}")
    blocks = ["\n".join([f"[{section}]" if section else "# Made by the sandbox.", *lines]) for section, lines in sections.items()]
    return "\n\n".join(blocks) + "\n"


def as_value(value: object) -> str:
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{json.dumps(key)} = {as_value(item)}" for key, item in value.items()) + " }"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "[" + ", ".join(map(as_value, value)) + "]"
    # A JSON string, number or boolean is a TOML one, except that TOML wants DEL escaped.
    return json.dumps(value).replace("\x7f", "\\u007f")


def _assignment(word: str) -> tuple[str, Any]:
    name, equals, text = word.partition("=")
    name = name.strip()
    if equals and not text:
        return name, None
    if not equals:
        raise SettingError(f"--set takes KEY=VALUE, not {word!r}")
    try:
        return name, tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return name, text


def _require_known(name: str) -> None:
    if name not in KNOWN:
        near = difflib.get_close_matches(name, KNOWN, n=4) or sorted(known for known in KNOWN if name in known)
        hint = f"near names: {', '.join(near)}" if near else f"the names are: {', '.join(sorted(KNOWN))}"
        raise SettingError(f"there is no setting {name!r}; {hint}")
