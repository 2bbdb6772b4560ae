#!/usr/bin/env bash
# Train on this machine with DeepSpeed's launcher: [NPROC=4] bash launch/deepspeed.sh [parallel=zero2] [Hydra overrides]
# torchrun.sh and multinode.sh also accept parallel=zero0 to zero3. The environment must have distclip[train,deepspeed]:
# $PYTHON, or the python on the PATH. On several machines: deepspeed --hostfile hosts --no_local_rank launch/train.py ...
set -euo pipefail
launch=$(dirname "${BASH_SOURCE[0]}")
if ! python=$(command -v "${PYTHON:-python}"); then
    echo "deepspeed.sh: there is no ${PYTHON:-python}. Set PYTHON to the interpreter of an environment with" \
        "distclip[train,deepspeed]" >&2
    exit 1
fi
if ! "$python" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("deepspeed") is None)'; then
    echo "deepspeed.sh: $python has no DeepSpeed. Use $python -m pip install -e '.[train,deepspeed]', or set PYTHON" >&2
    exit 1
fi
# A wrong override is reported here once, and not by each rank.
"$python" "$launch/check_overrides.py" "$@"
# shellcheck source=launch/ranks.sh
source "$launch/ranks.sh"
case " $* " in
    *" parallel="*) ;;
    *) set -- parallel=zero2 "$@" ;;
esac
# DeepSpeed's default port, 29500, may be in use. Its default number of ranks on CPUs is one per socket.
port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
exec "$python" -m deepspeed.launcher.runner --no_local_rank --num_gpus "$NPROC" --master_addr 127.0.0.1 \
    --master_port "$port" --log_level warning "$launch/train.py" "$@"
