"""Provide the fixture `ranks`: worlds of ranks that have the framework of the test's folder imported."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.preload import PreloadedWorld, Preloader

PRELOADED = {
    "accelerate": ["accelerate", "accelerate.test_utils.scripts.test_script", "accelerate.local_sgd"],
    "deepspeed": [
        "deepspeed",
        "deepspeed.moe.layer",
        "deepspeed.module_inject",
        "deepspeed.ops",
        "deepspeed.runtime.superoffload",
        "setuptools",
        "torch._inductor.compile_fx",
    ],
    "lightning": ["lightning.pytorch", "lightning.fabric"],
    "megatron": [
        "megatron.core.distributed",
        "megatron.core.models.gpt",
        "megatron.core.models.gpt.gpt_layer_specs",
        "megatron.core.optimizer",
        "megatron.core.pipeline_parallel",
    ],
    "torchtitan": ["torchtitan.distributed.utils"],
    "transformers": ["transformers.trainer", "transformers.models.gpt2.modeling_gpt2"],
}
"""Modules to import before ranks are forked, by folder."""


class _Preloaders:
    """The preloader of one folder. Frameworks leave much behind in a process, so no two of them share ranks."""

    def __init__(self) -> None:
        self.folder, self.preloader = "", Preloader([])

    def switch_to(self, folder: str) -> Preloader:
        if folder != self.folder:
            self.preloader.stop()
            self.folder, self.preloader = folder, Preloader(PRELOADED[folder])
        return self.preloader


@pytest.fixture(scope="session")
def _preloaders() -> Iterator[_Preloaders]:
    preloaders = _Preloaders()
    yield preloaders
    preloaders.preloader.stop()


@pytest.fixture(scope="module")
def ranks(request: pytest.FixtureRequest, _preloaders: _Preloaders) -> Callable[[int], PreloadedWorld]:
    """Return `ranks(2)`: a world of two ranks that all files of a folder share."""
    return _preloaders.switch_to(request.path.parent.name).world


@pytest.fixture(scope="module")
def isolated_ranks(request: pytest.FixtureRequest, _preloaders: _Preloaders) -> Callable[[int], PreloadedWorld]:
    """Return `isolated_ranks(4)`: as `ranks`, but other processes. For tests that change the state of a framework."""
    preloader = _preloaders.switch_to(request.path.parent.name)
    return lambda size: preloader.world(size, "isolated")
