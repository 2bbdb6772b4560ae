"""Distribute a model over the ranks of a mesh: one function for each choice of the config group `parallel`."""
