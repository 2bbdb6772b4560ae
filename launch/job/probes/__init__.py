"""Measure more of a run than its norms: one class for each choice of the config group `probe`."""
