"""Kill or stop one rank of the training job at one stage of a step.

`python tests/launch/kills.py [Hydra overrides]` is launch/train.py with plans in the variable KILLS, separated by
semicolons: one for each attempt of torchrun. A plan is STAGE:RANK:CALL. The rank ends by SIGKILL in that call of the
stage. Rank 0 checks first what the attempt before has left in the current folder.
"""

from __future__ import annotations

import io
import json
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

TRAIN = Path(__file__).parents[2] / "launch" / "train.py"


def note() -> None:
    """Write into the current folder that a plan was carried out."""
    with Path("kills").open("a", encoding="utf-8") as file:
        file.write(f"{plan()}\n")


def kill() -> NoReturn:
    note()
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


def stop() -> None:
    """Stop this process, as `kill -STOP` does, for a second."""
    note()
    subprocess.Popen(["sh", "-c", f"sleep 1; kill -CONT {os.getpid()}"])
    os.kill(os.getpid(), signal.SIGSTOP)


def tear(append: Callable[..., None], lines: Any, rows: Any) -> NoReturn:
    """Write half of what a call of `JsonLines.append` writes, and kill this process."""
    begin = lines.path.stat().st_size
    append(lines, rows)
    os.truncate(lines.path, (begin + lines.path.stat().st_size) // 2)
    kill()


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

    def all_reduce_by_mpi(self: MPIComm, tensor: Any) -> None:
        self.start_sum(tensor)
        kill()

    def save(value: Any, file: Any, *args: Any, **kwargs: Any) -> None:
        # Other values are written into memory, before there is a file.
        (save_in_memory if isinstance(file, io.BytesIO) else save_in_file)(value, file, *args, **kwargs)

    match stage:
        case "forward":
            replace(ParallelModel, "forward_backward")
        case "stopped":
            forward = ParallelModel.forward_backward

            def stop_before(*args: Any) -> Any:
                stop()
                return forward(*args)

            ParallelModel.forward_backward = at_call(number, stop_before, forward)  # type: ignore[method-assign]
        case "before the all-reduce":
            replace(engine, "_begin_decision")
        case "in the all-reduce":
            ProcessGroupComm._all_reduce = at_call(number, all_reduce, ProcessGroupComm._all_reduce)  # type: ignore[method-assign]
            MPIComm.sum_ = at_call(number, all_reduce_by_mpi, MPIComm.sum_)  # type: ignore[method-assign]
        case "after the all-reduce":
            replace(engine, "_finish_decision", before=False)
        case "log":
            append = JsonLines.append
            JsonLines.append = at_call(number, partial(tear, append), append)  # type: ignore[method-assign]
        case "checkpoint":
            save_in_memory = torch.save
            replace(torch, "save", before=False)
            save_in_file = torch.save
            torch.save = save
        case "rename":
            replace(Path, "rename")
        case _:
            raise ValueError(stage)


def check_left(folder: Path) -> list[Path]:
    """Check the logs and the checkpoints in a folder, and return the checkpoints that a kill has left unfinished."""
    for log in folder.glob("**/metrics.jsonl"):
        # Only the line that was being written may be torn.
        for line in log.read_text(encoding="utf-8").split("\n")[:-1]:
            assert json.loads(line)
    checkpoints = [*folder.glob("**/checkpoints/*")]
    unfinished = [path for path in checkpoints if path.suffix == ".unfinished"]
    for path in set(checkpoints) - set(unfinished):
        # Both files are written when all others are whole.
        assert (path / ".metadata").exists() or (path / "sizes.json").exists(), path
    return unfinished


def plan() -> str:
    """Return the plan of this attempt."""
    return os.environ["KILLS"].split(";")[int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))]


if __name__ == "__main__":
    sys.path[:0] = [str(TRAIN.parents[1]), str(TRAIN.parent)]
    sys.argv[0] = str(TRAIN)
    from job.processes import RANK

    if RANK == 0:
        check_left(Path.cwd())
    stage, rank, number = plan().split(":")
    if int(rank) == RANK:
        install(stage, int(number))
    runpy.run_path(str(TRAIN), run_name="__main__")
