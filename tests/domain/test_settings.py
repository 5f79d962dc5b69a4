"""An environment's file: typed, refused when wrong with one sentence that names the setting, and never quoting what may be a secret."""

from __future__ import annotations

import logging
import tomllib
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis
from hypothesis import strategies as st

from keyrotation import settings
from keyrotation.domain.errors import SettingsError
from keyrotation.secrets import SecretRef
from keyrotation.settings import Settings, load, parse_duration
from tests.domain.made import DAY, HOUR, MINUTE, NOW, SECOND

GOOD = """
authority = "database"
[identity]
url = "https://identity.example"
jwks_url = "https://identity.example/.well-known/jwks.json"
token_url = "https://identity.example/oauth2/token"
issuer = "https://identity.example"
client_id = "key-rotation"
client_secret = "env:CLIENT_SECRET"
key_cache = "60s"
[database]
url = "env:DATABASE_URL"
cleaner_url = "env:CLEANER_URL"
[sealer]
kind = "google-kms"
key = "projects/p/locations/global/keyRings/r/cryptoKeys/k"
[gateways]
urls = ["https://gateway.example/api"]
probe_path = "/canary"
cache_time = "15m"
[policy]
token_lifetime = "1h"
rotate_every = "7d"
max_key_age = "16d"
"""
PLANTED = "planted-s3cret-value"
REMOVE = object()
Write = Callable[..., str]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Writes the good file with some settings otherwise (by dotted name, values as TOML or REMOVE), and gives the environment's name."""
    monkeypatch.setenv(settings.ENVIRONMENTS, str(tmp_path))

    def make(name: str = "production", /, **otherwise: Any) -> str:
        (tmp_path / f"{name}.toml").write_text(_toml(otherwise))
        return name

    return make


def _toml(otherwise: dict[str, Any]) -> str:
    tables: dict[str, dict[str, str]] = {"": {}}
    table = ""
    for line in GOOD.strip().splitlines():
        if line.startswith("["):
            table = line.strip("[]")
        else:
            name, _, value = line.partition(" = ")
            tables.setdefault(table, {})[name] = value
    for dotted, value in otherwise.items():
        table, _, name = dotted.rpartition("__")
        tables.setdefault(table, {})[name] = value
    lines = []
    for table, content in tables.items():
        lines += [f"[{table}]"] if table and any(value is not REMOVE for value in content.values()) else []
        lines += [f"{name} = {value}" for name, value in content.items() if value is not REMOVE]
    return "\n".join(lines)


def refusal(name: str) -> str:
    with pytest.raises(SettingsError) as refused:
        load(name)
    assert "\n" not in str(refused.value), "one sentence, one line"
    return str(refused.value)


