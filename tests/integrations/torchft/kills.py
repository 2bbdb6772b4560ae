"""Kill replicas of a torchft job at random, and compare the survivors bit by bit.

`python tests/integrations/torchft/kills.py [--faults 200] [--seed 0]` trains three replica groups on gloo, each in a
thread. In every committed step all replicas must have the same weights, optimizer state, policy state and coefficient.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import os
import random
import sys
import threading
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from distclip import Policy, ema

FAULTS = ("killed before backward", "killed after backward", "killed after the vote", "failed all-reduce")
NUM_REPLICAS = 3


def make_policy() -> Policy:
    """Return a policy with state that clips often."""
    return ema(ratio=1.2, warmup=2)


class KilledError(Exception):
    """A replica has been killed."""


@dataclass
class Job:
    """Faults to come, and what the replicas had after each committed step.

    Args:
        num_faults: number of faults to inject.
        seed: of the faults.
        policy: makes the policy of a replica.
        attach: attaches it; None for distclip's integration.
    """

    num_faults: int
    seed: int
    policy: Callable[[], Policy] = make_policy
    attach: Any = None
    faults: Counter[str] = field(default_factory=Counter)
    digests: dict[tuple[int, int], dict[int, tuple[str, float]]] = field(default_factory=lambda: defaultdict(dict))
    """By the number of the quorum, the step and the replica. If all replicas die, the job begins again at step 0."""
    lock: threading.Lock = field(default_factory=threading.Lock)
    steps_after: Counter[int] = field(default_factory=Counter)
    """By the replica: steps that it has committed since its start and since the last fault."""
    over: threading.Event = field(default_factory=threading.Event)
    error: BaseException | None = None

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)

    def draw(self, step: int) -> str | None:
        """Return a fault of a replica in this step, or None."""
        with self.lock:
            if sum(self.faults.values()) == self.num_faults or step < 2 or self.random.random() > 0.12:
                return None
            fault = self.random.choice(FAULTS)
            self.faults[fault] += 1
            return fault

    def record(self, quorum: int, step: int, replica: int, digest: str, coef: float) -> None:
        """Record what a replica has after a step, and end the job three steps of all replicas after the last fault."""
        with self.lock:
            self.digests[quorum, step][replica] = digest, coef
            if sum(self.faults.values()) == self.num_faults:
                self.steps_after[replica] += 1
                # No replica ends before all have come this far. Those that are left would wait for a quorum.
                if len(self.steps_after) == NUM_REPLICAS and min(self.steps_after.values()) >= 3:
                    self.over.set()

    def differences(self) -> list[str]:
        """Return the steps after which replicas differed."""
        return [
            f"quorum {quorum}, step {step}: {by_replica}"
            for (quorum, step), by_replica in sorted(self.digests.items())
            if len(set(by_replica.values())) > 1
        ]


def digest_of(*states: Any) -> str:
    """Return a hash of the bits of all tensors and numbers in some states."""
    total = hashlib.sha256()
    for leaf in tree_flatten(states)[0]:
        total.update(leaf.detach().numpy().tobytes() if isinstance(leaf, Tensor) else repr(leaf).encode())
    return total.hexdigest()[:16]


def train(job: Job, replica: int, attempt: int, lighthouse: str) -> None:
    """Train one replica until the job ends, or until it is killed."""
    from torchft import Manager, Optimizer, ProcessGroupGloo
    from torchft.process_group import FakeProcessGroupWrapper

    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    torch.manual_seed(attempt)  # other weights in every replica, until it heals
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    group = FakeProcessGroupWrapper(ProcessGroupGloo(timeout=timedelta(seconds=3)))

    def load_state_dict(state: Any) -> None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])

    manager = Manager(
        pg=group,
        min_replica_size=2,
        load_state_dict=load_state_dict,
        state_dict=lambda: {"model": model.state_dict(), "optimizer": optimizer.state_dict()},
        replica_id=str(replica),
        store_addr="localhost",
        store_port=store.port,
        rank=0,
        world_size=1,
        lighthouse_addr=lighthouse,
        timeout=timedelta(seconds=10),
        quorum_timeout=timedelta(seconds=30),
        hostname="localhost",
    )
    try:
        optimizer = Optimizer(manager, torch.optim.AdamW(model.parameters(), lr=0.01))
        if job.attach is None:
            from distclip.integrations.torchft import attach

            attachment: Any = attach(optimizer, job.policy(), model)
        else:
            attachment = job.attach(optimizer, job.policy(), model)
        generator = torch.Generator().manual_seed(1000 * replica + attempt)
        while not job.over.is_set():
            fault = job.draw(manager.current_step())
            optimizer.zero_grad()
            if fault == "killed before backward":
                raise KilledError
            rows = torch.randn(4, 4, generator=generator) * 3 ** float(torch.randn((), generator=generator))
            model(rows).square().mean().backward()
            if fault == "failed all-reduce":
                group.report_future_error(RuntimeError("injected"))
            _average_(manager, [param.grad for param in model.parameters() if param.grad is not None])
            if fault == "killed after backward":
                raise KilledError
            if fault == "killed after the vote":
                optimizer.optim.register_step_pre_hook(_kill)
            optimizer.step()
            if manager._commit_failures == 0:
                digest = digest_of(model.state_dict(), optimizer.state_dict()["state"], attachment.state_dict())
                job.record(manager._quorum_id, manager.current_step(), replica, digest, float(attachment.report.coef))
    finally:
        manager.shutdown(wait=False)
        group.shutdown()


def _average_(manager: Any, grads: list[Tensor]) -> None:
    """Average gradients over the replicas."""
    # In torchft 0.2 DistributedDataParallel raises an AssertionError if its all-reduce fails.
    mean = torch.cat([grad.flatten() for grad in grads])
    manager.allreduce(mean).wait()
    for grad, values in zip(grads, mean.split([grad.numel() for grad in grads]), strict=True):
        grad.copy_(values.view_as(grad))


def _kill(*_: Any) -> None:
    raise KilledError


def run(job: Job) -> None:
    """Train all replicas until the job is over, and start each again that is killed or that its peers kept waiting."""
    from torchft._torchft import LighthouseServer

    lighthouse = LighthouseServer(
        bind="[::]:0", min_replicas=2, join_timeout_ms=200, quorum_tick_ms=20, heartbeat_timeout_ms=400
    )
    address = lighthouse.address()

    def must_restart(replica: int, attempt: int) -> bool:
        try:
            train(job, replica, attempt, address)
        except (KilledError, TimeoutError):
            with job.lock:
                job.steps_after.pop(replica, None)
            return True
        except BaseException as error:
            job.error = error
            job.over.set()
        return False

    def keep_alive(replica: int) -> None:
        attempt = 0
        while must_restart(replica, attempt):
            attempt += 1

    for replica in range(NUM_REPLICAS):
        # Threads of replicas may wait for a quorum that never comes, and must not keep the process alive.
        threading.Thread(target=keep_alive, args=(replica,), daemon=True).start()
    job.over.wait()
    if job.error is not None:
        raise job.error


def main() -> None:
    """Run from the command line, and exit with status 1 if replicas differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)
    begin, job = time.monotonic(), Job(options.faults, options.seed)
    try:
        run(job)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    job.lock.acquire()  # Replicas may still be in a step.
    sizes = Counter(len(by_replica) for by_replica in job.digests.values())
    print(f"{sum(job.faults.values())} faults in {time.monotonic() - begin:.0f} s: {dict(job.faults)}")
    print(f"{len(job.digests)} committed steps, by number of replicas: {dict(sorted(sizes.items()))}")
    print(f"{sum(coef < 1 for one in job.digests.values() for _, coef in one.values())} of them were clipped")
    print(f"{len(job.differences())} steps after which replicas differed")
    for line in job.differences()[:5]:
        print(line)
    sys.stdout.flush()
    # Threads of replicas that were killed wait for a quorum, and would keep the process alive.
    os._exit(1 if job.differences() else 0)


if __name__ == "__main__":
    main()
