"""Hydra: distclip's policies as a config group of any app.

::

    from distclip.integrations.hydra import register

    register()  # before @hydra.main's function is called; the app's YAML then has `distclip@trainer.clip: zclip`

Without a line of Python, in the app's YAML: `hydra: {searchpath: [pkg://distclip.conf]}`.
"""

from __future__ import annotations

from functools import cache

__all__ = ["register"]


@cache
def register() -> None:
    """Let Hydra find the group `distclip`, of which every policy is a choice, in this process from now on.

    The app's own configs come first where names are the same. Calling it again changes nothing.

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
    from hydra.core.config_search_path import ConfigSearchPath
    from hydra.core.plugins import Plugins
    from hydra.plugins.search_path_plugin import SearchPathPlugin

    class DistclipSearchPath(SearchPathPlugin):
        def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
            search_path.append("distclip", "pkg://distclip.conf")

    Plugins.instance().register(DistclipSearchPath)
