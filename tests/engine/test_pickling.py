"""Policies can be pickled. A clipper and a recorder refuse it with the reason. A model is copied with its clipper."""

from __future__ import annotations

import copy
import itertools
import pickle
from pathlib import Path

import pytest
import torch
from torch.optim import SGD

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


@pytest.mark.parametrize("isolate", [False, True])
@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_copies_of_model_clipper_and_optimizer_step_together(order: tuple[int, ...], isolate: bool) -> None:
    model = torch.nn.Linear(2, 1)
    parts = model, GradClipper(model, distclip.global_norm(1.0), isolate=isolate), SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        copied = copy.deepcopy([parts[i] for i in order])
        parts = tuple(copied[order.index(i)] for i in range(3))  # type: ignore[assignment]
        one, clipper, optimizer = parts
        for param in model.parameters():
            param.grad = torch.ones_like(param)
        optimizer.zero_grad()
        one(torch.ones(1, 2)).sum().backward()
        assert float(clipper.step(optimizer).norm) == pytest.approx(3**0.5)
        with pytest.raises(distclip.ArgumentError, match="parameters that the clipper does not have"):
            clipper.step(SGD(model.parameters(), lr=0.1))


def test_clipper_copied_without_its_model_warns_in_its_first_call() -> None:
    model = torch.nn.Linear(2, 1)
    clipper = copy.deepcopy(GradClipper(model, distclip.global_norm(1.0)))
    model(torch.ones(1, 2)).sum().backward()
    with pytest.warns(distclip.UnclippedStepWarning, match="construct a clipper and load_state_dict"):
        clipper.clip()
    with pytest.raises(distclip.ArgumentError, match="parameters that the clipper does not have"):
        clipper.step(SGD(model.parameters(), lr=0.1))


def test_copy_of_an_attached_clipper_is_attached_to_nothing() -> None:
    model = torch.nn.Linear(2, 1)
    optimizer, clipper = SGD(model.parameters(), lr=0.1), GradClipper(model, distclip.global_norm(1.0))
    clipper.attach(optimizer)
    with pytest.warns(distclip.UnclippedStepWarning, match="attached to no optimizer"):
        model, optimizer, clipper = copy.deepcopy((model, optimizer, clipper))
    clipper.attach(optimizer)
    before = model.weight.detach().clone()
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert float((model.weight.detach() - before).norm()) == pytest.approx(0.1 * (2 / 3) ** 0.5, rel=1e-4)


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
