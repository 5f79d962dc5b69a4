"""The sandbox's settings: what `--set` takes and refuses, and the environment file that comes of it."""

import tomllib
from pathlib import Path
from typing import Any

import pytest

from sandbox.settings import KNOWN, SettingError, Settings, as_toml, parse_duration


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("500ms", 0.5), ("0s", 0), ("1.5s", 1.5), ("15m", 900), ("48h", 172_800), ("7d", 604_800)],
)
def test_a_duration_is_a_number_with_a_unit(text: str, seconds: float) -> None:
    """Every unit of the environment file is understood, fractions too."""
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "10", "10 s", "-1s", "1h30m", "s", "10S"])
def test_nothing_else_is_a_duration(text: str) -> None:
    """A text without exactly one number and unit is refused."""
    with pytest.raises(SettingError, match="not a duration"):
        parse_duration(text)


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("gateways.cache_time=2s", "2s"),
        ('gateways.cache_time="2s"', "2s"),
        ("policy.keep_standby=true", True),
        ("gateways.workers=4", 4),
        ("identity.refresh=[{kind = 'nudge'}]", [{"kind": "nudge"}]),
        ("slack.channel=#a channel = b", "#a channel = b"),
    ],
)
def test_a_value_is_toml_else_a_string(word: str, value: Any, tmp_path: Path) -> None:
    """What is set reaches the file with its type."""
    section, _, key = word.partition("=")[0].rpartition(".")
    assert written(Settings.parse([word]), tmp_path)[section][key] == value


def test_the_last_of_several_counts() -> None:
    """A name that is set twice has the last value."""
    settings = Settings.parse(["gateways.cache_time=2s", "gateways.cache_time=3s"])
    assert settings.seconds("gateways.cache_time") == 3


def test_what_was_set_beats_what_the_world_gives(tmp_path: Path) -> None:
    """An address that is set stands in the file, not the part's own."""
    settings = Settings.parse(["identity.url=http://127.0.0.1:1"])
    file = written(settings, tmp_path, {"identity.url": "http://127.0.0.1:2", "slack.base_url": "http://127.0.0.1:3"})
    assert file["identity"]["url"] == "http://127.0.0.1:1"
    assert file["slack"]["base_url"] == "http://127.0.0.1:3"


def test_a_setting_can_be_left_out(tmp_path: Path) -> None:
    """`KEY=` takes the setting out of the file."""
    assert "probe_path" not in written(Settings.parse(["gateways.probe_path="]), tmp_path)["gateways"]


def test_the_sandboxs_own_settings_are_not_in_the_file(tmp_path: Path) -> None:
    """`sandbox.…` shapes the world only."""
    assert "sandbox" not in written(Settings.parse(["sandbox.identity_replicas=3"]), tmp_path)


def test_every_setting_of_the_contract_is_known() -> None:
    """The names of the contract's environment file, and the sandbox's own."""
    contract = """
        authority identity.url identity.jwks_url identity.token_url identity.issuer identity.admin_token
        identity.client_id identity.client_secret identity.scope identity.key_cache identity.shared_cache
        identity.max_age_limit identity.refresh database.url database.cleaner_url database.auditor_url sealer.kind
        sealer.key sealer.endpoint gateways.urls gateways.probe_path gateways.cache_time gateways.workers
        gateways.canary_shortens_wait gateways.refresh policy.cleanup policy.cleanup_after policy.token_lifetime
        policy.clock_skew policy.rotate_every policy.max_key_age policy.keep_standby policy.watch_after_emergency
        slack.token slack.channel slack.base_url prefect.api_url audit.head_file tombstones.path
        metrics.prometheus_url metrics.queries sandbox.identity_replicas sandbox.jwks_max_age
    """
    assert set(contract.split()) <= KNOWN


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("gateways.cachetime=2s", "near names: gateways.cache_time"),
        ("lifetime=2s", "near names: policy.token_lifetime"),
        ("policy={}", "near names: "),
        ("xyzzy=1", "the names are: audit.head_file, authority, "),
    ],
)
def test_an_unknown_name_is_refused_with_the_near_ones(word: str, hint: str) -> None:
    """A slip of the pen is not silently without effect."""
    with pytest.raises(SettingError, match=hint):
        Settings.parse([word])


@pytest.mark.parametrize(
    "word",
    [
        *("gateways.cache_time", "authority=vault", "policy.token_lifetime=30", "policy.lease=soon"),
        *("sandbox.gateways=1", "sandbox.gateways=two", "sandbox.identity_replicas=0", "sandbox.jwks_max_age=-1"),
    ],
)
def test_a_value_of_no_use_is_refused(word: str) -> None:
    """The text names the setting, before any part is started."""
    with pytest.raises(SettingError, match=word.partition("=")[0].replace(".", r"\.")):
        Settings.parse([word])


def test_toml_written_is_toml_read() -> None:
    """Strings with quotes, newlines, controls and other scripts, nested lists and tables: all survive."""
    values = {"a": 'x"\\\n\t\x00\x7f ü 鍵', "b.c": [1, 2.5, True, [], {"k y": {"z": ["é"]}}], "b.d": {}}
    assert tomllib.loads(as_toml(values)) == {"a": values["a"], "b": {"c": values["b.c"], "d": {}}}


def written(settings: Settings, folder: Path, given: dict[str, Any] | None = None) -> dict[str, Any]:
    """The environment file as its reader sees it."""
    settings.write_environment(folder / "sandbox.toml", given or {})
    return tomllib.loads((folder / "sandbox.toml").read_text())
