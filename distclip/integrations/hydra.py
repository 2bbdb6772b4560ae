"""Register distclip's policies as a config group of any Hydra app.

::

    from distclip.integrations.hydra import register

    register()  # before @hydra.main's function is called; the app's YAML then has `distclip@trainer.clip: zclip`

To do this without Python, add `hydra: {searchpath: [pkg://distclip.conf]}` to the app's YAML. Hydra then also finds the
groups of distclip's own training job (`model`, `optim` …), after the groups of the app.
"""

from __future__ import annotations

from importlib.resources import files

__all__ = ["register"]


def register() -> None:
    """Register the config group `distclip`, with one choice per policy, in this process.

    Nothing else is registered. A file of the app in its own group `distclip` takes precedence over a policy of the same
    name. A second call changes nothing.

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
