"""Compose the configs of a job, and explain a wrong override in one line with the nearest valid choices."""

import re
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from .config import run_configs

CONF = Path(__file__).resolve().parents[2] / "conf"
REFUSED = 2
"""Exit status of a job whose settings are wrong."""

_SET_ALREADY = r"Could not append to config\. An item is already at '([^']+)'|Multiple values for (\S+)\."


def check(arguments: Sequence[str]) -> None:
    """Compose the configs of a job in this process, or exit with the override that is wrong.

    torch is not imported. The ranks validate the settings that depend on the model, the data or the number of ranks.

    Args:
        arguments: arguments of `launch/train.py`.
    """
    args = get_args_parser().parse_intermixed_args(list(arguments))
    # With these options, Hydra prints something and exits, or uses another config.
    if any((args.help, args.hydra_help, args.cfg, args.info, args.shell_completion)):
        return
    if args.config_path or args.config_name or args.config_dir:
        return
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            for overrides in _split_sweep(args.overrides) if args.multirun else [args.overrides]:
                HydraConfig.instance().set_config(compose("config", overrides, return_hydra_config=True))
                cfg = compose("config", overrides)
                # If a step is repeated, the other settings are in the files of its run.
                if cfg.replay is None:
                    run_configs(cfg)
    except (HydraException, OmegaConfBaseException) as error:
        raise SystemExit(explain(error, args.overrides)) from None


def explain(error: Exception, overrides: Sequence[str]) -> str:
    """Return one line about an override that Hydra has rejected, with the nearest valid choices.

    Args:
        error: error of Hydra or OmegaConf.
        overrides: words of the command line.
    """
    text = str(error).strip()
    if isinstance(error, OverrideParseException):
        reason = text.splitlines()[0] if "Exception" not in text and "Error parsing" not in text else "no valid syntax"
        return f"{error.override}: not an override ({reason}). Use KEY=VALUE, with quotes around special characters"
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        group, _, name = error.missing_cfg_file.rpartition("/")
        near = get_close_matches(name, error.options, n=1, cutoff=0.5)
        others = ", ".join(option for option in error.options if option not in near)
        choices = f"{group}={near[0]}, or one of {others}" if near else f"one of {others}"
        return f"{group}={name}: not a choice of {group}. Use {choices}"
    if found := re.match(r"Could not (?:override|delete from config\.) '([^']+)'", text):
        key = found[1]
        (override,) = [word for word in overrides if word.lstrip("+~").split("=")[0] == key][:1] or [key]
        near = _similar_settings(key)
        advice = f"Use {' or '.join(near)}" if near else "Use --cfg job to print all settings"
        return f"{override}: the job has no setting {key}. {advice}"
    if found := re.match(_SET_ALREADY, text):
        key = found[1] or found[2]
        for word in overrides:
            if word.startswith(f"+{key}="):
                return f"{word}: the job has this setting already. Use {word.lstrip('+')}"
    if found := re.match(r"Ambiguous value for argument '(([^=]+)=(.*))'", text):
        override, key, values = found.groups()
        return f"{override}: several values. Use -m {override} for a run with each, or {key}=[{values}] for a list"
    return " ".join(line.strip() for line in text.splitlines())


def _split_sweep(overrides: Sequence[str]) -> Iterator[list[str]]:
    """Yield the overrides of jobs that contain each value of a sweep at least once."""
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    sweeps = {
        i: list(override.sweep_string_iterator()) for i, override in enumerate(parsed) if override.is_discrete_sweep()
    }
    # A sweeper may support more than a list of values. Such overrides are not checked here.
    kept = [i for i, override in enumerate(parsed) if i in sweeps or not override.is_sweep_override()]

    def job(values: dict[int, str]) -> list[str]:
        return [f"{parsed[i].get_key_element()}={values[i]}" if i in values else overrides[i] for i in kept]

    first = {i: values[0] for i, values in sweeps.items()}
    yield job(first)
    for i, values in sweeps.items():
        for value in values[1:]:
            yield job(first | {i: value})


def _similar_settings(key: str) -> list[str]:
    """Return up to three settings and config groups whose name is like `key`, the nearest first."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", return_hydra_config=True)
    groups = [group for group in cfg.hydra.runtime.choices if group.isidentifier()]
    settings = [*groups, *_flatten(OmegaConf.to_container(cfg))]
    last = key.rsplit(".", 1)[-1]
    same_name = [setting for setting in settings if setting.rsplit(".", 1)[-1] == last and setting != key]
    near = same_name + get_close_matches(key, settings, n=3, cutoff=0.7)
    return list(dict.fromkeys(near))[:3]


def _flatten(mapping: Any, prefix: str = "") -> Iterator[str]:
    for key, value in mapping.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _flatten(value, f"{name}.")
        elif not name.startswith("hydra.") or name.count(".") == 2:
            yield name
