"""Benchmark the gradient clipping of distclip against torch's on this machine: `python -m distclip.bench`.

::

    models ─▶ cases ─▶ competitors ─▶ timing, counters ─▶ results ─▶ table
              gradients   calls that     interleaved        medians,    terminal,
              to clip     clip them      rounds; costs      ratios      Markdown

All competitors of a case run in one process, in a random order in each round, so that a busy machine slows down all of
them. The result is the median of the rounds' ratios. `world` starts the ranks of the sharded cases, and `machine`
describes the hardware. No other module of the library imports this package.

`--json` writes {"machine", "versions", "command", "cases"}. A case has the fields of `results.Outcome`. Each of its
competitors has {"name", "own", "error", "median_ms", "ratio", "gb_per_s", "counts", "samples_ms", "preempted"}, where
"counts" is `counters.Counts`. A value that a competitor does not have is null.
"""
