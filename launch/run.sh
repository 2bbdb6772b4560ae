#!/usr/bin/env bash
# Set up .venv (the first time) and train: bash launch/run.sh [Hydra overrides]
# NPROC=4 starts four processes. The default is one per GPU, or two if there is none.
set -euo pipefail
launch=$(dirname "${BASH_SOURCE[0]}")
# shellcheck source=launch/setup.sh
source "$launch/setup.sh" train
exec bash "$launch/torchrun.sh" "$@"
