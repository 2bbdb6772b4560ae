"""A Hydra app of a user that mounts a policy into its config, with distclip as a checkout and as a wheel."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from tests.forks import run_forked

pytest.importorskip("hydra")
ROOT = Path(__file__).parents[3]

APP = """
import hydra
from hydra.utils import instantiate
{first}

@hydra.main(version_base="1.3", config_path=".", config_name="app")
def main(cfg):
    print(sorted(cfg), cfg.trainer.lr, instantiate(cfg.trainer.clip))

if __name__ == "__main__":
    main()
"""
REGISTER = "from distclip.integrations.hydra import register; register(); register()"
YAML = """
defaults: [_self_, distclip@trainer.clip: zclip]
trainer: {lr: 0.1}
"""
SEARCHPATH = "hydra: {searchpath: [pkg://distclip.conf]}\n"
APPS = {"searchpath": ("", YAML + SEARCHPATH), "register": (REGISTER, YAML), "neither": ("", YAML)}
"""(first lines of the app, its config) for each way to register the policies."""

Run = Callable[..., tuple[int, str]]


@pytest.fixture(params=["checkout", "wheel"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Run:
    """Return `run(app, *overrides)`, which returns the exit status and the output of the app."""
    for app, (first, config) in APPS.items():
        (tmp_path / app).mkdir()
        (tmp_path / app / "user_app.py").write_text(APP.format(first=first))
        (tmp_path / app / "app.yaml").write_text(config)
    if request.param == "checkout":
        return partial(_run_checkout, tmp_path)
    return partial(_run_wheel, request.getfixturevalue("built").python, tmp_path)


OPTIONS = ["hydra.run.dir=.", "hydra.output_subdir=null"]


def _run_checkout(folder: Path, app: str, *overrides: str) -> tuple[int, str]:
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    done = run_forked(folder / app / "user_app.py", folder / app, [environ], [*OPTIONS, *overrides])
    return done.returncode, done.stdout + done.stderr


def _run_wheel(python: Path, folder: Path, app: str, *overrides: str) -> tuple[int, str]:
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [python, "user_app.py", *OPTIONS, *overrides],
        cwd=folder / app,
        env=environ,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("app", ["searchpath", "register"])
def test_mounts_a_policy(run: Run, app: str) -> None:
    status, output = run(app, "distclip@trainer.clip=global_norm", "trainer.clip.max_norm=0.25")
    assert status == 0, output
    assert output.startswith("['trainer'] 0.1 NormPolicy(threshold=Fixed(max_norm=0.25)")


@pytest.mark.parametrize(("run", "app"), [("checkout", "register")], indirect=["run"])
def test_default_policy_is_the_apps(run: Run, app: str) -> None:
    status, output = run(app, "trainer.clip.cap=1.0")
    assert status == 0, output
    assert "ZScore(" in output


TYPOS = {
    "distclip@trainer.clip=zclp": ["zclp", "median_mad"],  # the message lists the choices
    "trainer.clip.capp=1": ["capp"],
    "trainer.clip.z=-1": ["z=-1"],
    "trainer.clip.cap=low": ["cap='low'"],
}
"""Words of the message for each wrong override."""


@pytest.mark.parametrize(("run", "app"), [("checkout", "searchpath")], indirect=["run"])
def test_typos_are_refused(run: Run, app: str) -> None:
    with ThreadPoolExecutor(2) as pool:
        for (status, output), words in zip(pool.map(partial(run, app), TYPOS), TYPOS.values(), strict=True):
            assert status != 0
            assert [word for word in words if word not in output] == [], output


@pytest.mark.parametrize("run", ["checkout"], indirect=True)
def test_unregistered_policy_is_named_in_the_error(run: Run) -> None:
    status, output = run("neither")
    assert status != 0
    assert "distclip/zclip" in output


@pytest.mark.parametrize("run", ["wheel"], indirect=True)
def test_register_adds_only_the_policies(run: Run) -> None:
    status, output = run("register", "+model@trainer.model=gpt")
    assert status != 0
    assert "group 'model' does not exist" in output
