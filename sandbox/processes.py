"""Owns the child processes of a sandbox: their start, readiness, log, end, and what is left when the sandbox is killed.

Three things hold, whatever happens to the sandbox itself:

1. Ended in order, every child is stopped by its own pid: first a request, then SIGKILL after a limit.
2. Killed hard (`kill -9`), its children die with it: on Linux the kernel sees to that (`PR_SET_PDEATHSIG`).
3. Whatever still outlived it (grandchildren, or any child on macOS) is swept when a sandbox of the same home starts
   again, and only that: a recorded pid counts only together with the instant at which its process was born, and on
   Linux every descendant also carries the home's mark in its environment.

Two sandboxes never share a home: `claimed` holds a lock, so that a second one cannot sweep away the first.
"""

import contextlib
import fcntl
import inspect
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

LOOPBACK = "127.0.0.1"
ON_LINUX = sys.platform == "linux"

# Below Linux's ephemeral range (32768 and up, macOS: 49152): a port that some outgoing connection borrows for a moment
# would be missing when its server is killed and started again.
_PORTS = range(20_000, 32_000)
_POLL = 0.02
_LOG_LINES = 25
_SWEEP_WITHIN = 10.0

# The mark that descendants inherit. A process that replaces its environment (a PostgreSQL backend) loses it.
_MARK = "SANDBOX_FAMILY"

# PR_SET_PDEATHSIG fires when the *thread* that forked ends, not only its process. All children are therefore forked by
# one thread that lives as long as the sandbox, so that a caller may start parts from short-lived threads.
_spawner = ThreadPoolExecutor(max_workers=1, thread_name_prefix="spawner")

_handed_out: set[int] = set()


class SandboxError(Exception):
    """A part of the sandbox cannot do its work; the text says which, and what it last said."""


class AlreadyRunningError(SandboxError):
    """Another sandbox holds this home."""


@dataclass(frozen=True, slots=True)
class Account:
    """The unprivileged account a child of root runs under.

    `passes_folders` lets it through folders that are closed to it (see `sandbox.postgres` for the why): the child then
    keeps CAP_DAC_OVERRIDE, and nothing else, from root.
    """

    uid: int
    gid: int
    passes_folders: bool = False


def free_port() -> int:
    """A loopback port that nobody listens on and that this process has not handed out before."""
    for port in random.sample(_PORTS, len(_PORTS)):
        if port not in _handed_out and _can_bind(port):
            _handed_out.add(port)
            return port
    raise SandboxError(f"no free port on {LOOPBACK} between {_PORTS.start} and {_PORTS.stop}")


def listening(port: int) -> bool:
    """Whether something accepts connections on this loopback port."""
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex((LOOPBACK, port)) == 0


