"""Check the layout of a model before training: `distclip.audit(model, split_over=..., optimizer=...)`.

`facts` reads the parameters and layouts of a rank, the sum of a `probe` gradient, and a checksum of the values. One
gather collects the facts of all ranks. `instances` joins them to parameters with their replicas, as the engine counts
them. `checks` and `comparison` find mistakes, and `report` prints the table.
"""

from .audit import audit
from .problem import Problem
from .report import Audit, Row

__all__ = ["Audit", "Problem", "Row", "audit"]
