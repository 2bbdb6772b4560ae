"""Store the lines of a long run as columns, so that five thousand tensors and a million steps fit in half a gigabyte.

`Recorder(log="columnar")` writes this format. It needs `distclip[columnar]`, which is pyarrow. The steps that were
recorded last are lines of `metrics.jsonl`, as in a log of lines (`distclip.monitor.jsonl`), with two differences: a
vector is the text of its float32 numbers in base64, `{"float32": "…"}`, and a header has the key `columns` with the
number of the `part` that the file will become. Once the file has 1,024 steps, they become a part, and the file is
replaced by a copy of the header.

A part is the directory `metrics.columns/FIRST-LAST`, with the numbers of its first and its last part, which are equal
until parts are merged. A part contains the steps from its first to its last, and its files never change:

- `part.json`: `format`, `generation` (0, or the number of merges), `rows`, `first_step`, `last_step`, `tensors` (names
  of the columns of the norms), and `sessions` with the `start` and the `header` of each recorder that began here.
- `steps.parquet`: one row per step, exactly as recorded, with one column per number. `details` is the JSON text of the
  other fields of a line (`spike`, `ids`, `worst`, `culprits`, `replicas`).
- `window.parquet`: the norms of every tensor at every step. Only parts of the last 4,096 steps have it.
- `exact.parquet`: single norms (`step`, `tensor`, `norm`) of the steps around outliers, which remain. The outliers are
  the steps with a `spike` (two steps around them, all tensors) and the norms that are at least three times the median
  of their tensor within the part (eight steps around them, one tensor), the 256 largest of each part.
- `level-0.parquet`, `level-1.parquet` …: the pyramid. A row has the `min`, the `max` and the `last` norm of each tensor
  within 256 steps, and from level to level within eight times as many. So a peak of one step is visible in every level.

A part is written under another name, and renamed when its files are on the disk. Then `metrics.jsonl` is replaced
in the same way. After a crash at any moment, readers find each step once: a file of lines whose part exists is ignored,
and so is a part that a merged part contains. The next recorder removes both.

Eight parts of the same generation are merged into one, up to 65,536 steps. As in a log of lines, a step that repeats an
earlier number invalidates that step and all later ones, with one restriction: a row of the pyramid that such a restart
divides keeps its extremes, if the norms of its single steps are no longer stored.

Parquet is a format that pandas, polars and DuckDB read without distclip:
`duckdb.sql("select step, norm from 'runs/long/metrics.columns/*/steps.parquet' order by step")`.
"""
