"""docs/settings.md says what settings.py does: every setting with its default, and the sums of its example."""

from __future__ import annotations

import re
import tomllib
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from keyrotation import settings
from keyrotation.domain.policy import Policy
from keyrotation.secrets import SecretRef
from keyrotation.settings import parse_duration

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "settings.md").read_text(encoding="utf-8")
ROWS = {found["name"]: found["default"] for found in re.finditer(r"^\| `(?P<name>[\w.]+)` \| [^|]+ \| (?P<default>[^|]+) \| [^|]+ \|$", PAGE, re.MULTILINE)}
SECTIONS: dict[str, type[BaseModel]] = {
    "": settings.Settings,
    "identity.": settings.Identity,
    "database.": settings.Database,
    "sealer.": settings.Sealer,
    "gateways.": settings.Gateways,
    "refresh.": settings.Refresh,
    "policy.": settings.PolicySection,
    "slack.": settings.Slack,
    "prefect.": settings.Prefect,
    "audit.": settings.Audit,
    "tombstones.": settings.Tombstones,
    "metrics.": settings.Metrics,
}
FIELDS = {
    f"{prefix}{name}": field
    for prefix, section in SECTIONS.items()
    for name, field in section.model_fields.items()
    if prefix or (f"{name}." not in SECTIONS and name != "name")  # the file's own name is no setting
}


def as_written(default: str) -> Any:
    """The value that stands in a row of the page."""
    return None if default == "none" else tomllib.loads(f"it = {default.strip('`')}")["it"]


def as_meant(value: Any) -> Any:
    """The model's default as TOML would give it."""
    return list(value) if isinstance(value, tuple) else value


@pytest.mark.parametrize("name", sorted(FIELDS))
def test_a_setting_stands_in_the_page_with_its_default(name: str) -> None:
    """Every field of the pydantic models has a row, and the row's default is the field's."""
    field = FIELDS[name]
    assert name in ROWS, f"docs/settings.md has no row for {name}"
    if field.is_required():
        assert ROWS[name] == "required"
        return
    default, written = field.get_default(call_default_factory=True), as_written(ROWS[name])
    assert (parse_duration(written) if isinstance(default, timedelta) else written) == as_meant(default)


def test_every_section_is_known_here() -> None:
    """A new section of the file cannot be forgotten: each model of settings.py is in this test's table."""
    models = {each for each in vars(settings).values() if isinstance(each, type) and issubclass(each, settings.Section) and each is not settings.Section}
    assert models == set(SECTIONS.values())


def test_the_page_names_no_setting_that_is_not_there() -> None:
    """Every row of the page is a field of the models."""
    assert set(ROWS) - set(FIELDS) == set()


def test_the_examples_of_secrets_are_references() -> None:
    """Each secret of the example is taken as a reference."""
    (block,) = (block for block in re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL) if "client_secret" in block)
    assert [SecretRef.parse(text).kind for text in tomllib.loads(block).values()] == ["env", "file", "prefect"]


def figure(question: str) -> timedelta:
    """The bold figure of the row that asks so."""
    (row,) = (line for line in PAGE.splitlines() if line.startswith(f"| {question}"))
    (bold,) = re.findall(r"\*\*(.+?)\*\*", row)
    return sum((parse_duration(part) for part in bold.split()), timedelta(0))


@pytest.fixture
def policy() -> Policy:
    """The page's worked example."""
    (block,) = (block for block in re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL) if "cache_time" in block)
    durations = {name: parse_duration(value) for section in tomllib.loads(block).values() for name, value in section.items()}
    return Policy(**durations, max_age_limit=timedelta(hours=1))


def test_the_sums_of_the_example_are_the_policys(policy: Policy) -> None:
    """Each figure of the worked example is what the arithmetic gives."""
    from datetime import UTC, datetime

    start = datetime(2026, 1, 5, 3, tzinfo=UTC)
    assert figure("how long is a new key published") == policy.may_promote(start).duration
    assert figure("how long do the tokens of an old key") == sum((term for _, term in policy.retention()), timedelta(0))
    assert figure("how long is an old key kept") == policy.may_clean_up(start).duration
    assert figure("how long may a token live") == policy.longest_token()
    assert figure("from which age on") == policy.due_after
    assert figure("how short may `rotate_every` be") == policy.shortest_interval()