class Process:
    """One long-lived child: started, waited for until it is ready, and stopped, any number of times.

    `env` replaces the environment (None: inherit). `ready` is asked again and again until it says True. The log is
    `home/logs/NAME.log`, appended to by each start.
    """

    def __init__(
        self,
        name: str,
        argv: Sequence[str | Path],
        *,
        home: Path,
        ready: Callable[[], bool],
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        account: Account | None = None,
        ready_within: float = 30.0,
        stop_signal: signal.Signals = signal.SIGTERM,
        stop_within: float = 10.0,
        death_signal: signal.Signals = signal.SIGKILL,
    ) -> None:
        self.name = name
        self.log_path = home / "logs" / f"{name}.log"
        self._argv = [str(argument) for argument in argv]
        self._env = {**(os.environ if env is None else env), _MARK: _mark_of(home)}
        self._cwd, self._account, self._death_signal = cwd, account, death_signal
        self._ready, self._ready_within = ready, ready_within
        self._stop_signal, self._stop_within = stop_signal, stop_within
        self._record = _records(home) / f"{name}.json"
        self._log_start = 0
        self._child: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        if self._child is None:
            raise SandboxError(f"{self.name} was not started")
        return self._child.pid

    @property
    def running(self) -> bool:
        return self._child is not None and self._child.poll() is None

    def start(self) -> None:
        """Returns when the child is ready; otherwise it is gone again, and the error holds its last words."""
        if self.running:
            raise SandboxError(f"{self.name} is running already (pid {self.pid})")
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        with self.log_path.open("ab") as log:
            self._log_start = log.tell()
            self._child = _spawner.submit(self._spawn, log).result()
        try:
            self._remember()
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Asks the child to end, insists after the limit. Stopping what is not running does nothing."""
        if self._child is None:
            return
        if self._child.poll() is None:
            self._child.send_signal(self._stop_signal)
            try:
                self._child.wait(self._stop_within)
            except subprocess.TimeoutExpired:
                self._child.kill()
                self._child.wait()
        self._record.unlink(missing_ok=True)

    def kill(self) -> None:
        """The child dies without a chance to tidy up, as in a crash."""
        if self._child is not None:
            self._child.kill()
            self._child.wait()

    def last_words(self) -> str:
        """The last lines that this start of the child has logged."""
        if not self.log_path.exists():
            return ""
        with self.log_path.open("rb") as log:
            log.seek(self._log_start)
            lines = log.read().decode(errors="replace").splitlines()
        return "\n".join(lines[-_LOG_LINES:])

    def _spawn(self, log: BinaryIO) -> subprocess.Popen[bytes]:
        # A session of its own: Ctrl-C in a terminal reaches the sandbox only, which then stops its parts in order.
        return subprocess.Popen(
            launched(self._argv, self._account, self._death_signal),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=self._env,
            cwd=self._cwd,
            start_new_session=True,
        )

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + self._ready_within
        while time.monotonic() < deadline:
            if not self.running:
                raise SandboxError(f"{self.name} ended with {self._exit_code()} before it was ready:\n{self._said()}")
            if self._ready():
                return
            time.sleep(_POLL)
        raise SandboxError(f"{self.name} was not ready within {self._ready_within:g} s:\n{self._said()}")

    def _exit_code(self) -> int | None:
        return None if self._child is None else self._child.returncode

    def _said(self) -> str:
        return self.last_words() or "(it logged nothing)"

    def _remember(self) -> None:
        self._record.parent.mkdir(parents=True, exist_ok=True)
        self._record.write_text(json.dumps({"pid": self.pid, "born": born(self.pid)}))


@contextlib.contextmanager
def claimed(home: Path) -> Iterator[None]:
    """Holds a home for one sandbox: nothing of an earlier one is left at its beginning, nothing of its own at its end.

    Raises AlreadyRunningError while another process holds the home.
    """
    home.mkdir(parents=True, exist_ok=True)
    with (home / "lock").open("a") as lock:
        try:
            # The kernel lets go of it when the holder dies, however it dies. No child inherits it: it closes on exec.
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise AlreadyRunningError(f"a sandbox is running in {home}: stop it, or choose another folder") from None
        sweep(home)
        try:
            yield
        finally:
            sweep(home)


def launched(argv: Sequence[str | Path], account: Account | None = None, death_signal: signal.Signals = signal.SIGKILL) -> list[str]:
    """The command that runs `argv` under the account, and dies when this process does (the latter on Linux only).

    A small interpreter prepares itself and then becomes the command, under the same pid. The usual way, Python code in
    the forked child (`preexec_fn`), may hang where other threads run, and Python warns of it from 3.12 on.
    """
    command = [str(argument) for argument in argv]
    if not ON_LINUX:
        if account is not None:
            raise SandboxError("on this system the sandbox must be started by an ordinary user, not by root")
        return command
    order = {
        "sandbox": os.getpid(),
        "death_signal": int(death_signal),
        "account": None if account is None else (account.uid, account.gid, account.passes_folders),
        "no_capability": "root may not hand on CAP_DAC_OVERRIDE on this machine: put checkout and home where everybody "
        "may enter (mode 0755), or start the sandbox as an ordinary user",
    }
    return [sys.executable, "-I", "-S", "-c", _LAUNCHER, json.dumps(order), *command]


def sweep(home: Path) -> None:
    """Kills what an earlier sandbox of this home has left running, and nobody else's processes."""
    left = {pid: birth for pid, birth in (*_recorded(home), *_marked(home)) if birth is not None}
    end(left)
    for record in _records(home).glob("*.json"):
        record.unlink(missing_ok=True)


