"""The sandbox as a whole, by its contract: what it writes, what answers, what survives, and that nothing is left.

One world serves the tests that only look; those that end or kill one have a home of their own. A start takes some 20 s
on two processors, a second one on the same home about 13 s.
"""

import json
import os
import re
import signal
import stat
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import psycopg2
import pytest
import requests
from ruamel.yaml import YAML

from sandbox.processes import born
from sandbox.world import World

pytestmark = pytest.mark.world
one_worker = pytest.mark.xdist_group("world")  # of pytest-xdist: the world that they share is started once

CHECKOUT = Path(__file__).parents[2]
LOOPBACK = re.compile(r"(127\.0\.0\.1|\[::ffff:127\.0\.0\.1\]):\d+")  # the latter is gRPC's way to write it
ISSUED = {"grant_type": "client_credentials", "scope": "api"}


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A world with its first key, and settings that are not the defaults."""
    settings = {"gateways.cache_time": "2s"}
    with World(tmp_path_factory.mktemp("world") / "home", settings) as running:
        yield running


@pytest.fixture
def facts(world: World) -> dict[str, Any]:
    """Its sandbox.json."""
    return world.facts


@one_worker
class TestWhatItWrites:
    """sandbox.json, the environment file, the secrets."""

    def test_the_facts_are_those_of_the_contract(self, facts: dict[str, Any]) -> None:
        """Programs of others read these names: none is missing, none is added unnoticed."""
        assert set(facts) == {
            *("environment", "config", "prefect_api_url", "prefect_ui_url", "identity_url", "jwks_url", "token_url"),
            *("client_id", "client_secret", "admin_token", "gateways", "database_url", "owner_database_url"),
            *("kms_endpoint", "slack_url", "pids"),
        }
        assert facts["environment"] == "sandbox"
        assert facts["prefect_api_url"].endswith("/api")
        assert [set(gateway) for gateway in facts["gateways"]] == [{"url", "probe_url", "admin_url", "pid"}] * 2

    def test_every_process_is_named_and_alive(self, facts: dict[str, Any]) -> None:
        """The pids are those of the parts, the gateways' among them."""
        assert all(map(born, facts["pids"].values()))
        assert {gateway["pid"] for gateway in facts["gateways"]} <= set(facts["pids"].values())

    def test_secrets_are_closed_to_others(self, world: World) -> None:
        """The folder is its owner's alone, and so is every file in it, and sandbox.json."""
        folder = world.home / "secrets"
        assert mode(folder) == 0o700
        assert {mode(file) for file in files_in(folder)} == {0o600}
        assert mode(world.home / "sandbox.json") == 0o600

    def test_secrets_lie_nowhere_else(self, world: World) -> None:
        """No other file of the home holds one of them: no configuration, no log."""
        secrets = {file.read_text() for file in (world.home / "secrets").iterdir() if file.is_file()}
        words = {word.encode() for secret in secrets for word in (secret, *secret.split(":"), *secret.split("@")) if len(word) > 20}
        elsewhere = [file for file in files_in(world.home) if "secrets" not in file.relative_to(world.home).parts and file.name != "sandbox.json"]
        assert len(words) > 8
        assert len(elsewhere) > 20
        assert [file for file in elsewhere if any(word in file.read_bytes() for word in words)] == []

    def test_the_environment_file_refers_to_secrets_by_absolute_path(self, facts: dict[str, Any]) -> None:
        """It works from any shell, and holds no secret itself."""
        assert Path(facts["config"]).name == "sandbox.toml"
        file = tomllib.loads(Path(facts["config"]).read_text())
        assert secret(file["database"]["url"]) == facts["database_url"]
        assert secret(file["identity"]["client_secret"]) == facts["client_secret"]
        assert secret(file["identity"]["admin_token"]) == facts["admin_token"]
        assert len({secret(file["database"][name]) for name in ("url", "cleaner_url", "auditor_url")}) == 3
        assert [gateway["url"] for gateway in facts["gateways"]] == file["gateways"]["urls"]
        assert all(Path(pushed).exists() for pushed in file["gateways"]["refresh"][1]["files"])


