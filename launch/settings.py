"""From Hydra's config to the runs it asks for, each held to the types of its defaults."""

from collections.abc import Callable
from functools import cache
from typing import Any

from hydra import compose
from hydra.core.hydra_config import HydraConfig
from omegaconf import (
    BooleanNode,
    DictConfig,
    FloatNode,
    IntegerNode,
    ListConfig,
    Node,
    OmegaConf,
    StringNode,
    ValidationError,
)

import replay

NODES: dict[type, Callable[..., Node]] = {bool: BooleanNode, int: IntegerNode, float: FloatNode, str: StringNode}


def runs(cfg: DictConfig) -> dict[str, DictConfig]:
    """The job itself, or one run per entry of `compare`, made as the command line would."""
    hydra = HydraConfig.get()
    if cfg.replay is not None:
        return {"": replay.configured(cfg)}
    if not cfg.compare:
        return {"": typed(cfg, list(hydra.overrides.task))}
    named = isinstance(cfg.compare, DictConfig)
    if not named or not all(isinstance(changes, ListConfig) for changes in cfg.compare.values()):
        raise SystemExit(
            f"compare={cfg.compare}: names and their overrides are wanted, "
            f"write \"+compare={{with: [], without: ['clip=off']}}\""
        )
    return {str(name): typed(None, [*hydra.overrides.task, *changes]) for name, changes in cfg.compare.items()}


def headline() -> str:
    """What was chosen from each config group, as it is written on the command line."""
    choices = reversed(HydraConfig.get().runtime.choices.items())
    return " ".join(f"{group}={name}" for group, name in choices if name and group.isidentifier())


def typed(cfg: DictConfig | None, overrides: list[str]) -> DictConfig:
    """YAML has no types of its own: a value must convert to the type of the one it replaces."""
    hydra = HydraConfig.get()
    name, first = hydra.job.config_name, list(hydra.overrides.hydra)
    cfg = compose(name, [*first, *overrides]) if cfg is None else cfg
    groups = [o for o in overrides if o.split("=")[0].lstrip("+~") in hydra.runtime.choices]
    try:
        checked = OmegaConf.merge(OmegaConf.create(_nodes(_defaults(name, *first, *groups))), cfg)
    except ValidationError as error:
        raise SystemExit(f"{error}") from None
    assert isinstance(checked, DictConfig)
    return checked


@cache
def _defaults(name: str, *overrides: str) -> Any:
    return OmegaConf.to_container(compose(name, list(overrides)), resolve=True)


def _nodes(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _nodes(item) for key, item in value.items()}
    return NODES[type(value)](value) if type(value) in NODES else value
