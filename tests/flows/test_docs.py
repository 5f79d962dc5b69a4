"""Every command in the README and the docs is run, as it stands there, in order. The environment's name is the sandbox's."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import psycopg2
import pytest

from sandbox.postgres import binary
from tests.flows.conftest import Stage

pytestmark = [pytest.mark.world, pytest.mark.xdist_group("flows")]
ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands(page: Path) -> list[str]:
    blocks = re.findall(r"^ *```console\n(.*?)^ *```", page.read_text(), re.MULTILINE | re.DOTALL)
    return [
        line.strip().removeprefix("$ ").replace("production", "sandbox") for block in blocks for line in block.splitlines() if line.strip().startswith("$ ")
    ]


@pytest.fixture
def shell(stage: Stage) -> Iterator[dict[str, str]]:
    """An environment in which the commands find this world, and psql a fresh database of its own."""
    parts = urlsplit(stage.facts["owner_database_url"])
    password = (stage.world.home / "secrets" / "postgres_password").read_text().strip()
    server = {"PGHOST": str(parts.hostname), "PGPORT": str(parts.port), "PGUSER": "postgres", "PGPASSWORD": password}
    admin = psycopg2.connect(f"postgresql://postgres:{password}@{parts.hostname}:{parts.port}/postgres")
    admin.autocommit = True
    with admin.cursor() as cursor:
        cursor.execute("DROP DATABASE IF EXISTS docs")
        cursor.execute("CREATE DATABASE docs")
    path = f"{Path(sys.executable).parent}:{binary('psql').parent}:{os.environ['PATH']}"
    yield {**os.environ, **server, "PGDATABASE": "docs", "PATH": path, "PREFECT_API_URL": stage.facts["prefect_api_url"], "KEYROTATION_HOME": str(ROOT)}
    with admin.cursor() as cursor:
        cursor.execute("DROP DATABASE docs")
    admin.close()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_commands_of_a_page_do_what_it_says(page: Path, shell: dict[str, str]) -> None:
    """Each exits 0. The make targets that would start the suite itself are only looked at."""
    for command in commands(page):
        words = shlex.split(command)
        if words[0] == "make":
            words.insert(1, "-n")
        done = subprocess.run(words, cwd=ROOT, env=shell, capture_output=True, text=True, timeout=240, check=False)
        assert done.returncode == 0, f"$ {command}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"


def test_every_link_of_the_docs_leads_somewhere() -> None:
    """Relative links name files that are there."""
    for page in [*PAGES, *(ROOT / "docs" / "adr").glob("*.md")]:
        for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_readme_begins_with_two_commands() -> None:
    """One runs the main job, one passes the tests."""
    assert commands(PAGES[0])[:2] == ["make demo", "make test"]