class TestGood:
    """What loads."""

    def test_the_good_file(self, write: Write) -> None:
        """Durations are durations, secrets are references, the name is the file's."""
        loaded = load(write())
        assert (loaded.name, loaded.identity.key_cache, loaded.gateways.cache_time) == ("production", MINUTE, 15 * MINUTE)
        assert loaded.database.url == SecretRef("env", "DATABASE_URL")

    def test_the_defaults_of_the_contract(self, write: Write) -> None:
        """cleanup_after 48h, cleanup automatic, no standby, no shared cache, the canary shortens nothing."""
        loaded = load(write())
        policy = loaded.to_policy()
        assert (policy.cleanup_after, policy.cleanup, policy.keep_standby, policy.shared_cache, policy.canary_shortens_wait) == (
            48 * HOUR,
            "automatic",
            False,
            False,
            False,
        )

    def test_every_duration_reaches_the_policy(self, write: Write) -> None:
        """Each of the file's figures is the one that is calculated with."""
        policy = load(
            write(
                policy__clock_skew='"7s"',
                policy__cleanup_after='"50h"',
                identity__max_age_limit='"20m"',
                identity__shared_cache="true",
                policy__lease='"45s"',
                policy__keep_standby="true",
                policy__cleanup='"manual"',
                gateways__canary_shortens_wait="true",
            )
        ).to_policy()
        assert policy == settings.Policy(
            rotate_every=7 * DAY,
            max_key_age=16 * DAY,
            token_lifetime=HOUR,
            clock_skew=7 * SECOND,
            cleanup_after=50 * HOUR,
            cache_time=15 * MINUTE,
            key_cache=MINUTE,
            max_age_limit=20 * MINUTE,
            shared_cache=True,
            canary_shortens_wait=True,
            keep_standby=True,
            cleanup="manual",
            lease=45 * SECOND,
        )

    @pytest.mark.parametrize("name", ["development", "staging", "production", "sandbox"])
    def test_the_files_of_the_repository_load(self, name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
        """All four, without a warning, from wherever we are."""
        monkeypatch.delenv(settings.ENVIRONMENTS, raising=False)
        monkeypatch.chdir("/")
        assert load(name).name == name
        assert caplog.records == []

    def test_nothing_is_read_from_a_secret_when_a_file_is_loaded(self, write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
        """A file whose references lead nowhere loads: they are followed where the secret is used."""
        monkeypatch.delenv("DATABASE_URL", raising=False)
        assert load(write()).database.url.place == "DATABASE_URL"

    def test_settings_do_not_change_after_loading(self, write: Write) -> None:
        """A loaded file is a value."""
        loaded = load(write())
        with pytest.raises(ValueError, match="frozen"):
            loaded.policy.cleanup_after = HOUR


class TestDurations:
    """A number and a unit: "48h", "15m", "20s", "500ms"; "7d"."""

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("48h", 48 * HOUR),
            ("15m", 15 * MINUTE),
            ("20s", 20 * SECOND),
            ("7d", 7 * DAY),
            ("500ms", SECOND / 2),
            ("1.5h", 90 * MINUTE),
            (" 5s ", 5 * SECOND),
            ("0s", timedelta(0)),
        ],
    )
    def test_a_number_with_a_unit(self, text: str, expected: timedelta) -> None:
        """Whole or with a point."""
        assert parse_duration(text) == expected

    @pytest.mark.parametrize(
        "value", ["48", "h", "", "48 h", "-1h", "+1h", "1h30m", "1e3s", "48H", "1w", "inf", "1_0s", 48, 48.0, True, None, ["1h"], {"h": 1}, timedelta(1)]
    )
    def test_anything_else_is_refused(self, value: object) -> None:
        """No unit, two units, a sign, another letter, a bare number: each with how it is written."""
        with pytest.raises(ValueError, match='like "48h", "15m", "20s" or "7d"'):
            parse_duration(value)

    @pytest.mark.parametrize("text", ["3661d", "99999999999d", "9" * 400 + "s"])
    def test_beyond_the_calendar_is_refused(self, text: str) -> None:
        """More than ten years would fail at 3 a.m., when it is added to a date."""
        with pytest.raises(ValueError, match="3660d at the longest"):
            parse_duration(text)

    @given(st.text(alphabet="0123456789.smhd -e", max_size=10))
    def test_a_duration_or_a_value_error(self, text: str) -> None:
        """Whatever is written there, nothing else comes of it."""
        try:
            assert timedelta(0) <= parse_duration(text) <= settings.LONGEST
        except ValueError:
            pass


