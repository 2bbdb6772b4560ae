#!/usr/bin/env bash
# Set up .venv and run the tests: all of them, the quick subset (less than 3 minutes on 2 cores), or some:
#     bash launch/test.sh
#     bash launch/test.sh --quick
#     bash launch/test.sh tests/norms -k norm
# --quick is `-m quick`, see tests/quick.py. All other arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/setup.sh
source launch/setup.sh dev
arguments=()
for argument in "$@"; do
    if [ "$argument" = --quick ]; then
        arguments+=(-m quick)
    else
        arguments+=("$argument")
    fi
done
exec "$PYTHON" -m pytest ${arguments[@]+"${arguments[@]}"}
