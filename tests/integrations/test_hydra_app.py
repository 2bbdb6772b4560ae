"""Somebody else's Hydra app, which mounts a policy into its own config."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("hydra")
ROOT = Path(__file__).parents[2]

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


def run(folder: Path, way: str, *overrides: str) -> tuple[int, str]:
    """The app's exit status, and what it said."""
    first, config = WAYS[way]
    (folder / "theirs.py").write_text(APP.format(first=first))
    (folder / "app.yaml").write_text(config)
    done = subprocess.run(
        [sys.executable, "theirs.py", "hydra.run.dir=.", "hydra.output_subdir=null", *overrides],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("way", ["searchpath", "register"])
def test_mounts_a_policy(tmp_path: Path, way: str) -> None:
    status, said = run(tmp_path, way, "distclip@trainer.clip=global_norm", "trainer.clip.max_norm=0.25")
    assert status == 0, said
    assert said.startswith("['trainer'] 0.1 NormPolicy(threshold=Fixed(max_norm=0.25)")


def test_the_default_is_what_the_app_names(tmp_path: Path) -> None:
    status, said = run(tmp_path, "register", "trainer.clip.cap=1.0")
    assert status == 0 and "ZScore(" in said, said


TYPOS = {
    "distclip@trainer.clip=zclp": ["zclp", "median_mad"],  # the choices that there are
    "trainer.clip.capp=1": ["capp"],
    "trainer.clip.z=-1": ["z=-1"],
    "trainer.clip.cap=low": ["cap='low'"],
}


@pytest.mark.parametrize("typo", TYPOS)
def test_typos_are_refused_in_words(tmp_path: Path, typo: str) -> None:
    status, said = run(tmp_path, "register", typo)
    assert status != 0
    assert [word for word in TYPOS[typo] if word not in said] == [], said


def test_without_either_hydra_says_what_is_missing(tmp_path: Path) -> None:
    status, said = run(tmp_path, "neither")
    assert status != 0 and "distclip/zclip" in said, said
