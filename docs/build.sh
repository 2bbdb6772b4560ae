#!/usr/bin/env bash
# Build the documentation site in build/site, without network. Warnings and dead links are errors.
#     pip install -e '.[docs]' && bash docs/build.sh
#     bash docs/build.sh --serve  # build again after each change, and serve it on http://127.0.0.1:8000
# The interpreter is $PYTHON, that of .venv, or the python on the PATH.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
if ! "$python" -c 'import material, mkdocs, mkdocstrings' 2>/dev/null; then
    echo "docs/build.sh: mkdocs-material or mkdocstrings is not installed in $python. Use pip install -e '.[docs]'" >&2
    exit 1
fi
command=(build --strict)
[ "${1:-}" != --serve ] || command=(serve)
# This version of mkdocs-material announces the next version of mkdocs on each start.
NO_MKDOCS_2_WARNING=1 DISABLE_MKDOCS_2_WARNING=true "$python" -m mkdocs "${command[@]}" --config-file docs/site/mkdocs.yml
[ "${1:-}" = --serve ] || echo "docs/build.sh: open build/site/index.html"
