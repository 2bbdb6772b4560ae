#!/usr/bin/env bash
# On a machine with a GPU, compare distclip with torch, then run the tests that need a GPU: one command of less than ten
# minutes. It needs no network if $DISTCLIP_PYTHON or python3 has a torch that finds the GPU, and installs distclip
# otherwise. The results, with the card, the versions and the command, are written to launch/bench/results/CARD.json,
# CARD.md and CARD.tests.txt, or to the folder $OUT. Arguments go to distclip.bench.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}

PYTHON=${DISTCLIP_PYTHON:-python3}
if ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
    # shellcheck source=launch/setup.sh
    source launch/setup.sh dev
fi

card=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null || "$PYTHON" -c 'import torch; print(torch.cuda.get_device_name())')
card=$(head -n 1 <<<"$card" | tr -c '[:alnum:]\n' '_')
results=${OUT:-launch/bench/results}/$card
mkdir -p "$(dirname "$results")"

# The benchmark writes its results after each case, so that a time limit loses one case at most.
failed=0
timeout 300 "$PYTHON" -m distclip.bench --device cuda --rounds 15 \
    --cases gpt2 gpt2_bf16 gpt2_clipped gpt2_bf16_clipped 'small*' 'adamw*' policies 1b \
    --json "$results.json" --markdown "$@" | tee "$results.md" || failed=1
if "$PYTHON" -c 'import pytest' 2>/dev/null; then
    timeout 240 "$PYTHON" -m pytest -q --no-header tests/gpu tests/norms/test_kernels.py tests/norms/test_checksums.py \
        | tee "$results.tests.txt" || failed=1
else
    echo "gpu.sh: $PYTHON has no pytest, so that no test ran" | tee "$results.tests.txt" >&2
    failed=1
fi
exit "$failed"