CORPUS: list[tuple[str, dict[str, Any], str]] = [
    ("a duration without a unit", {"policy__rotate_every": '"7"'}, "policy.rotate_every: '7' is not a duration"),
    ("a bare number", {"policy__rotate_every": "7"}, "policy.rotate_every: 7 is not a duration"),
    ("a negative duration", {"gateways__cache_time": '"-15m"'}, "gateways.cache_time: '-15m' is not a duration"),
    *(
        (f"{name} of nought", {name.replace(".", "__"): '"0s"'}, f"{name}: a duration must be positive here")
        for name in (
            "gateways.cache_time",
            "identity.max_age_limit",
            "policy.cleanup_after",
            "policy.token_lifetime",
            "policy.rotate_every",
            "policy.max_key_age",
            "policy.watch_after_emergency",
            "policy.lease",
        )
    ),
    ("an unknown setting", {"policy__rotate_evry": '"7d"'}, "policy.rotate_evry is not a setting: see docs/settings.md"),
    ("an unknown table", {"polices__x": "1"}, "polices is not a setting"),
    ("an unknown setting in a rung", {"gateways__refresh": '[{ kind = "nudge", nudges = 3 }]'}, "gateways.refresh.0.nudges is not a setting"),
    ("a missing setting", {"policy__token_lifetime": REMOVE}, "policy.token_lifetime is missing: see docs/settings.md"),
    ("a missing table", {"database__url": REMOVE, "database__cleaner_url": REMOVE}, "database is missing"),
    ("the name in the file", {"name": '"staging"'}, "name: the environment's name is the file's name"),
    ("another authority", {"authority": '"vault"'}, "authority: Input should be 'database' or 'api'"),
    (
        "a database authority without a sealer",
        {"sealer__kind": REMOVE, "sealer__key": REMOVE},
        'authority = "database" makes the keys itself and needs a [sealer]',
    ),
    ("an api authority without an admin token", {"authority": '"api"'}, 'authority = "api" needs identity.admin_token'),
    ("a KMS key that is a version", {"sealer__key": '"projects/p/locations/l/keyRings/r/cryptoKeys/k/cryptoKeyVersions/1"'}, "sealer: key must read projects/"),
    ("a vault without its token", {"sealer__kind": '"vault"', "sealer__endpoint": '"http://vault"'}, "sealer: vault needs its endpoint (a URL) and a token"),
    ("I25: a file URL", {"identity__jwks_url": '"file:///etc/passwd"'}, "identity.jwks_url: a URL reads https://host/path"),
    ("another scheme", {"gateways__urls": '["ftp://gateway.example/"]'}, "gateways.urls.0: a URL reads"),
    ("a URL with a password", {"identity__url": f'"https://user:{PLANTED}@identity.example"'}, "identity.url: a URL reads https://host/path"),
    ("a URL without a host", {"identity__url": '"https:///path"'}, "identity.url: a URL reads"),
    ("a URL with a port that is none", {"identity__url": '"https://host:port/"'}, "identity.url: a URL reads"),
    ("a URL with a port that is too large", {"identity__url": '"https://host:99999/"'}, "identity.url: a URL reads"),
    ("a URL with a blank", {"identity__url": '"https://host/a b"'}, "identity.url: a URL reads"),
    ("a probe path that is none", {"gateways__probe_path": '"canary"'}, "gateways.probe_path: "),
    ("an empty probe path", {"gateways__probe_path": '""'}, "gateways.probe_path: "),
    ("no workers", {"gateways__workers": "0"}, "gateways.workers: Input should be greater than or equal to 1"),
    (
        "a canary that shortens the wait without a probe route",
        {"gateways__canary_shortens_wait": "true", "gateways__probe_path": REMOVE},
        "gateways.canary_shortens_wait needs a gateways.probe_path",
    ),
    ("a push for fewer gateways than there are", {"gateways__refresh": '[{ kind = "push", files = ["/a", "/b"] }]'}, "a push names 2 files for 1 gateways"),
    ("a push without files", {"gateways__refresh": '[{ kind = "push" }]'}, "a push needs files"),
    ("a webhook without a URL", {"gateways__refresh": '[{ kind = "webhook" }]'}, "a webhook needs its url"),
    ("Slack without a way", {"slack__channel": '"#keys"'}, "slack: give either a bot token (threads) or a webhook"),
    ("Slack by two ways", {"slack__token": '"env:A"', "slack__webhook": '"env:B"'}, "slack: give either"),
    (
        "F67: rotating more often than the waits allow",
        {"policy__rotate_every": '"17m"'},
        "policy.rotate_every 17m is shorter than one rotation's waits, 18m 30s",
    ),
    (
        "F67: a shared cache that makes the wait too long",
        {"policy__rotate_every": '"1h"', "identity__shared_cache": "true"},
        "is shorter than one rotation's waits, 1h 18m",
    ),
    ("F67: too old before it is rotated", {"policy__max_key_age": '"6d"'}, "policy.max_key_age 6d is below policy.rotate_every 7d"),
]


