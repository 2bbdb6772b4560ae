"""Run torchrun, and omit its traceback if a rank has rejected the settings.

Use `python launch/run_torchrun.py` with the arguments of torchrun. The rank has already printed the error, and torchrun
would print 30 lines about failed processes below it.
"""

import logging

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from job.overrides import REFUSED

# This logger prints the signals that are sent to ranks. The summary at the end already has the exit status of each
# rank.
logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
try:
    run.main()
except ChildFailedError as error:
    if all(failure.exitcode != REFUSED for failure in error.failures.values()):
        raise
    raise SystemExit(REFUSED) from None
