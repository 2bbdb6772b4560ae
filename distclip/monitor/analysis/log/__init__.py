"""Read runs: find them, parse their lines, and return their columns as a `Log`."""

from .log import Log, read, read_all
from .reader import Session
from .runs import LINES, find_runs, name_runs

__all__ = ["LINES", "Log", "Session", "find_runs", "name_runs", "read", "read_all"]
