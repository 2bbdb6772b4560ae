"""Somebody else's Hydra app, which mounts a policy into its own config, beside a checkout and with the wheel."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

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
WAYS = {"searchpath": ("", YAML + SEARCHPATH), "register": (REGISTER, YAML), "neither": ("", YAML)}


Run = Callable[..., tuple[int, str]]


@pytest.fixture(params=["checkout", "wheel"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Run:
    """`run(way, *overrides)`: the app's exit status and what it said, with distclip as it lies here or installed."""
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    if request.param == "checkout":
        return partial(_run, sys.executable, environ, tmp_path)
    del environ["PYTHONPATH"]
    return partial(_run, str(request.getfixturevalue("built").python), environ, tmp_path)


def _run(python: str, environ: dict[str, str], folder: Path, way: str, *overrides: str) -> tuple[int, str]:
    first, config = WAYS[way]
    (folder / "theirs.py").write_text(APP.format(first=first))
    (folder / "app.yaml").write_text(config)
    done = subprocess.run(
        [python, "theirs.py", "hydra.run.dir=.", "hydra.output_subdir=null", *overrides],
        cwd=folder,
        env=environ,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("way", ["searchpath", "register"])
def test_mounts_a_policy(run: Run, way: str) -> None:
    status, said = run(way, "distclip@trainer.clip=global_norm", "trainer.clip.max_norm=0.25")
    assert status == 0, said
    assert said.startswith("['trainer'] 0.1 NormPolicy(threshold=Fixed(max_norm=0.25)")


@pytest.mark.parametrize(("run", "way"), [("checkout", "register"), ("wheel", "searchpath")], indirect=["run"])
def test_the_default_is_what_the_app_names(run: Run, way: str) -> None:
    status, said = run(way, "trainer.clip.cap=1.0")
    assert status == 0 and "ZScore(" in said, said


TYPOS = {
    "distclip@trainer.clip=zclp": ["zclp", "median_mad"],  # the choices that there are
    "trainer.clip.capp=1": ["capp"],
    "trainer.clip.z=-1": ["z=-1"],
    "trainer.clip.cap=low": ["cap='low'"],
}


@pytest.mark.parametrize(("run", "way"), [("checkout", "searchpath"), ("wheel", "register")], indirect=["run"])
@pytest.mark.parametrize("typo", TYPOS)
def test_typos_are_refused_in_words(run: Run, way: str, typo: str) -> None:
    status, said = run(way, typo)
    assert status != 0
    assert [word for word in TYPOS[typo] if word not in said] == [], said


@pytest.mark.parametrize("run", ["checkout"], indirect=True)
def test_without_either_hydra_says_what_is_missing(run: Run) -> None:
    status, said = run("neither")
    assert status != 0 and "distclip/zclip" in said, said


@pytest.mark.parametrize("run", ["wheel"], indirect=True)
def test_registering_adds_the_policies_alone(run: Run) -> None:
    status, said = run("register", "+model@trainer.model=gpt")
    assert status != 0 and "group 'model' does not exist" in said, said
