"""`python -m distclip.bench`: distclip's clipping against torch's, on the machine at hand.

::

    models ─▶ cases, sharded ─▶ contestants ─▶ timing, counters ─▶ results ─▶ table
              gradients that     who deals      interleaved        medians,    terminal,
              lie somewhere      with them      rounds; costs      ratios      Markdown

`--json` writes {"machine", "versions", "command", "cases"}, and of each case what `results.Outcome` has; of each of its
contestants {"name", "own", "error", "median_ms", "ratio", "gb_per_s", "counts", "samples_ms", "preempted"}, where
"counts" is `counters.Counts`, null where nothing was counted, as anything else that a contestant does not have.

Contestants of a case meet in one process, in random order in every round, so that a machine that is busy slows all of
them; what counts is the median of the rounds' ratios. `world` starts the ranks of the sharded cases, `machine` says
what it all ran on. Nothing of the library imports this.
"""
