"""Continue a job whose ranks torchrun has restarted: find the other ranks, and the run directory.

The ranks of all attempts share the store of torchrun's agent. It still has addresses of ranks that have ended, so each
attempt needs a separate part of the store. Every rank starts an attempt with a handshake with rank 0.
"""

import json
import os
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch.distributed import PrefixStore, Store, TCPStore

# This is in seconds. torchrun itself ends the ranks if one of them does not start.
_PATIENCE = 1800


@dataclass(frozen=True)
class Attempt:
    """One start of all ranks by torchrun.

    Args:
        store: store of this attempt alone.
        directory: directory of the job, from an earlier attempt; None in the first one.
        started: directories of the runs that an earlier attempt has started.
        job_store: store that all attempts share.
    """

    store: Store
    directory: Path | None
    started: frozenset[str]
    job_store: Store

    def record(self, job: Path, run: Path) -> None:
        """Record on rank 0 that a run has started, for later attempts."""
        facts = _read_facts(self.job_store)
        started = {*facts["started"], str(run)}
        self.job_store.set("facts", json.dumps({"directory": str(job), "started": sorted(started)}))


def join_attempt() -> Attempt | None:
    """Find the ranks of this attempt. Return None without torchrun, because only it restarts ranks.

    Every rank must call it, once.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    tcp_store = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=_PATIENCE))
    store = PrefixStore("distclip/job", tcp_store)
    message = handshake(store, int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    directory = message["directory"]
    return Attempt(
        PrefixStore(f"distclip/attempt/{message['token']}", tcp_store),
        None if directory is None else Path(directory),
        frozenset(message["started"]),
        store,
    )


def handshake(store: Store, rank: int, world_size: int) -> dict[str, Any]:
    """Return the same message on all ranks of one attempt.

    Ranks of earlier attempts have left messages in the store. So a rank accepts only an answer to its own greeting, and
    rank 0 answers until every rank has accepted. The number of restarts cannot identify an attempt, because torchrun
    counts it on each node separately.

    Args:
        store: store that all attempts share.
        rank: rank of this process in this attempt.
        world_size: world size of this attempt.
    """
    own = uuid.uuid4().hex
    if rank:
        store.set(f"greeting of {rank}", own)
        message = json.loads(store.get(f"answer to {own}"))
        store.add(f"accepted {message['token']}", 1)
        return dict(message)
    answer = json.dumps({"token": own, **_read_facts(store)})
    answered: dict[int, bytes] = {}
    deadline, pause = time.monotonic() + _PATIENCE, 0.001
    while store.add(f"accepted {own}", 0) < world_size - 1:
        for other in range(1, world_size):
            key = f"greeting of {other}"
            if store.check([key]) and (greeting := store.get(key)) != answered.get(other):
                store.set(f"answer to {greeting.decode()}", answer)
                answered[other] = greeting
        if time.monotonic() > deadline:
            missing = sorted(set(range(1, world_size)) - answered.keys())
            raise SystemExit(f"ranks {missing} did not start within {_PATIENCE} s. See their output for the reason")
        time.sleep(pause)
        pause = min(2 * pause, 0.2)
    return dict(json.loads(answer))


def find_job_directory(attempt: Attempt | None, arguments: Sequence[str]) -> Path | None:
    """Return the directory of the job if every rank can find it, or None.

    It is that of an earlier attempt, or the one on the command line. Hydra's default contains the time, which differs
    between ranks.

    Args:
        attempt: attempt of this job.
        arguments: arguments of the command line.
    """
    if attempt is not None and attempt.directory is not None:
        return attempt.directory
    is_multirun = not {"-m", "--multirun"}.isdisjoint(arguments)
    prefix = "hydra.sweep.dir=" if is_multirun else "hydra.run.dir="
    values = [argument.removeprefix(prefix) for argument in arguments if argument.startswith(prefix)]
    return Path(values[-1].strip("'\"")).absolute() if values else None


def _read_facts(store: Store) -> dict[str, Any]:
    return json.loads(store.get("facts")) if store.check(["facts"]) else {"directory": None, "started": []}
