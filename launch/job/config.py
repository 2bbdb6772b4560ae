"""Derive the configs of the runs from Hydra's config. Values must have the types of their defaults."""

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

NODES: dict[type, Callable[..., Node]] = {bool: BooleanNode, int: IntegerNode, float: FloatNode, str: StringNode}
KINDS = {bool: "true or false", int: "an integer", float: "a number", str: "a text"}


def run_configs(cfg: DictConfig) -> dict[str, DictConfig]:
    """Return the config of each run by its name: one run named "", or those of `compare`."""
    hydra = HydraConfig.get()
    if cfg.replay is not None:
        # This imports torch, which `launch/check_overrides.py` avoids.
        from .replay import replay_config

        return {"": check_values(replay_config(cfg))}
    if not cfg.compare:
        return {"": check_values(check_types(cfg, list(hydra.overrides.task)))}
    is_mapping = isinstance(cfg.compare, DictConfig)
    if not is_mapping or not all(isinstance(overrides, ListConfig) for overrides in cfg.compare.values()):
        raise SystemExit(
            f"compare={cfg.compare}: not a mapping of names to lists of overrides. "
            "Use \"+compare={with: [], without: ['clip=off']}\""
        )
    return {
        str(name): check_values(check_types(None, [*hydra.overrides.task, *overrides]))
        for name, overrides in cfg.compare.items()
    }


def headline() -> str:
    """Return the choice of each config group, in the syntax of the command line."""
    choices = reversed(HydraConfig.get().runtime.choices.items())
    return " ".join(f"{group}={name}" for group, name in choices if name and group.isidentifier())


def check_types(cfg: DictConfig | None, overrides: list[str]) -> DictConfig:
    """Convert each value to the type of its default, or exit if it does not convert.

    YAML alone would accept any type.

    Args:
        cfg: config that `overrides` resulted in; None to compose it here.
    """
    hydra = HydraConfig.get()
    name, hydra_overrides = hydra.job.config_name, list(hydra.overrides.hydra)
    cfg = compose(name, [*hydra_overrides, *overrides]) if cfg is None else cfg
    # The defaults depend on the choices of the config groups, and on no other override.
    choices = [override for override in overrides if override.split("=")[0].lstrip("+~") in hydra.runtime.choices]
    defaults = OmegaConf.create(_to_nodes(_defaults(name, *hydra_overrides, *choices)))
    try:
        typed = OmegaConf.merge(defaults, cfg)
    except ValidationError as error:
        key = str(error.full_key)
        default = OmegaConf.select(defaults, key)
        raise SystemExit(
            f"{key}={OmegaConf.select(cfg, key)}: not {KINDS.get(type(default), 'of the type of the default')}. "
            f"Use a value like the default, {default}"
        ) from None
    assert isinstance(typed, DictConfig)
    return typed


def check_values(cfg: DictConfig) -> DictConfig:
    """Return the config if its numbers are in their ranges, or exit with the first that is not."""
    for key in ("steps", "batch", "log.every"):
        if (value := OmegaConf.select(cfg, key)) < 1:
            raise SystemExit(f"{key}={value}: too small. Use 1 or more")
    if cfg.precision.dtype not in ("float32", "bfloat16", "float16"):
        raise SystemExit(f"precision.dtype={cfg.precision.dtype}: unknown. Use precision=fp32, bf16 or fp16")
    return cfg


@cache
def _defaults(name: str, *overrides: str) -> Any:
    return OmegaConf.to_container(compose(name, list(overrides)), resolve=True)


def _to_nodes(value: Any) -> Any:
    """Replace each value by a node of OmegaConf that keeps the value's type."""
    if isinstance(value, dict):
        return {key: _to_nodes(item) for key, item in value.items()}
    return NODES[type(value)](value) if type(value) in NODES else value
