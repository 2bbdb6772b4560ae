#!/usr/bin/env bash
# Train on this machine: [NPROC=4] bash launch/torchrun.sh [Hydra overrides]
# Needs an environment with distclip[train]: $PYTHON, or the python on the PATH.
set -euo pipefail
launch=$(dirname "${BASH_SOURCE[0]}")
if [ -z "${NPROC:-}" ]; then
    case " $* " in
        *" parallel=single "*) NPROC=1 ;;
        *) if nvidia-smi -L >/dev/null 2>&1; then NPROC=gpu; else NPROC=2; fi ;;
    esac
fi
threads=1
if [ "$NPROC" != gpu ] && [ "$(getconf _NPROCESSORS_ONLN)" -gt "$NPROC" ]; then
    threads=$(($(getconf _NPROCESSORS_ONLN) / NPROC))
fi
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$threads}"
# The address keeps torchrun from resolving this machine's host name, which may hang for minutes.
exec "${PYTHON:-python}" -m torch.distributed.run --standalone --local-addr=127.0.0.1 \
    --nproc-per-node="$NPROC" "$launch/train.py" "$@"
