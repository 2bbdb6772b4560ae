"""Run the command `distclip` as `python -m distclip`."""

import sys

from .monitor.cli import main

sys.exit(main())
