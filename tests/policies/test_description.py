"""Descriptions of policies are the calls that make them."""

from __future__ import annotations

import math

import pytest

import distclip
from distclip.policies import NormPolicy
from distclip.policies.description import describe
from tests.tables.policies import POLICIES

OTHERS = {
    "off": (distclip.global_norm(math.inf), "global_norm(inf)"),
    "another norm": (distclip.global_norm(2.0, math.inf), "global_norm(2.0, norm_type=inf)"),
    "per tensor": (distclip.zclip(3.0, per="tensor", cap=1.0), "zclip(3.0, cap=1.0, per='tensor')"),
    "skip": (distclip.median_mad(skip=True), "median_mad(skip=True)"),
    "asymmetric": (distclip.value(-0.1, 0.5), "value(-0.1, 0.5)"),
}


@pytest.mark.parametrize("name", POLICIES)
def test_description_of_a_preset_makes_it_again(name: str) -> None:
    policy = POLICIES[name].make()
    assert describe(policy).startswith(f"{name}(")
    assert eval(describe(policy), {**vars(distclip), "inf": math.inf}) == policy


@pytest.mark.parametrize("name", OTHERS)
def test_description(name: str) -> None:
    policy, text = OTHERS[name]
    assert describe(policy) == text
    assert eval(text, {**vars(distclip), "inf": math.inf}) == policy


def test_policies_without_a_preset() -> None:
    class Last:
        pass

    policy = NormPolicy(distclip.zclip().threshold, per="group", groups={"head": "^head"})
    assert describe(policy) == repr(policy)
    assert " at 0x" not in describe(Last())
