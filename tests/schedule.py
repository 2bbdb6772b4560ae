"""Distribute tests over processes: file by file, and the files of a framework to one process.

A framework takes seconds to import, and its ranks live as long as its tests.
"""

from __future__ import annotations

from xdist.scheduler import LoadFileScheduling

__all__ = ["Schedule"]


class Schedule(LoadFileScheduling):
    """Schedule of `--dist loadfile`, in which the files of a framework count as one."""

    def _split_scope(self, nodeid: str) -> str:
        """Return the file of a test, or the folder of its framework."""
        file = nodeid.partition("::")[0]
        folder = file.rpartition("/")[0]
        return folder if folder.startswith("tests/integrations/") else file
