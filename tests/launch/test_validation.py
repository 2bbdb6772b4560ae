"""Reject invalid settings before a process group starts."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from torch import nn

from distclip import GradClipper, LocalComm, Policy, adagc, autoclip, global_norm, group_norm, zclip
from job.checkpoint import check_policy
from job.overrides import check
from job.run import build_run
from tests.interpreter import forked_python
from tests.launch.jobs import ROOT, environment, run_command, run_ranks


@pytest.mark.parametrize(
    ("world_size", "overrides", "message"),
    [
        (1, "stepz=3", "stepz=3: the job has no setting stepz. Use steps"),
        (1, "note=${no}", "Interpolation key 'no' not found"),
        (1, "clip.max_norm=-1", "max_norm=-1"),
        (1, "on_nonfinite=ignore", "on_nonfinite='ignore'"),
        (1, "max_skips=0", "max_skips=0"),
        (1, "data=digits", "model=rnn: needs text. Use model=rnn data=topics"),
        (3, "parallel=hsdp batch=30", "NPROC=2"),
        (2, "parallel=single", "use parallel=ddp"),
        (1, "inject=spike inject.rank=1", "inject.rank=1: this run has 1 rank(s). Use 0 to 0"),
        (1, "inject=one_nan inject.step=9 steps=5", "inject.step=9: not a step of this run. Use 1 to 5"),
        (1, "inject=one_inf inject.parameter=head", "matches no parameter. Use a part of one of 0.weight, 1.cell."),
        (1, "resume=nowhere", "no checkpoint there. Use the directory of a run with checkpoint.every=N"),
        (1, "parallel=ddp comm=mpi", "Use comm=mpi without parallel="),
    ],
)
def test_rejects_before_a_process_group_starts(tmp_path: Path, world_size: int, overrides: str, message: str) -> None:
    # This is one rank of a world whose other ranks never come. A process group would wait for them.
    env = environment(RANK="0", WORLD_SIZE=str(world_size))
    done = run_ranks(tmp_path, [env], overrides.split())
    assert done.returncode == 2
    assert message in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("clip=zclp", "clip=zclp: not a choice of clip. Use clip=zclip, or one of adagc, agc, "),
        ("hydra/launcher=nonsense", "hydra/launcher=nonsense: not a choice of hydra/launcher. Use one of basic"),
        ("max_norm=1", "max_norm=1: the job has no setting max_norm. Use clip.max_norm"),
        ("~every", "~every: the job has no setting every. Use log.every or checkpoint.every"),
        ("xyz=1", "xyz=1: the job has no setting xyz. Use --cfg job to print all settings"),
        ("+steps=3", "+steps=3: the job has this setting already. Use steps=3"),
        ("+clip=zclip", "+clip=zclip: the job has this setting already. Use clip=zclip"),
        ("clip=[", "clip=[: not an override (no viable alternative at input '[')"),
        ("clip", "clip: not an override (no valid syntax). Use KEY=VALUE"),
        ("seed=1,2", "seed=1,2: several values. Use -m seed=1,2 for a run with each, or seed=[1,2] for a list"),
        ("clip=zclip,nonsense -m seed=1,2", "clip=nonsense: not a choice of clip"),
        ("steps=abc", "steps=abc: not an integer. Use a value like the default, 400"),
        ("optim.lr=fast", "optim.lr=fast: not a number. Use a value like the default, 1.0"),
        ("+compare={a:['log.every=0']}", "log.every=0: too small. Use 1 or more"),
        ("compare=3", "compare=3: not a mapping of names to lists of overrides"),
    ],
)
def test_explains_a_wrong_override(arguments: str, message: str) -> None:
    with pytest.raises(SystemExit) as caught:
        check(arguments.split())
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    "arguments", ["", "experiment=lstm", "-m seed=1,2 optim.lr=interval(0,1)", "--cfg job", "replay=3"]
)
def test_accepts_overrides_that_ranks_may_still_reject(arguments: str) -> None:
    check(arguments.split())


@pytest.mark.parametrize("script", ["torchrun.sh", "mpirun.sh", "deepspeed.sh"])
def test_launchers_report_a_wrong_override_once(tmp_path: Path, script: str) -> None:
    done = run_command(tmp_path, "bash", f"{ROOT}/launch/{script}", "clip=zclp")
    assert done.returncode == 2
    assert (done.stdout, done.stderr.splitlines()[1:]) == ("", [])
    assert done.stderr.startswith("clip=zclp: ")


def test_torchrun_omits_its_traceback_if_ranks_reject_a_setting(tmp_path: Path) -> None:
    command = ["bash", f"{ROOT}/launch/torchrun.sh", "batch=21"]
    done = run_command(tmp_path, *command, PYTHON=str(forked_python()), NPROC="2")
    message = "batch=21: not divisible by 2 data-parallel ranks. Use batch=22\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", message)


def test_a_refused_start_leaves_no_directory(tmp_path: Path) -> None:
    done = run_ranks(tmp_path, [environment(RANK="0", WORLD_SIZE="1")], ["steps=0"])
    assert (done.returncode, done.stderr.strip()) == (2, "steps=0: too small. Use 1 or more")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("command", "variables", "message"),
    [
        (["bash", "launch/multinode.sh"], {}, "HEAD is not set"),
        (["bash", "launch/deepspeed.sh"], {"PYTHON": "no-python"}, "there is no no-python"),
        ([sys.executable, "-S", "launch/ray_train.py"], {}, "ray is not installed"),
    ],
)
def test_launchers_name_what_is_missing(command: list[str], variables: dict[str, str], message: str) -> None:
    done = run_command(ROOT, *command, **{"HEAD": "", "PYTHONPATH": "", **variables})
    assert done.returncode == 1
    assert message in done.stderr


def test_angle_needs_whole_gradients() -> None:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("config", ["probe=angle", "parallel=fsdp2", "model=mlp", "data=digits"])
    with pytest.raises(SystemExit, match=r"probe=angle: reads whole gradients.*Use parallel=ddp"):
        build_run(cfg)


MODEL = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
SAVED = {
    "zclip": {"_target_": "distclip.zclip"},
    "autoclip": {"_target_": "distclip.autoclip", "window": 10},
    "adagc": {"_target_": "distclip.adagc"},
    "group_norm": {
        "_target_": "distclip.group_norm",
        "groups": {"first": {"pattern": r"^0\.", "max_norm": 0.5}},
    },
    "global_norm": {"_target_": "distclip.global_norm", "max_norm": 1.0},
}


def resume(run: Path, saved: str, policy: Policy, **changes: object) -> None:
    """Check a policy for a run that was trained with the policy `saved`."""
    OmegaConf.save({"clip": SAVED[saved]}, run / "config.yaml")
    cfg: DictConfig = OmegaConf.create({"resume": str(run), "clip": SAVED[saved] | changes})
    check_policy(run, cfg, MODEL, GradClipper(MODEL, policy, comm=LocalComm()))


def test_resume_accepts_other_numbers(tmp_path: Path) -> None:
    resume(tmp_path, "zclip", zclip(z=3.0, cap=1.0), z=3.0, cap=1.0)
    resume(tmp_path, "global_norm", global_norm(0.5), max_norm=0.5)
    resume(tmp_path, "adagc", adagc(warmup=7), warmup=7)


@pytest.mark.parametrize(
    ("saved", "policy", "changes", "message"),
    [
        ("zclip", adagc(), {"_target_": "distclip.adagc"}, "clip._target_=distclip.zclip"),
        ("autoclip", autoclip(window=20), {"window": 20}, "clip.window=10"),
        ("zclip", zclip(restart_after=64), {"restart_after": 64}, "clip.restart_after=None"),
        ("zclip", zclip(norm_type=1.0), {"norm_type": 1.0}, "measures other norms.*clip.norm_type=None"),
        ("adagc", adagc(per="model"), {"per": "model"}, "measures other norms.*clip.per=None"),
        (
            "group_norm",
            group_norm({"last": (r"^1\.", 0.5)}, 1.0),
            {"groups": {"last": {"pattern": r"^1\.", "max_norm": 0.5}}},
            "measures other norms.*clip.groups=.*first",
        ),
    ],
)
def test_resume_rejects_other_state(
    tmp_path: Path, saved: str, policy: Policy, changes: dict[str, object], message: str
) -> None:
    torch.manual_seed(0)
    with pytest.raises(SystemExit, match=rf"(?s)Use the clip settings of that run: .*{message}|{message}"):
        resume(tmp_path, saved, policy, **changes)
