"""The public face: what it is called, and that each piece says what it costs."""

from __future__ import annotations

import inspect

import pytest
import torch

import distclip
from distclip import reference

DROP_INS = ["clip_grad_norm_", "clip_grad_value_", "clip_grads_with_norm_", "get_total_norm"]


def test_all_is_sorted_and_complete() -> None:
    public = [n for n, v in vars(distclip).items() if not n.startswith("_") and not inspect.ismodule(v)]
    # In which order is the linter's business.
    assert sorted(distclip.__all__) == sorted([*public, "__version__"])


@pytest.mark.parametrize("name", [n for n in distclip.__all__ if not n.startswith("__")])
def test_every_public_name_says_what_it_is(name: str) -> None:
    assert (inspect.getdoc(getattr(distclip, name)) or "").strip()


@pytest.mark.parametrize("name", [*DROP_INS, "GradClipper", "annotate_"])
def test_what_communicates_says_so(name: str) -> None:
    text = inspect.getdoc(getattr(distclip, name)) or ""
    if name == "GradClipper":
        text += inspect.getdoc(distclip.GradClipper.clip) or ""
    for part in ("Args:", "Raises", "Collectives", "Host syncs"):
        assert part in text, f"{name} does not state {part}"


@pytest.mark.parametrize("name", DROP_INS)
def test_the_drop_ins_take_what_torch_takes(name: str) -> None:
    """Replacing the import is the whole migration."""
    theirs = list(inspect.signature(getattr(torch.nn.utils, name)).parameters.values())
    ours = list(inspect.signature(getattr(distclip, name)).parameters.values())
    assert [p.name for p in ours[: len(theirs)]] == [p.name for p in theirs]
    assert [p.default for p in ours[: len(theirs)]] == [p.default for p in theirs]
    assert all(p.kind is inspect.Parameter.KEYWORD_ONLY for p in ours[len(theirs) :])


def test_the_reference_is_public() -> None:
    assert float(reference.total_norm([torch.tensor([3.0]), torch.tensor([4.0])])) == 5.0