@one_worker
class TestWhatAnswers:
    """Identity service, gateways, databases, Slack, Prefect."""

    def test_every_gateway_takes_a_fresh_token_and_nothing_else(self, facts: dict[str, Any]) -> None:
        """200 for a token of the token URL, 401 without one, and 403 at the probe route, which is the canaries'."""
        bearer = {"Authorization": f"Bearer {fresh_token(facts)}"}
        for gateway in facts["gateways"]:
            assert requests.get(gateway["url"], headers=bearer, timeout=5).status_code == 200
            assert requests.get(gateway["url"], timeout=5).status_code == 401
            assert requests.get(gateway["probe_url"], headers=bearer, timeout=5).status_code == 403

    def test_one_gateway_fetches_in_the_background_and_one_on_request(self, facts: dict[str, Any]) -> None:
        """The two ways of caching that users have, the second one in every worker thread."""
        dumps = [requests.get(f"{gateway['admin_url']}/config_dump", timeout=5).text for gateway in facts["gateways"]]
        assert ["async_fetch" in dump for dump in dumps] == [True, False]
        server = [requests.get(f"{gateway['admin_url']}/server_info", timeout=5).json() for gateway in facts["gateways"]]
        assert server[1]["command_line_options"]["concurrency"] == 2

    def test_the_cache_time_is_envoys(self, facts: dict[str, Any]) -> None:
        """What `--set` changes reaches the parts, not the file alone."""
        dump = requests.get(f"{facts['gateways'][1]['admin_url']}/config_dump", timeout=5).text
        assert '"cache_duration": "2s"' in dump

    def test_the_rotator_is_no_owner_and_the_owner_no_superuser(self, facts: dict[str, Any]) -> None:
        """Each role has the rights of its name."""
        assert query(facts["owner_database_url"], "SELECT rolsuper FROM pg_roles WHERE rolname = current_user") == [(False,)]
        assert query(facts["owner_database_url"], "SELECT name FROM key_rotation.environment") == [("sandbox",)]
        with pytest.raises(psycopg2.errors.InsufficientPrivilege):
            query(facts["database_url"], "SELECT private_key_ciphertext FROM public.signing_keys")

    def test_a_message_stands_in_the_inbox(self, world: World, facts: dict[str, Any]) -> None:
        """What is posted below [slack].base_url is a message of the list."""
        slack = tomllib.loads(Path(facts["config"]).read_text())["slack"]
        assert slack["base_url"] == f"{facts['slack_url']}/api/"
        posted = requests.post(
            f"{slack['base_url']}chat.postMessage",
            headers={"Authorization": f"Bearer {secret(slack['token'])}"},
            json={"channel": slack["channel"], "text": "a word from the tests"},
            timeout=5,
        )
        assert posted.json()["ok"]
        messages = requests.get(f"{facts['slack_url']}/messages", timeout=5).json()
        assert messages[-1]["text"] == "a word from the tests"
        assert set(messages[-1]) == {"channel", "ts", "thread_ts", "text", "blocks"}

    def test_every_flow_has_a_deployment_with_its_form(self, facts: dict[str, Any]) -> None:
        """One for each flow file, runnable with one click, without a schedule."""
        deployments = ask(facts, "/deployments/filter")
        names = {requests.get(f"{facts['prefect_api_url']}/flows/{each['flow_id']}", timeout=5).json()["name"] for each in deployments}
        assert {"rotate-signing-keys", "cleanup-old-keys", "bootstrap-signing-keys"} <= names
        assert len(deployments) == len(list((CHECKOUT / "flows").glob("*.py")))
        for deployment in deployments:
            assert (deployment["name"], deployment["work_pool_name"]) == ("sandbox", "sandbox")
            assert deployment["parameters"] == {"environment": "sandbox"}
            assert "environment" in deployment["parameter_openapi_schema"]["properties"]
            assert deployment["description"]
            assert deployment["schedules"] == []
            assert not deployment["paused"]

    def test_the_work_pools_of_prefect_yaml_exist(self, facts: dict[str, Any]) -> None:
        """So that `prefect deploy --all` works against this server."""
        pools = {pool["name"] for pool in ask(facts, "/work_pools/filter")}
        deployments = YAML(typ="safe").load(CHECKOUT / "prefect.yaml")["deployments"]
        named = {deployment["work_pool"]["name"] for deployment in deployments}
        assert {"sandbox", *named} <= pools

    def test_nothing_answers_outside_loopback(self, facts: dict[str, Any]) -> None:
        """No part listens on an address that another machine could reach."""
        shown = subprocess.run(["ss", "-Htlnp"], capture_output=True, text=True, check=False)
        ours = {f"pid={pid}," for pid in facts["pids"].values()}
        listening = [line.split()[3] for line in shown.stdout.splitlines() if any(pid in line for pid in ours)]
        assert len(listening) > 8
        assert [address for address in listening if not LOOPBACK.match(address)] == []


@one_worker
class TestWhatIsRefused:
    """Wrong usage, in one sentence."""

    def test_a_second_world_on_the_same_home(self, world: World) -> None:
        """The first one is not disturbed."""
        refused = up(world.home)
        assert said(refused) == f"a sandbox is running in {world.home}: stop it, or choose another folder"
        assert refused.returncode == 1
        assert world.running
        assert world.facts["pids"]["sandbox"]

    def test_a_setting_that_is_not_known(self, tmp_path: Path) -> None:
        """Exit status 2, before anything is started or written."""
        refused = up(tmp_path / "home", "--set", "policy.token_livetime=3s")
        assert said(refused).startswith("there is no setting 'policy.token_livetime'; near names: policy.token_lifetime")
        assert not (tmp_path / "home").exists()


