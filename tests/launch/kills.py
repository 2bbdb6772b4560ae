"""Kill one rank of the training job at one stage of a step, and start jobs in which that happens.

`python tests/launch/kills.py [Hydra overrides]` is launch/train.py with the kill that the variable KILL names, in the
form STAGE:RANK:CALL. The rank ends by SIGKILL in that call of the stage.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

TRAIN = Path(__file__).parents[2] / "launch" / "train.py"


def kill() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def at_call(number: int, act: Callable[..., Any], function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that is `act` in one of its calls, and `function` in the others."""
    calls = 0

    def replaced(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return (act if calls == number else function)(*args, **kwargs)

    return replaced


def install(stage: str, number: int) -> None:
    """Kill this process in a call of a stage. launch/ must be on the path."""
    import torch
    import torch.distributed as dist

    from distclip.comm.mpi import MPIComm
    from distclip.comm.process_group import ProcessGroupComm
    from distclip.engine import engine
    from distclip.monitor.jsonl import JsonLines
    from job.parallel.base import ParallelModel

    def replace(owner: Any, name: str, before: bool = True) -> None:
        function = getattr(owner, name)

        def act(*args: Any, **kwargs: Any) -> None:
            if not before:
                function(*args, **kwargs)
            kill()

        setattr(owner, name, at_call(number, act, function))

    def all_reduce(self: ProcessGroupComm, tensor: Any, op: Any) -> None:
        dist.all_reduce(tensor, op=op, group=self.group, async_op=True)
        kill()

    match stage:
        case "forward":
            replace(ParallelModel, "forward_backward")
        case "before the all-reduce":
            replace(engine, "_begin_decision")
        case "in the all-reduce":
            ProcessGroupComm._all_reduce = at_call(number, all_reduce, ProcessGroupComm._all_reduce)  # type: ignore[method-assign]
            replace(MPIComm, "sum_")
        case "after the all-reduce":
            replace(engine, "_finish_decision", before=False)
        case "log":
            replace(JsonLines, "append")
        case "checkpoint":
            replace(torch, "save", before=False)
        case "rename":
            replace(Path, "rename")
        case _:
            raise ValueError(stage)


def install_from_environment() -> None:
    """Kill this process in the call that the variable KILL names, if it is that rank."""
    if "KILL" not in os.environ:
        return
    stage, rank, number = os.environ["KILL"].split(":")
    from job.processes import RANK

    if int(rank) == RANK:
        install(stage, int(number))


if __name__ == "__main__":
    sys.path[:0] = [str(TRAIN.parents[1]), str(TRAIN.parent)]
    sys.argv[0] = str(TRAIN)
    plans = os.environ.get("KILLS", "").split(";")
    attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    if attempt < len(plans) and plans[attempt]:
        os.environ["KILL"] = plans[attempt]
    install_from_environment()
    runpy.run_path(str(TRAIN), run_name="__main__")
