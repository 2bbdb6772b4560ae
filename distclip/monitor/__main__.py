"""`python -m distclip.monitor`: the command `distclip`, where it is not on the path."""

import sys

from .cli import main

sys.exit(main())
