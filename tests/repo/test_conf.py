"""Compose every YAML of conf/, instantiate every policy, and reject typos."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import ConfigCompositionException, MissingConfigException
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf

import distclip
from tests.tables import policies as tables

CONF = Path(__file__).parents[2] / "conf"
CHOICES = sorted((path.parent.name, path.stem) for path in CONF.glob("*/*.yaml"))
JOB_CHOICES = [choice for choice in CHOICES if choice[0] != "distclip"]
EXPERIMENTS = [name for group, name in JOB_CHOICES if group == "experiment"]
OTHER_CHOICES = [choice for choice in JOB_CHOICES if choice[0] not in ("clip", "experiment")]
"""Choices that no other test composes."""
POLICIES = [name for group, name in CHOICES if group == "distclip"]
REQUIRED = {"group_norm": {"groups": {"embedding": {"pattern": "embed", "max_norm": 0.1}}}}  # without defaults


@pytest.fixture
def conf() -> Iterator[None]:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield


def load(path: Path) -> DictConfig:
    loaded = OmegaConf.load(path)
    assert isinstance(loaded, DictConfig)
    return loaded


def compose_whole(*overrides: str) -> DictConfig:
    """Compose the config of the job, in which no value may be missing."""
    cfg = compose("config", list(overrides))
    assert OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    return cfg


@pytest.mark.usefixtures("conf")
@pytest.mark.parametrize(("group", "name"), OTHER_CHOICES)
def test_every_choice_composes(group: str, name: str) -> None:
    compose_whole(f"{group}={name}")


@pytest.mark.usefixtures("conf")
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_run_of_an_experiment_composes(name: str) -> None:
    cfg = compose_whole(f"experiment={name}")
    assert cfg.compare
    assert cfg.note
    for run, changes in cfg.compare.items():
        policy = instantiate(compose("config", [f"experiment={name}", *changes]).clip)
        assert isinstance(policy, distclip.Policy)
        unclipped = isinstance(policy, distclip.NormPolicy) and policy.threshold == distclip.Fixed(math.inf)
        # Settings of an experiment are applied after those of a choice, such as clip=off.
        assert unclipped == ("clip=off" in changes or "unclipped" in run)


@pytest.mark.parametrize("path", sorted(CONF.rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_file_begins_with_a_comment(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    first = next(line for line in lines if line != "# @package _global_")  # Hydra requires it at the top.
    assert first.startswith("# ")


def test_every_policy_is_a_choice_of_clip() -> None:
    assert [name for group, name in JOB_CHOICES if group == "clip"] == POLICIES


@pytest.mark.parametrize("name", POLICIES)
def test_policies_instantiate(name: str) -> None:
    assert isinstance(instantiate(load(CONF / "distclip" / f"{name}.yaml"), **REQUIRED.get(name, {})), distclip.Policy)


def test_every_preset_is_a_choice() -> None:
    assert set(POLICIES) == {*tables.POLICIES, "off"}


@pytest.mark.usefixtures("conf")
@pytest.mark.parametrize("name", POLICIES)
def test_choices_of_clip_instantiate(name: str) -> None:
    assert isinstance(instantiate(compose_whole(f"clip={name}").clip), distclip.Policy)


@pytest.mark.parametrize("name", POLICIES)
def test_yaml_defaults_are_the_defaults_of_the_code(name: str) -> None:
    cfg = dict(load(CONF / "distclip" / f"{name}.yaml"))
    parameters = inspect.signature(get_object(cfg.pop("_target_"))).parameters
    given: dict[Any, Any] = {k: p.default for k, p in parameters.items() if p.default is not p.empty}
    if name == "off":
        given["max_norm"] = float("inf")
    if name in ("aggc", "ema", "median_mad", "zclip"):
        # A run needs a bound in warm-up. The code has none, because it does not know the usual norms of a model.
        assert given["cap"] == float("inf")
        given["cap"] = 1.0
    assert {key: cfg[key] for key in given} == given
    assert cfg.keys() == parameters.keys()


@pytest.mark.parametrize("name", POLICIES)
def test_another_app_mounts_a_policy(tmp_path: Path, name: str) -> None:
    app = f'defaults: [_self_, distclip@trainer.clip: "{name}"]\nhydra: {{searchpath: [pkg://distclip.conf]}}\n'
    (tmp_path / "app.yaml").write_text(app, encoding="utf-8")
    with initialize_config_dir(str(tmp_path), version_base="1.3"):
        cfg = compose("app")
    assert cfg.trainer.clip == load(CONF / "distclip" / f"{name}.yaml")
    assert isinstance(instantiate(cfg.trainer.clip, **REQUIRED.get(name, {})), distclip.Policy)
    assert list(cfg) == ["trainer"]


@pytest.mark.usefixtures("conf")
def test_rejects_typos() -> None:
    with pytest.raises(ConfigCompositionException, match="stepz"):
        compose("config", ["stepz=3"])
    with pytest.raises(ConfigCompositionException, match="max_nrom"):
        compose("config", ["clip.max_nrom=3"])
    with pytest.raises(MissingConfigException, match="fsdp2_tp"):  # the message lists the choices
        compose("config", ["parallel=fdsp2"])


@pytest.mark.usefixtures("conf")
def test_command_line_overrides_a_choice() -> None:
    assert compose("config", ["clip=value", "clip.low=-3"]).clip == {
        "_target_": "distclip.Value",
        "low": -3,
        "high": 1.0,
    }
