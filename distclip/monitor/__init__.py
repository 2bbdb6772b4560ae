"""Watching a clipper: what it saw and did at every step, kept for people to look at."""
