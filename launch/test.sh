#!/usr/bin/env bash
# Set up .venv and run the tests; arguments go to pytest: bash launch/test.sh tests/unit -k norm
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/setup.sh
source launch/setup.sh dev
exec "$PYTHON" -m pytest "$@"
