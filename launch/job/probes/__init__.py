"""Measure a run beyond its norms: one class for each choice of the config group `probe`."""
