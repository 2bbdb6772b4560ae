"""Take all objects of this process out of the reach of the garbage collector, when it is imported.

A fork server imports this last. Each full collection of a process that it forks would visit a million objects of torch.
"""

import gc

gc.collect()
gc.freeze()