def end(processes: Mapping[int, str]) -> None:
    """SIGKILLs processes (pid → birth) that are not our children, and waits until they are gone."""
    deadline = time.monotonic() + _SWEEP_WITHIN
    remaining = {pid for pid, birth in processes.items() if born(pid) == birth}
    for pid in remaining:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    while remaining := {pid for pid in remaining if born(pid) == processes[pid]}:
        if time.monotonic() > deadline:
            raise SandboxError(f"leftover processes do not die: {sorted(remaining)}")
        time.sleep(_POLL)


def born(pid: int) -> str | None:
    """What tells this process from a later one of the same number: the instant of its birth. None: not alive."""
    return _born_by_proc(pid) if ON_LINUX else _born_by_ps(pid)


def everyone() -> list[int]:
    """Every pid that /proc shows. Empty where there is no /proc."""
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()] if ON_LINUX else []


def _born_by_proc(pid: int) -> str | None:
    try:
        # The command stands in parentheses and may hold any character: what follows the last one is fixed (proc(5)).
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    state, start_ticks = fields[0], fields[19]
    # A zombie is dead; where PID 1 does not reap, it stays listed for ever. Ticks count from boot, so boot is named.
    return None if state in "ZX" else f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()}+{start_ticks}"


def _born_by_ps(pid: int) -> str | None:
    shown = subprocess.run(["ps", "-o", "stat=,lstart=,command=", "-p", str(pid)], capture_output=True, text=True, check=False).stdout.strip()
    state, _, birth_and_command = shown.partition(" ")
    return None if not shown or state.startswith("Z") else birth_and_command.strip()


def _recorded(home: Path) -> Iterator[tuple[int, str | None]]:
    for record in _records(home).glob("*.json"):
        with contextlib.suppress(ValueError, KeyError):  # half written when its writer was killed
            entry = json.loads(record.read_text())
            yield int(entry["pid"]), entry["born"]


def _marked(home: Path) -> Iterator[tuple[int, str | None]]:
    mark = f"{_MARK}={_mark_of(home)}".encode()
    kin = _self_and_ancestors()
    for pid in everyone():
        with contextlib.suppress(OSError):  # gone meanwhile, or another user's
            if pid not in kin and mark in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                yield pid, born(pid)


def _self_and_ancestors() -> set[int]:
    kin, pid = {0}, os.getpid()
    while pid not in kin:
        kin.add(pid)
        with contextlib.suppress(OSError):
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return kin


def _mark_of(home: Path) -> str:
    return str(home.resolve())


def _records(home: Path) -> Path:
    return home / "run"


def _can_bind(port: int) -> bool:
    with socket.socket() as candidate:
        candidate.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            candidate.bind((LOOPBACK, port))
        except OSError:
            return False
        return True


def _launch() -> None:
    """The launcher's whole program (see `launched`): it knows nothing of this module, and ends as the command."""
    import ctypes
    import json
    import os
    import sys

    order, *command = json.loads(sys.argv[1]), *sys.argv[2:]
    libc = ctypes.CDLL(None, use_errno=True)
    pr_set_pdeathsig, pr_set_securebits, pr_cap_ambient, pr_cap_ambient_raise = 1, 28, 47, 2
    if order["account"] is not None:
        uid, gid, passes_folders = order["account"]
        os.setgroups([])
        os.setgid(gid)
        if passes_folders:
            # SECBIT_NO_SETUID_FIXUP: else setuid takes every capability, and access(2), by which PostgreSQL looks for
            # its own binaries, ignores the one that is kept.
            libc.prctl(pr_set_securebits, 1 << 2, 0, 0, 0)
        os.setuid(uid)
        if passes_folders:
            # capset(2), version 3: effective, permitted, inheritable of the lower 32 capabilities, then of the upper.
            # Ambient is what a program without capabilities of its own gets at exec.
            cap_dac_override = 1
            header = (ctypes.c_uint32 * 2)(0x20080522, 0)
            sets = (ctypes.c_uint32 * 6)(*[1 << cap_dac_override] * 3)
            if libc.capset(header, sets) or libc.prctl(pr_cap_ambient, pr_cap_ambient_raise, cap_dac_override, 0, 0):
                sys.exit(order["no_capability"])
    # Last, because a change of account clears it. Who died before it could count is no longer our parent.
    libc.prctl(pr_set_pdeathsig, order["death_signal"], 0, 0, 0)
    if os.getppid() == order["sandbox"]:
        os.execvp(command[0], command)


_LAUNCHER = f"{inspect.getsource(_launch)}\n\n_launch()\n"
