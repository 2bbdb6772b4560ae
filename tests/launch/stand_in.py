"""Stand in for a Python process that a launcher starts: `stand_in.py [-m] NAME ARGUMENT ...`.

A `tests.launch.launchers.Loaded` forks the process itself, with the output and the environment of this one. Both end
together, and in the same way. It imports nothing that takes time.
"""

import json
import os
import socket
import sys


def main() -> None:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(os.environ["LOADED"])
        socket.send_fds(connection, [b"."], [1, 2])
        request = [os.getcwd(), dict(os.environ), sys.argv[1:]]
        connection.sendall(json.dumps(request).encode() + b"\n")
        # Nothing is received if that process was not able to fork.
        code = int(connection.recv(16) or 70)
    if code < 0:
        os.kill(os.getpid(), -code)
    os._exit(code)


if __name__ == "__main__":
    main()
