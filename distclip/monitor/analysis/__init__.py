"""From the lines that a recorder wrote to what follows from them.

::

    runs ─▶ reading ─▶ steps ─▶ log ─▶ regimes ─▶ threshold    how far to clip
    where   JSON       columns  `Log`          ├▶ diagnosis    what is wrong, and the evidence
    they are                                   └▶ blame        which samples, ranks and tensors
"""
