"""Check the public names, and that their docstrings state collectives and host syncs."""

from __future__ import annotations

import inspect
import re

import pytest
import torch

import distclip
from distclip import reference
from tests.repo.source import ROOT

DROP_INS = ["clip_grad_norm_", "clip_grad_value_", "clip_grads_with_norm_", "get_total_norm"]


def test_all_is_complete() -> None:
    public = [n for n, v in vars(distclip).items() if not n.startswith("_") and not inspect.ismodule(v)]
    # ruff checks the order.
    assert sorted(distclip.__all__) == sorted([*public, "__version__"])


def test_completion_shows_the_names_of_the_reference() -> None:
    pages = "".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs" / "reference").glob("*.md"))
    modules = {name for name in re.findall(r"^::: distclip[.](\w+)", pages, re.M) if name not in distclip.__all__}
    shown = {name for name in dir(distclip) if not name.startswith("__")}
    # Pages about single modules that the names of the package come from.
    assert shown | {"__version__"} == {*distclip.__all__, *modules - {"auditing", "comm"}}


@pytest.mark.parametrize("name", [n for n in distclip.__all__ if not n.startswith("__")])
def test_public_names_are_documented(name: str) -> None:
    assert (inspect.getdoc(getattr(distclip, name)) or "").strip()


@pytest.mark.parametrize("name", [*DROP_INS, "GradClipper", "annotate_", "audit"])
def test_docstrings_state_collectives_and_syncs(name: str) -> None:
    text = inspect.getdoc(getattr(distclip, name)) or ""
    if name == "GradClipper":
        text += inspect.getdoc(distclip.GradClipper.clip) or ""
    for part in ("Args:", "Raises", "Collectives", "Host syncs"):
        assert part in text, f"{name} does not state {part}"


@pytest.mark.parametrize("name", DROP_INS)
def test_drop_ins_have_the_signatures_of_torch(name: str) -> None:
    """Replacing the import must be the whole migration."""
    theirs = list(inspect.signature(getattr(torch.nn.utils, name)).parameters.values())
    ours = list(inspect.signature(getattr(distclip, name)).parameters.values())
    assert [p.name for p in ours[: len(theirs)]] == [p.name for p in theirs]
    assert [p.default for p in ours[: len(theirs)]] == [p.default for p in theirs]
    assert all(p.kind is inspect.Parameter.KEYWORD_ONLY for p in ours[len(theirs) :])


def test_reference_is_public() -> None:
    assert float(reference.total_norm([torch.tensor([3.0]), torch.tensor([4.0])])) == 5.0


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("integrations.attachment", "Attachment"),
        ("integrations.accelerate", "Attachment"),
        ("integrations.transformers", "DeepSpeedAttachment"),
        ("integrations.lightning", "GradientClipping"),
        ("backward.in_backward", "InBackward"),
    ],
)
def test_reports_need_no_test_for_none(module: str, name: str) -> None:
    """`attachment.report.norm` passes strict type checkers. `Report | None` does not, and `Any` has no completion."""
    owner = getattr(pytest.importorskip(f"distclip.{module}"), name)
    assert owner.report.fget.__annotations__["return"] == "Report | Any"