class TestRefused:
    """What does not load, and the words for it."""

    @pytest.mark.parametrize(("otherwise", "words"), [case[1:] for case in CORPUS], ids=[case[0] for case in CORPUS])
    def test_the_corpus(self, write: Write, otherwise: dict[str, Any], words: str) -> None:
        """One sentence: the file, the setting by its dotted name, what is wrong."""
        told = refusal(write(**otherwise))
        assert words in told
        assert "production.toml: " in told
        assert PLANTED not in told

    @pytest.mark.parametrize("name", ["identity.key_cache", "policy.clock_skew"])
    def test_nought_is_allowed_where_there_may_be_no_cache_and_no_skew(self, write: Write, name: str) -> None:
        """An identity service that reads at each request, clocks that are one."""
        load(write(**{name.replace(".", "__"): '"0s"'}))

    def test_the_sums_are_allowed_at_their_limits(self, write: Write) -> None:
        """rotate_every of just the waits, max_key_age of just rotate_every."""
        load(write(policy__rotate_every='"18.5m"', policy__max_key_age='"18.5m"'))
        assert "is shorter than" in refusal(write(policy__rotate_every='"1109s"'))

    def test_several_faults_are_counted(self, write: Write) -> None:
        """The first is named, the others are counted."""
        assert refusal(write(policy__x="1", policy__y="2", policy__z="3")).endswith("(and 2 more)")

    @pytest.mark.parametrize(
        ("content", "words"),
        [
            (b"authority = ", "cannot be read"),
            (b"[identity]\n[identity]\n", "cannot be read"),
            (b"\xff\xfe", "cannot be read"),
            (b"x = 1\nx = 2", "cannot be read"),
            (b"\x00", "cannot be read"),
            (b"a = " + b"[" * 5000, "cannot be read"),
            (b"", "identity is missing"),
        ],
    )
    def test_bad_toml(self, tmp_path: Path, write: Write, content: bytes, words: str) -> None:
        """Half a line, a table twice, no UTF-8, a nesting bomb, nothing: the file is named."""
        (tmp_path / "staging.toml").write_bytes(content)
        told = refusal("staging")
        assert words in told
        assert "staging.toml" in told

    def test_a_folder_in_the_files_place(self, tmp_path: Path, write: Write) -> None:
        """What is there and cannot be read is said to be so."""
        (tmp_path / "staging.toml").mkdir()
        assert "cannot be read" in refusal("staging")

    @given(
        st.dictionaries(
            st.sampled_from(["policy", "identity", "gateways", "database", "sealer", "slack", "authority", "name", "x"]),
            st.none()
            | st.booleans()
            | st.integers()
            | st.text(max_size=5)
            | st.lists(st.integers(), max_size=2)
            | st.dictionaries(
                st.sampled_from(["url", "urls", "kind", "cache_time", "refresh", "token"]), st.integers() | st.text(max_size=5) | st.lists(st.text(max_size=3))
            ),
        )
    )
    def test_any_document_is_refused_in_words(self, document: dict[str, Any]) -> None:
        """Whatever is in a table's place, validation says what is wrong with it."""
        with pytest.raises(ValueError) as refused:
            Settings.model_validate(document)
        assert settings._first(refused.value)


