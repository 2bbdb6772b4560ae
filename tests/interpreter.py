"""Provide a `python` for commands of users, whose processes are forked from one that has loaded torch before.

Launchers such as torchrun and mpirun start interpreters, each of which would spend four seconds of CPU on imports. Here
a small script stands in for the interpreter. A server forks a process that takes over the arguments, environment,
folder and files of the script, and runs the program. The script forwards signals to that process and ends as it ends.
"""

from __future__ import annotations

import ast
import atexit
import contextlib
import ctypes
import functools
import gc
import importlib
import multiprocessing as mp
import os
import runpy
import selectors
import shutil
import signal
import socket
import sys
import tempfile
import threading
import traceback
import types
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from tests.forks import become, end_with_parent, forkserver

__all__ = ["forked_python"]

_ROOT = Path(__file__).parents[1]

# It imports as little as possible, because it runs in each process. Signals are those that launchers send.
_SCRIPT = """#!{python} -SE
import os, signal, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
request = repr((sys.argv[1:], dict(os.environ), os.getcwd())).encode()
socket.send_fds(server, [len(request).to_bytes(4, "big")], [0, 1, 2])
server.sendall(request)
pid = int.from_bytes(server.recv(4), "big")
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
    signal.signal(number, lambda number, _: os.killpg(pid, number))
for file in (0, 1, 2):
    os.close(file)
status = int.from_bytes(server.recv(4), "big", signed=True)
if status < 0:
    if -status not in (signal.SIGKILL, signal.SIGSTOP):
        signal.signal(-status, signal.SIG_DFL)
    os.kill(os.getpid(), -status)
os._exit(status)
"""


@functools.cache
def forked_python(*modules: str) -> Path:
    """Return the path of a `python` that runs programs in forked processes. It works until this process ends.

    Args:
        modules: names of more modules that the processes have loaded.
    """
    folder = Path(tempfile.mkdtemp(prefix="python-"))
    mp.util.Finalize(None, shutil.rmtree, (folder, True), exitpriority=0)  # type: ignore[attr-defined]
    address = str(folder / "server")
    here, there = mp.Pipe()
    python = folder / "python"
    server = forkserver().Process(target=_serve, args=(address, str(python), modules, there), daemon=True)
    server.start()
    there.close()
    assert here.recv() == "listening"
    python.write_text(_SCRIPT.format(python=sys.executable, address=address), encoding="utf-8")
    python.chmod(0o755)
    # launch/mpirun.sh prefers the mpirun that is next to the interpreter.
    if (mpirun := Path(sys.executable).with_name("mpirun")).exists():
        (folder / "mpirun").symlink_to(mpirun)
    return python


