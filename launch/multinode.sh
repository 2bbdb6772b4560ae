#!/usr/bin/env bash
# Train on several machines; the same call on each of them, with its overrides for Hydra:
#   HEAD=node1 [PORT=29500] [NNODES=2] [NPROC=8] [RUN_ID=name] bash launch/multinode.sh [overrides]
# HEAD is a host name of one of them that all can resolve, RUN_ID tells jobs on one HEAD apart.
# Needs an environment with distclip[train] on each: $PYTHON, or the python on the PATH.
set -euo pipefail
launch=$(dirname "${BASH_SOURCE[0]}")
# What is a node here may be one of several containers on a machine.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# shellcheck source=launch/ranks.sh
source "$launch/ranks.sh"
exec "${PYTHON:-python}" -m torch.distributed.run --nnodes="${NNODES:-2}" --nproc-per-node="$NPROC" \
    --rdzv-backend=c10d --rdzv-endpoint="${HEAD:?name of the node all meet at}:${PORT:-29500}" \
    --rdzv-id="${RUN_ID:-distclip}" "$launch/train.py" "$@"
