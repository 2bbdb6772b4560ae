"""Read the lines that a recorder wrote, and draw conclusions from them.

::

    log.runs ─▶ log.reader ─▶ log.columns ─▶ log.log ─▶ change_points ─▶ suggest      which bound to clip at
    find        JSON lines    steps as       `Log`                    ├▶ diagnosis    problems, with evidence
    the runs    and sessions  columns                                 └▶ blame        samples, ranks, tensors of spikes

`statistics`, `spikes` and `formatting` are shared. Nothing here imports torch or the clipping pipeline.
"""