def _serve(address: str, python: str, modules: Sequence[str], ready: Any) -> None:
    """Fork a process for each connection, and tell it how that process ended."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for module in modules:
            importlib.import_module(module)
    # A full collection visits a million objects otherwise, and DeepSpeed asks for many of them.
    gc.freeze()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(64)
    selector = selectors.DefaultSelector()
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    selector.register(listener, selectors.EVENT_READ)
    selector.register(woken, selectors.EVENT_READ)
    ready.send("listening")
    clients: dict[int, socket.socket] = {}
    while True:
        for key, _ in selector.select():
            if key.fileobj is listener:
                client, _ = listener.accept()
                files, request = _receive(client)
                pid = os.fork()
                if pid == 0:
                    for one in (listener, client, *clients.values(), selector):
                        one.close()
                    _become(python, files, *ast.literal_eval(request))
                for file in files:
                    os.close(file)
                client.sendall(pid.to_bytes(4, "big"))
                clients[pid] = client
                selector.register(client, selectors.EVENT_READ, pid)
            elif key.fileobj == woken:
                os.read(woken, 4096)
            elif key.data in clients:
                # The script was killed.
                selector.unregister(clients[key.data])
                clients.pop(key.data).close()
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(key.data, signal.SIGKILL)
        for pid, status in _reap():
            if (client_of := clients.pop(pid, None)) is not None:
                selector.unregister(client_of)
                with contextlib.suppress(BrokenPipeError):
                    client_of.sendall(status.to_bytes(4, "big", signed=True))
                client_of.close()


def _receive(client: socket.socket) -> tuple[list[int], str]:
    header, files, _, _ = socket.recv_fds(client, 4, 3)
    with client.makefile("rb", buffering=0) as stream:
        missing, request = int.from_bytes(header, "big"), b""
        while missing > len(request):
            request += stream.read(missing - len(request)) or b""
    return files, request.decode()


def _reap() -> list[tuple[int, int]]:
    """Return the ids and exit codes of the processes that have ended. A signal is a negative code."""
    ended = []
    with contextlib.suppress(ChildProcessError):
        while (one := os.waitpid(-1, os.WNOHANG)) != (0, 0):
            ended.append((one[0], os.waitstatus_to_exitcode(one[1])))
    return ended


def _become(python: str, files: list[int], arguments: list[str], env: dict[str, str], cwd: str) -> NoReturn:
    """Run a program in this process, as the interpreter would with these arguments, and end it."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # The script sends signals to the group, which the process that runs the script may not be in.
    os.setsid()
    end_with_parent()
    become(cwd, env, files)
    warnings.resetwarnings()
    warnings.filters[:] = _FILTERS
    unbuffered = bool(env.get("PYTHONUNBUFFERED"))
    while arguments[0] in ("-u", "-W"):
        if arguments[0] == "-W":
            warnings.simplefilter(arguments.pop(1))  # type: ignore[arg-type]
        unbuffered |= arguments.pop(0) == "-u"
    # Lines reach the log of a launcher at once.
    buffering = 1 if unbuffered else -1
    sys.stdin = sys.__stdin__ = open(0, closefd=False)  # type: ignore[misc]  # noqa: SIM115
    sys.stdout = sys.__stdout__ = open(1, "w", buffering, closefd=False)  # type: ignore[misc]  # noqa: SIM115
    sys.stderr = sys.__stderr__ = open(2, "w", 1, closefd=False)  # type: ignore[misc]  # noqa: SIM115
    sys.executable = python
    sys.modules["__main__"] = types.ModuleType("__main__")
    own = {str(_ROOT), str(_ROOT / "launch"), "", os.getcwd()}
    first, *rest = arguments
    folder = {"-c": "", "-m": cwd}.get(first, str(Path(first).resolve().parent))
    given = [path for path in env.get("PYTHONPATH", "").split(":") if path]
    sys.path[:] = [folder, *given, *(path for path in sys.path if path not in own)]
    code = 0
    try:
        if first == "-c":
            sys.argv = ["-c", *rest[1:]]
            exec(compile(rest[0], "<string>", "exec"), vars(sys.modules["__main__"]))
        elif first == "-m":
            sys.argv = ["-m", *rest[1:]]
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        else:
            sys.argv = [first, *rest]
            runpy.run_path(first, run_name="__main__")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        code = 1
        try:
            sys.excepthook(*sys.exc_info())
        except BaseException:
            traceback.print_exc()
    _end(code)


def _end(code: int) -> NoReturn:
    """End this process as the interpreter does, without the second that it takes to free all objects of torch."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    # mpi4py finalizes MPI when the interpreter has ended, or aborts the job.
    if (mpi := sys.modules.get("mpi4py.MPI")) is not None and mpi.Is_initialized() and not mpi.Is_finalized():
        if code != 0:
            ctypes.pythonapi.Py_Exit(code)
        mpi.Finalize()
    for stream in (sys.stdout, sys.stderr):
        # The program may have closed it.
        with contextlib.suppress(ValueError):
            stream.flush()
    os._exit(code)


_FILTERS = list(warnings.filters)
