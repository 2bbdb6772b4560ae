#!/usr/bin/env bash
# On a machine with a GPU, run the tests that need one, then compare distclip with torch. The results, with the card, the
# versions and the command, are written to launch/bench/results/CARD.json and CARD.md. Arguments go to distclip.bench.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
# shellcheck source=launch/setup.sh
source launch/setup.sh dev
"$PYTHON" -m pytest tests/gpu tests/norms/test_kernels.py
card=$(nvidia-smi --query-gpu=name --format=csv,noheader | head -n 1 | tr -c '[:alnum:]\n' '_')
results=launch/bench/results/$card
mkdir -p launch/bench/results
"$PYTHON" -m distclip.bench --device cuda --cases 'gpt2*' 'small*' 'adamw*' clipper policies 1b 'fsdp2_[0-9g]*' \
    --json "$results.json" --markdown "$@" | tee "$results.md"
