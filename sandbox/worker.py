"""Owns the process worker of the sandbox's Prefect, and that the deployments are made before it polls.

    python -m sandbox.worker

`prefect worker start` would do the same work, but takes seconds longer for its command line, and cannot begin before
the server answers.
"""

import asyncio
import contextlib
import signal
import sys
from multiprocessing import get_context
from multiprocessing.context import ForkContext, SpawnContext

from prefect.workers.process import ProcessWorker

from sandbox.conductor import POOL, WORKER
from sandbox.deployments import main as deploy
from sandbox.processes import ON_LINUX

# The deployments are made in a process of their own, for the flow files that they load. A fork of this one has the
# seconds of importing Prefect behind it; nothing runs in it yet that a fork could tear. macOS's frameworks allow none.
_BESIDE: ForkContext | SpawnContext = get_context("fork") if ON_LINUX else get_context("spawn")


def main() -> int:
    """Runs until SIGINT or SIGTERM."""
    # A daemon: told to end while it still waits for the server, this process takes it along.
    deployments = _BESIDE.Process(target=deploy, daemon=True)
    deployments.start()
    # Prefect's worker ends in order on SIGINT only. After the fork, which keeps its own ways.
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    with contextlib.suppress(KeyboardInterrupt):
        deployments.join()
        if deployments.exitcode:
            return 1
        asyncio.run(ProcessWorker(work_pool_name=POOL, name=WORKER).start())
    return 0


if __name__ == "__main__":
    sys.exit(main())
