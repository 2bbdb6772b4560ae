"""Hydra: distclip's policies as a config group of any app.

::

    from distclip.integrations.hydra import register

    register()  # before @hydra.main's function is called; the app's YAML then has `distclip@trainer.clip: zclip`

Without a line of Python, in the app's YAML: `hydra: {searchpath: [pkg://distclip.conf]}`, which lets Hydra see the
groups of distclip's own training job as well (`model`, `optim` …), after the app's own.
"""

from __future__ import annotations

from importlib.resources import files

__all__ = ["register"]


def register() -> None:
    """Let Hydra find the group `distclip`, of which every policy is a choice, in this process from now on.

    Nothing else is added; files of the app in a group `distclip` of its own come first where names are the same.
    Calling it again changes nothing.

    Raises:
        ImportError: Hydra is not installed.

    Collectives: none. Host syncs: none.

    >>> register()
    >>> from hydra import compose, initialize
    >>> with initialize(version_base="1.3"):
    ...     cfg = compose(overrides=["+distclip@trainer.clip=zclip", "trainer.clip.cap=1.0"])
    >>> cfg.trainer.clip.cap
    1.0
    """
    from hydra.core.config_store import ConfigStore
    from omegaconf import OmegaConf

    for file in files("distclip.conf").joinpath("distclip").iterdir():
        name, dot, suffix = file.name.rpartition(".")
        if dot + suffix == ".yaml":
            node = OmegaConf.create(file.read_text(encoding="utf-8"))
            ConfigStore.instance().store(name, node, group="distclip", provider="distclip")
