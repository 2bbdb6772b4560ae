"""Text where several values are expected is one value, or it is refused. It is never read letter by letter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import distclip
from distclip import ArgumentError, GradClipper, NormPolicy, NormSpec
from distclip.monitor import Recorder, sinks

NAMES = ("embed.weight", "block.weight", "head.weight", "head.bias")


def clipped_names(policy: Any) -> set[str]:
    """Return the names of the parameters that a policy clips."""
    params = {name: torch.nn.Parameter(torch.ones(2, 2)) for name in NAMES}
    for param in params.values():
        param.grad = torch.full((2, 2), 100.0)
    GradClipper(params.items(), policy).clip()
    return {name for name, param in params.items() if param.grad is not None and float(param.grad.max()) < 100}


class ExcludingPolicy:
    """A policy of the user's whose spec excludes a name."""

    spec = NormSpec(per="tensor", exclude="head")

    def init(self, slots: int, device: torch.device) -> dict[str, torch.Tensor]:
        return {}

    def decide(self, totals: Any, state: Any) -> Any:
        return distclip.Verdict(torch.full_like(totals.norms, 0.5)), state


@pytest.mark.parametrize(
    "exclude", ["head", ["head"], ("head",), {"head"}, iter(["head"])], ids=lambda exclude: type(exclude).__name__
)
def test_one_pattern_excludes_what_it_matches(exclude: Any) -> None:
    assert clipped_names(distclip.agc(0.01, exclude=exclude)) == {"embed.weight", "block.weight"}


def test_one_pattern_of_other_policies() -> None:
    policy = NormPolicy(distclip.Fixed(1.0), exclude="head|embed")
    assert policy == NormPolicy(distclip.Fixed(1.0), exclude=["head|embed"])
    assert policy.spec.exclude == ("head|embed",)
    assert clipped_names(policy) == {"block.weight"}
    assert clipped_names(ExcludingPolicy()) == {"embed.weight", "block.weight"}


def test_patterns_in_a_set_have_one_order() -> None:
    """Sort them, because each process has another order of a set, and ranks compare the text of policies."""
    patterns = [f"layer{i}" for i in range(20)]
    assert distclip.agc(exclude=set(patterns)).exclude == tuple(sorted(patterns))  # type: ignore[arg-type]


BAD_PATTERNS = ["", [""], b"head", [b"head"], None, 3, [3], {"head": 1}, ["head", None], "(", ["["]]


@pytest.mark.parametrize("exclude", BAD_PATTERNS, ids=repr)
@pytest.mark.parametrize("make", [distclip.agc, NormPolicy, NormSpec])
def test_other_values_are_no_patterns(make: Callable[..., Any], exclude: Any) -> None:
    with pytest.raises(ArgumentError, match=r"^exclude=.*Use exclude="):
        make(exclude=exclude)


BAD_GROUPS = ["head", b"head", ["head"], [("a", "b")], {"a": 1}, {"a": None}, {1: "a"}, {"a": "("}, {"a": ["x", "y"]}]


@pytest.mark.parametrize("groups", BAD_GROUPS, ids=repr)
@pytest.mark.parametrize("make", [NormPolicy, NormSpec])
def test_other_values_are_no_groups(make: Callable[..., Any], groups: Any) -> None:
    with pytest.raises(ArgumentError, match=r"groups=.*Use groups="):
        make(per="group", groups=groups)


@pytest.mark.parametrize("groups", ["ab", ["ab"], {"a": "ab"}, {"a": b"ab"}, {1: ("a", 1.0)}, {"a": ("(", 1.0)}, None])
def test_other_values_are_no_groups_with_bounds(groups: Any) -> None:
    with pytest.raises(ArgumentError, match="groups"):
        distclip.group_norm(groups)


def make_clipper(**options: Any) -> GradClipper:
    return GradClipper([("w", torch.nn.Parameter(torch.ones(2)))], distclip.global_norm(1.0), **options)


CALLS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "parameters": ("parameters", lambda text: GradClipper(text, distclip.global_norm(1.0))),
    "parameters of a function": ("parameters", lambda text: distclip.clip_grad_norm_(text, 1.0)),
    "tensors": ("parameters|tensors", distclip.get_total_norm),
    "split_over": ("split_over", lambda text: make_clipper(split_over=text)),
    "split_over by name": ("split_over", lambda text: make_clipper(split_over={"pp": text})),
    "several split_over": ("split_over", lambda text: make_clipper(split_over=[text])),
    "comm": ("comm", lambda text: make_clipper(comm=text)),
    "policy": ("policy", lambda text: GradClipper([torch.nn.Parameter(torch.ones(2))], text)),
    "optimizer": ("optimizer", lambda text: make_clipper().step(text)),
    "optimizers": ("optimizer", lambda text: make_clipper().step([text])),
    "attach": ("optimizer", lambda text: make_clipper().attach(text)),
    "max_norm": ("max_norm", distclip.Fixed),
    "clip_value": ("clip_value", lambda text: distclip.clip_grad_value_([torch.nn.Parameter(torch.ones(2))], text)),
    "state_dict": ("state_dict", lambda text: make_clipper().load_state_dict(text)),
    "sinks": ("sinks", lambda text: Recorder(make_clipper(), "/nowhere", sinks=text)),
    "top": ("top", lambda text: Recorder(make_clipper(), "/nowhere", top=text)),
    "every": ("every", lambda text: Recorder(make_clipper(), "/nowhere", every=text)),
    "facts": ("facts", lambda text: Recorder(make_clipper(), "/nowhere", facts=text)),
    "skip": ("skip", lambda text: NormPolicy(skip=text)),
    "run of wandb": ("run", lambda text: sinks.wandb(text.decode() if isinstance(text, bytes) else text)),
    "run of trackio": ("run", lambda text: sinks.trackio(text.decode() if isinstance(text, bytes) else text)),
    "per": ("per", lambda text: NormPolicy(per=text)),
    "on_nonfinite": ("on_nonfinite", lambda text: make_clipper(on_nonfinite=text)),
    "max_skips": ("max_skips", lambda text: make_clipper(max_skips=text)),
}
"""Calls with text as an argument, and the name of the argument."""


@pytest.mark.parametrize("text", ["head", "", b"head"], ids=repr)
@pytest.mark.parametrize("call", CALLS)
def test_text_is_refused_by_name(call: str, text: Any) -> None:
    argument, function = CALLS[call]
    with pytest.raises(ArgumentError, match=argument):
        function(text)