class TestEnvironments:
    """Which file."""

    def test_an_unknown_environment_shows_those_there_are(self, write: Write, tmp_path: Path) -> None:
        """Named, with the folder, and how to set another one."""
        write("staging")
        write("production")
        told = refusal("stagign")
        assert (
            told == f"there is no environment 'stagign' in {tmp_path} (there are: production, staging); set KEYROTATION_ENVIRONMENTS if its file lies elsewhere"
        )

    def test_an_empty_or_missing_folder_says_none(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Also where the folder itself is not there."""
        monkeypatch.setenv(settings.ENVIRONMENTS, str(tmp_path / "nowhere"))
        assert "(there are: none)" in refusal("production")

    @pytest.mark.parametrize(
        "name",
        [
            "../x",
            "..",
            ".",
            "",
            "/etc/passwd",
            "a/b",
            "a\\b",
            "production.toml",
            "Production",
            "-a",
            "1a",
            "a b",
            "a\n",
            "production\x00",
            "ü",
            "a" * 64,
            "a" * 10_000,
        ],
    )
    def test_f46_a_name_that_is_a_path_is_none(self, write: Write, tmp_path: Path, name: str) -> None:
        """Refused before any file is looked at, quoted, and cut."""
        (tmp_path.parent / "x.toml").write_text(GOOD)
        write()
        told = refusal(name)
        assert told.endswith("is not an environment's name: lower-case letters, digits and hyphens")
        assert len(told) < 400

    def test_f66_a_database_of_another_environment_is_refused(self, write: Write) -> None:
        """The file's name and the database's own must be one; a database without a name is nobody's."""
        loaded = load(write())
        settings.require_named(loaded, "production")
        for other in ("staging", None):
            with pytest.raises(SettingsError, match="the file is for 'production', its database for .*: check database.url; nothing was changed"):
                settings.require_named(loaded, other)


class TestWarnings:
    """What works, but not as written."""

    def test_a_short_cleanup_is_raised_with_a_warning(self, write: Write, caplog: pytest.LogCaptureFixture) -> None:
        """cleanup_after below the retention's sum: both figures, and why."""
        caplog.set_level(logging.WARNING)
        loaded = load(write(policy__cleanup_after='"1h"'))
        assert [record.getMessage().partition(": ")[2] for record in caplog.records] == [
            "policy.cleanup_after 1h is raised to 1h 1m: tokens of the old key may live that long"
        ]
        assert loaded.to_policy().may_clean_up(NOW).duration == HOUR + 90 * SECOND

    def test_just_enough_is_no_warning(self, write: Write) -> None:
        """The retention's own sum; the gateways' cache time is no part of it."""
        assert load(write(policy__cleanup_after='"3690s"', gateways__cache_time='"2d"')).warnings() == []
        assert load(write(policy__cleanup_after='"3689s"')).warnings() != []


class TestSecrets:
    """References, never values."""

    @pytest.mark.parametrize(
        "name",
        [
            "database__url",
            "database__cleaner_url",
            "database__auditor_url",
            "identity__client_secret",
            "identity__admin_token",
            "sealer__token",
            "slack__token",
        ],
    )
    @pytest.mark.parametrize(
        "value",
        [f"postgresql://rotator:{PLANTED}@host/db", PLANTED, f"xoxb-{PLANTED}", f"https://hooks.slack.com/{PLANTED}", f"ENV:{PLANTED}", f"vault:{PLANTED}"],
    )
    def test_i05_a_value_in_the_place_of_a_reference_is_not_quoted(self, write: Write, name: str, value: str, caplog: pytest.LogCaptureFixture) -> None:
        """The setting is named, how a reference is written is shown; the value stands in no text, no chained exception and no log."""
        caplog.set_level(logging.DEBUG)
        with pytest.raises(SettingsError, match='a secret is a reference, never a value: write "env:NAME"') as refused:
            load(write(**{name: f'"{value}"'}))
        assert name.replace("__", ".") in str(refused.value)
        assert refused.value.__cause__ is None
        assert refused.value.__suppress_context__
        assert PLANTED not in f"{refused.value!r} {caplog.text}"

    @pytest.mark.parametrize("value", ["42", "true", f'["{PLANTED}"]', f'{{ value = "{PLANTED}" }}', '""', '"env:"', '"file: "'])
    def test_what_is_no_text_or_leads_to_no_place_is_no_reference(self, write: Write, value: str) -> None:
        """A number, a table, an empty place: how a reference is written is shown."""
        told = refusal(write(database__url=value))
        assert "a secret is a reference" in told
        assert PLANTED not in told

    def test_a_reference_is_shown_and_its_secret_is_not(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """repr and str are the reference."""
        monkeypatch.setenv("A_SECRET", PLANTED)
        reference = SecretRef.parse("env:A_SECRET")
        assert reference.reveal() == PLANTED
        assert PLANTED not in f"{reference} {reference!r}"
        assert str(reference) == "env:A_SECRET"

    def test_an_environment_variable_that_is_not_set(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Not set and empty are the same: it leads nowhere."""
        monkeypatch.delenv("A_SECRET", raising=False)
        with pytest.raises(SettingsError, match="the secret env:A_SECRET leads nowhere: it is not set, or empty"):
            SecretRef.parse("env:A_SECRET").reveal()
        monkeypatch.setenv("A_SECRET", "")
        with pytest.raises(SettingsError, match="leads nowhere"):
            SecretRef.parse("env:A_SECRET").reveal()

    def test_a_file_is_read_at_each_use(self, tmp_path: Path) -> None:
        """F24: a secret that was renewed is taken without a restart, without the newline at its end."""
        (tmp_path / "secret").write_text("first\n")
        reference = SecretRef.parse(f"file:{tmp_path / 'secret'}")
        assert reference.reveal() == "first"
        (tmp_path / "secret").write_text("second\n")
        assert reference.reveal() == "second"

    @pytest.mark.parametrize(
        ("content", "words"), [(None, "cannot be read: FileNotFoundError"), (b" \n", "leads nowhere"), (b"\xff", "cannot be read: UnicodeDecodeError")]
    )
    def test_a_file_that_leads_nowhere(self, tmp_path: Path, content: bytes | None, words: str) -> None:
        """Not there, empty, or no text: the reference is named, what was in it is not."""
        path = tmp_path / "secret"
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(SettingsError, match=f"the secret file:{path} {words}"):
            SecretRef.parse(f"file:{path}").reveal()

    @pytest.mark.parametrize("place", ["/", "~nobody-of-that-name/secret", "/a\x00b"])
    def test_a_place_that_is_no_file(self, place: str) -> None:
        """A folder, somebody's home who is not there, a NUL: words, no traceback."""
        with pytest.raises(SettingsError, match="cannot be read"):
            SecretRef.parse(f"file:{place}").reveal()

    @hypothesis(suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(st.text(min_size=6, alphabet=st.characters(exclude_categories=["Cs"])))
    def test_a_text_is_a_reference_or_not_quoted(self, text: str) -> None:
        """Whatever is written there: a reference that says the same again, or an error without it."""
        try:
            assert str(SecretRef.parse(text)).partition(":")[0] in ("env", "file", "prefect")
        except ValueError as refused:
            assert text not in str(refused)

    @pytest.mark.parametrize("name", ["database__url", "database__cleaner_url", "database__auditor_url", "identity__client_secret", "identity__admin_token"])
    def test_prefect_blocks_are_refused_in_production_for_what_opens_the_keys(self, write: Write, name: str) -> None:
        """Database, admin and client secrets: one shared password reads all blocks."""
        assert f"production: {name.replace('__', '.')} may not lie in a Prefect block" in refusal(write(**{name: '"prefect:a-block"'}))
        assert "may not lie in a Prefect block" in refusal(write("staging", **{name: '"prefect:a-block"'}))

    @pytest.mark.parametrize("name", ["development", "sandbox"])
    def test_prefect_blocks_are_good_enough_for_playgrounds(self, write: Write, name: str) -> None:
        """Development and sandbox."""
        assert load(write(name, database__url='"prefect:a-block"')).database.url.kind == "prefect"

    def test_a_prefect_block_may_hold_what_speaks_to_people(self, write: Write) -> None:
        """Slack's token opens no key."""
        assert load(write(slack__token='"prefect:slack"')).name == "production"

    def test_the_local_sealer_is_refused_in_production(self, write: Write) -> None:
        """It keeps its key beside the data; in development and sandbox it is let be."""
        local = {"sealer__kind": '"local"', "sealer__key": '"/tmp/key"'}
        assert "the local sealer keeps its key beside the data and is refused outside development and sandbox; use google-kms or vault" in refusal(
            write(**local)
        )
        assert load(write("development", **local)).sealer is not None


def test_the_good_file_is_toml() -> None:
    """These tests change a file that is whole to begin with."""
    assert tomllib.loads(_toml({})) == tomllib.loads(GOOD)
