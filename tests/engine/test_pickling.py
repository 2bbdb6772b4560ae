"""Policies can be pickled. A clipper and a recorder refuse it with the reason. A model is copied with its clipper."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch

import distclip
from distclip import GradClipper
from distclip.monitor import Recorder
from tests.tables.policies import POLICIES


@pytest.mark.parametrize("name", POLICIES)
def test_policy_can_be_pickled(name: str) -> None:
    policy = POLICIES[name].make()
    assert repr(pickle.loads(pickle.dumps(policy))) == repr(policy)


def test_clipper_and_recorder_name_the_way_instead_of_pickling(tmp_path: Path) -> None:
    clipper = GradClipper(torch.nn.Linear(2, 1), distclip.global_norm(1.0))
    with pytest.raises(TypeError, match=r"GradClipper: cannot be pickled.*Save state_dict\(\)"):
        pickle.dumps(clipper)
    with Recorder(clipper, tmp_path) as recorder, pytest.raises(TypeError, match=r"Recorder: cannot be pickled"):
        pickle.dumps(recorder)


def test_copy_of_a_model_and_its_clipper_clips_the_copy() -> None:
    model = torch.nn.Linear(2, 1)
    other, clipper = copy.deepcopy((model, GradClipper(model, distclip.global_norm(1.0))))
    for param in other.parameters():
        param.grad = torch.ones_like(param)
    assert float(clipper.clip().norm) == pytest.approx(3**0.5)
    assert model.weight.grad is None


@pytest.mark.parametrize(
    ("arguments", "advice"),
    [
        ({"max_norm": 2.0}, "GradClipper(model, distclip.global_norm(2.0))"),
        ({"max_norm": 2.0, "norm_type": 1}, "GradClipper(model, distclip.global_norm(2.0, norm_type=1))"),
        ({"clip_value": 0.5}, "GradClipper(model, distclip.value(0.5))"),
        ({}, "GradClipper(model, distclip.global_norm(1.0))"),
    ],
)
def test_arguments_of_torch_are_explained(arguments: dict[str, float], advice: str) -> None:
    with pytest.raises(distclip.ArgumentError) as caught:
        GradClipper(torch.nn.Linear(2, 1), **arguments)  # type: ignore[arg-type, call-arg]
    assert str(caught.value).endswith(f"Use {advice}.")
