"""Hydra configuration: `distclip/` is for other apps to mount, the rest is our own training job."""
