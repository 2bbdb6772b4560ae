#!/usr/bin/env bash
# Train on several machines. Call it on each of them, with the same overrides:
#   HEAD=node1 [PORT=29500] [NNODES=2] [NPROC=8] [RUN_ID=name] bash launch/multinode.sh [Hydra overrides]
# HEAD is the host name of one machine, which all of them can resolve. RUN_ID distinguishes jobs with one HEAD.
# Each machine must have an environment with distclip[train]: $PYTHON, or the python on the PATH.
set -euo pipefail
launch=$(dirname "${BASH_SOURCE[0]}")
if [ -z "${HEAD:-}" ]; then
    echo "multinode.sh: HEAD is not set. Choose one machine, and start this on each with the host name of that one:" \
        "HEAD=$(hostname) bash launch/multinode.sh" >&2
    exit 1
fi
# Several containers on one machine may each be a node, so a rank gets one thread by default.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# A wrong override is reported here once, and not by each rank.
"${PYTHON:-python}" "$launch/check_overrides.py" "$@"
# shellcheck source=launch/ranks.sh
source "$launch/ranks.sh"
exec "${PYTHON:-python}" "$launch/run_torchrun.py" --nnodes="${NNODES:-2}" --nproc-per-node="$NPROC" \
    --rdzv-backend=c10d --rdzv-endpoint="$HEAD:${PORT:-29500}" \
    --rdzv-id="${RUN_ID:-distclip}" "$launch/train.py" "$@"
