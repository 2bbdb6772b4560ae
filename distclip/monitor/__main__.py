"""Run the command `distclip` as `python -m distclip.monitor`."""

import sys

from .cli import main

sys.exit(main())
