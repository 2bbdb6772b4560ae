"""Hydra configuration. Other apps can mount `distclip/`; the other groups configure the training job of `launch/`."""
