#!/usr/bin/env bash
# Set up .venv and run the tests: all of them, the quick subset (under 3 minutes on 2 cores), or some:
#     bash launch/test.sh
#     bash launch/test.sh --quick
#     bash launch/test.sh tests/norms -k norm
# --quick is `-m quick`, see tests/quick.py. All other arguments go to pytest. Without any, files of tests run side by
# side in up to four processes, see tests/schedule.py.
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
if [ "${arguments[*]-}" = "" ] || [ "${arguments[*]}" = "-m quick" ]; then
    processes=$("$PYTHON" -c 'import os; print(min(4, os.cpu_count() or 1))')
    arguments+=(--numprocesses "$processes" --dist loadfile --no-loadscope-reorder)
fi
# With this variable, each process and each rank would compile all modules that it imports.
unset PYTHONDONTWRITEBYTECODE
exec "$PYTHON" -m pytest "${arguments[@]}"
