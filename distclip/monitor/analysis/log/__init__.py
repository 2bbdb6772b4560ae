"""Find and parse runs and logs of other tools, and return their columns as a `Log`."""

from .foreign import Keys
from .log import Log, once_per_log, read, read_all
from .reader import Session
from .runs import LINES, find_runs, name_runs

__all__ = ["LINES", "Keys", "Log", "Session", "find_runs", "name_runs", "once_per_log", "read", "read_all"]
