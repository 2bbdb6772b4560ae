"""Reject wrong overrides before a job starts: `python launch/check_overrides.py [Hydra overrides]`."""

import sys
from importlib.util import find_spec

if find_spec("hydra") is None:
    raise SystemExit(f"{sys.executable} has no Hydra. Use {sys.executable} -m pip install -e '.[train]', or set PYTHON")

from job.overrides import REFUSED, check

try:
    check(sys.argv[1:])
except SystemExit as reason:
    if isinstance(reason.code, str):
        print(reason.code, file=sys.stderr)
        raise SystemExit(REFUSED) from None
    raise