@one_worker
class TestItsDead:
    """Parts that die, or are killed to see what happens."""

    def test_they_are_left_and_come_back_when_asked_for(self, world: World) -> None:
        """The others live on; the dead start again at their old addresses, and sandbox.json has their new pids."""
        before, killed = world.facts, {"gateway-1", "postgres", "prefect-worker"}
        for name in killed:
            os.kill(before["pids"][name], signal.SIGKILL)
        eventually(lambda: not any(born(before["pids"][name]) for name in killed), "a part outlived kill -9")
        assert world.running
        world.revive()
        after = world.facts
        assert {name for name, pid in after["pids"].items() if pid != before["pids"][name]} == killed
        assert all(map(born, after["pids"].values()))
        assert known_keys(after) == known_keys(before)
        assert after["gateways"][0]["url"] == before["gateways"][0]["url"]


class TestHowItEnds:
    """Told to, killed, or by the death of a part: no process is left."""

    def test_killed_and_started_again_it_goes_on(self, tmp_path: Path) -> None:
        """`kill -9` takes all parts along; keys, secrets, addresses and Prefect's runs are there again."""
        world = World(tmp_path / "home").up()
        before, keys = world.facts, known_keys(world.facts)
        world.kill()
        eventually(lambda: not any(map(born, before["pids"].values())), "a part outlived kill -9")
        with world:
            after = world.facts
            assert {**after, "pids": None, "gateways": None} == {**before, "pids": None, "gateways": None}
            assert len(keys) == 1
            assert known_keys(after) == keys
            assert len(ask(after, "/flow_runs/filter")) == 1
            fresh_token(after)
        assert not any(map(born, after["pids"].values()))
        assert not (world.home / "sandbox.json").exists()

    @pytest.mark.parametrize("after", [0.5, 4.0])
    def test_told_to_end_while_it_starts_it_leaves_nothing(self, tmp_path: Path, after: float) -> None:
        """Also a second and third signal on top of it, as from an impatient person."""
        starting = up(tmp_path / "home", "--no-bootstrap")
        time.sleep(after)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
            starting.send_signal(number)
            time.sleep(0.05)
        said(starting)
        assert starting.returncode in (0, -signal.SIGTERM)
        assert marked(tmp_path / "home") == []

    def test_the_death_of_a_part_ends_a_world_that_wants_it_so(self, tmp_path: Path) -> None:
        """It says which part, and what that one said last; exit status 1."""
        home = tmp_path / "home"
        running = up(home, "--no-bootstrap", "--set", "sandbox.on_death=end")
        eventually((home / "sandbox.json").exists, "it did not come up", within=120)
        pids = json.loads((home / "sandbox.json").read_text())["pids"]
        os.kill(pids["slack"], signal.SIGKILL)
        assert said(running).startswith("slack has died. Its last words:")
        assert running.returncode == 1
        assert not any(map(born, pids.values()))
        assert not (home / "sandbox.json").exists()


def up(home: Path, *options: str) -> subprocess.Popen[str]:
    """`python -m sandbox up` as a shell starts it."""
    command = [sys.executable, "-m", "sandbox", "up", "--home", str(home), *options]
    return subprocess.Popen(command, cwd=CHECKOUT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def said(ended: subprocess.Popen[str]) -> str:
    """What a process wrote as its error, once it has ended."""
    return ended.communicate(timeout=60)[1].strip()


def marked(home: Path) -> list[int]:
    """The processes that carry the mark of this home."""
    mark, found = f"SANDBOX_FAMILY={home.resolve()}".encode(), []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def eventually(true: Callable[[], bool], otherwise: str, within: float = 10.0) -> None:
    """Fails, in these words, unless it becomes true in time."""
    deadline = time.monotonic() + within
    while not true():
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.05)


def mode(path: Path) -> int:
    """Its permission bits."""
    return stat.S_IMODE(path.stat().st_mode)


def files_in(folder: Path) -> list[Path]:
    """Every regular file below a folder."""
    return [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]


def secret(reference: str) -> str:
    """The secret that a `file:` reference with an absolute path leads to."""
    assert reference.startswith("file:/")
    return Path(reference.removeprefix("file:")).read_text()


def fresh_token(facts: dict[str, Any]) -> str:
    """An access token of the token URL."""
    credentials = (facts["client_id"], facts["client_secret"])
    answer = requests.post(facts["token_url"], auth=credentials, data=ISSUED, timeout=5)
    answer.raise_for_status()
    return str(answer.json()["access_token"])


def ask(facts: dict[str, Any], path: str) -> list[dict[str, Any]]:
    """A filter of Prefect's API that lets everything pass."""
    answer = requests.post(f"{facts['prefect_api_url']}{path}", json={}, timeout=10)
    answer.raise_for_status()
    return list(answer.json())


def known_keys(facts: dict[str, Any]) -> list[tuple[Any, ...]]:
    """Kid and status of every key."""
    return query(facts["owner_database_url"], "SELECT kid, status FROM public.signing_keys ORDER BY kid")


def query(url: str, statement: str) -> list[tuple[Any, ...]]:
    """The rows that a role sees."""
    with closing(psycopg2.connect(url)) as connection, connection.cursor() as cursor:
        cursor.execute(statement)
        return cursor.fetchall()
