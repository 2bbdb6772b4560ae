#!/usr/bin/env bash
# Train on this machine: [NPROC=4] bash launch/torchrun.sh [Hydra overrides]
# The environment must have distclip[train]: $PYTHON, or the python on the PATH.
set -euo pipefail
launch=$(dirname "${BASH_SOURCE[0]}")
case " $* " in
    *" parallel=single "*) NPROC="${NPROC:-1}" ;;
esac
# A wrong override is reported here once, and not by each rank.
"${PYTHON:-python}" "$launch/check_overrides.py" "$@"
# shellcheck source=launch/ranks.sh
source "$launch/ranks.sh"
# Without the address torchrun would resolve this machine's host name, which may hang for minutes.
exec "${PYTHON:-python}" "$launch/run_torchrun.py" --standalone --local-addr=127.0.0.1 \
    --nproc-per-node="$NPROC" "$launch/train.py" "$@"
