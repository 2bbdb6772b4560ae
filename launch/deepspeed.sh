#!/usr/bin/env bash
# Train on this machine under DeepSpeed's launcher: [NPROC=4] bash launch/deepspeed.sh [parallel=zero2] [Hydra overrides]
# torchrun.sh and multinode.sh start parallel=zero0 … zero3 as well. Needs an environment with distclip[train,deepspeed]:
# $PYTHON, or the python on the PATH. On several machines: deepspeed --hostfile hosts --no_local_rank launch/train.py ...
set -euo pipefail
launch=$(dirname "${BASH_SOURCE[0]}")
python=$(command -v "${PYTHON:-python}")
# shellcheck source=launch/ranks.sh
source "$launch/ranks.sh"
case " $* " in
    *" parallel="*) ;;
    *) set -- parallel=zero2 "$@" ;;
esac
# Its own port is 29500, whoever has that; and on a CPU it would start one rank for each socket.
port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
exec "$python" -m deepspeed.launcher.runner --no_local_rank --num_gpus "$NPROC" --master_addr 127.0.0.1 \
    --master_port "$port" --log_level warning "$launch/train.py" "$@"
