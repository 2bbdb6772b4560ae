"""Store the lines of a long run as columns, so that five thousand tensors and a million steps fit in half a gigabyte.

`Recorder(log="columnar")` writes this format. It needs `distclip[columnar]`, which is pyarrow. The latest steps are
lines of `metrics.jsonl`, as in a log of lines (`distclip.monitor.jsonl`), with two differences: a vector is base64 text
of its float32 numbers, `{"float32": "…"}`, and a header has the key `columns` with the number of the `part` that the
file will become. Once the file has 1,024 steps, they become a part, and the file is replaced by a copy of the header.

A part is a directory `metrics.columns/FIRST-LAST`. FIRST and LAST are numbers of parts, which are equal until parts are
merged. The files of a part never change:

- `part.json`: `format`, `generation` (0, or the number of merges), `rows`, `first_step`, `last_step`, `tensors` (names
  of the columns of the norms), and `sessions` with the `start` and the `header` of each recorder that began here.
- `steps.parquet`: one row per step, exactly as recorded, with one column per number. `details` is the JSON text of the
  other fields of a line (`spike`, `ids`, `worst`, `culprits`, `replicas`).
- `window.parquet`: the norms of every tensor at every step. Only parts of the last 4,096 steps have it.
- `exact.parquet`: the norms around outliers, as single norms (`step`, `tensor`, `norm`), which are kept for good. There
  are two kinds of outliers. Around a step with a `spike`, the norms of all tensors in the two steps before and after
  are kept. Around a norm that is at least three times the median of its tensor within the part, the norms of that
  tensor in the eight steps before and after are kept, for the 256 largest of each part.
- `level-0.parquet`, `level-1.parquet` …: the pyramid. A row of level 0 has the `min`, the `max` and the `last` norm of
  each tensor within 256 steps. A row of each further level covers eight times as many steps. So a peak of one step is
  visible in every level.

A part is written under another name, and renamed once its files are on the disk. Then `metrics.jsonl` is replaced in
the same way. Even after a crash, readers find each step exactly once: they ignore a file of lines whose part exists,
and a part that a merged part contains. The next recorder removes both.

Eight parts of the same generation are merged into one, up to 65,536 steps. As in a log of lines, a step that repeats an
earlier number invalidates that step and all later ones. There is one exception: if such a restart divides a row of the
pyramid, and the norms of its single steps are no longer stored, the row keeps its extremes.

Parquet is a format that pandas, polars and DuckDB read without distclip:
`duckdb.sql("select step, norm from 'runs/long/metrics.columns/*/steps.parquet' order by step")`.
"""
