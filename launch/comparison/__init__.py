"""Compare the norms that torch and distclip report with the true norm: the table of `launch/truth.py`.

`layouts` distributes one gradient in every layout of the table, `framework` clips as frameworks do, `measurement` clips
on real ranks, and `table` formats the results.
"""
