"""Ranks that differ in anything that decides a call raise together, in that call, and can go on afterwards."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed import distributed_c10d
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import distclip
from distclip import ArgumentError, DisagreementError, DistclipError, GradClipper, PeerError
from distclip.comm import agreement, threads
from distclip.comm.agreement import Call, CallCounter, checksum_of, disagreement, zero_sum_weight
from distclip.comm.consensus import FirstError
from distclip.comm.discovery import resolve_comm, world_comm
from distclip.outcome import Outcome
from distclip.policies.policy import State, Verdict
from tests.ranks import gather_from_ranks, on_ranks
from tests.tables.layouts.meshes import world_mesh

ODD = 1
"""Rank that does something else than the others."""


def sharded_param(scale: float = 3.0) -> nn.Parameter:
    """Return a parameter that is sharded over all ranks, with a gradient."""
    whole = torch.randn(8, 4, generator=torch.Generator().manual_seed(0)) * scale
    mesh = world_mesh("all")
    param = nn.Parameter(distribute_tensor(torch.zeros(8, 4), mesh, [Shard(0)], src_data_rank=None))
    param.grad = distribute_tensor(whole, mesh, [Shard(0)], src_data_rank=None)
    return param


def check_all_raise(call: Callable[[], Any], *words: str, kind: type[Exception] = DisagreementError) -> str:
    """Check that a call raises on every rank, with the words in the message, and return the message."""
    message = ""
    try:
        call()
    except kind as error:
        message = str(error)
    messages = gather_from_ranks(message)
    assert all(messages), messages
    assert all(word in text for word in words for text in messages), messages
    return message


# ---- Checksums ----


@given(st.lists(st.integers(0, 3), min_size=2, max_size=12))
def test_weighted_sum_is_zero_exactly_if_all_ranks_are_equal(values: list[int]) -> None:
    """Compare ranks with up to two different checksums, in any numbers."""
    checksums = [Call("f", CallCounter(), (("x", value > 1),)).checksum() for value in values]
    total = sum(zero_sum_weight(rank, len(values)) * checksum for rank, checksum in enumerate(checksums))
    assert (total == 0) == (len(set(checksums)) == 1)


@pytest.mark.parametrize(
    "other",
    [
        Call("g", CallCounter(), (("x", 1.0),)),
        Call("f", CallCounter().next(), (("x", 1.0),)),
        Call("f", CallCounter(), (("x", 1.0000000000000002),)),
        Call("f", CallCounter(), (("x", 1),)),
        Call("f", CallCounter(), (("y", 1.0),)),
        Call("f", CallCounter(), ()),
    ],
)
def test_checksum_and_message_show_any_difference(other: Call) -> None:
    call = Call("f", CallCounter(), (("x", 1.0),))
    assert call.checksum() != other.checksum()
    calls = [call.as_dict(), other.as_dict(), call.as_dict()]
    error = disagreement(calls, threads(3)[0])
    assert error is not None
    assert "on ranks 0, 2" in str(error)
    assert disagreement([call.as_dict()] * 3, threads(3)[0]) is None


# ---- Functions ----


@on_ranks(2, 4)
@pytest.mark.parametrize(
    ("common", "odd", "word"),
    [
        ({"max_norm": 1.0}, {"max_norm": 0.5}, "max_norm"),
        ({"norm_type": 2.0}, {"norm_type": 1.0}, "norm_type"),
        ({"norm_type": 2.0}, {"norm_type": float("inf")}, "norm_type"),
        ({"norm_type": float("inf")}, {"norm_type": float("-inf")}, "norm_type"),
        ({"error_if_nonfinite": False}, {"error_if_nonfinite": True}, "error_if_nonfinite"),
    ],
    ids=["bound", "p", "p and inf", "inf and -inf", "flag"],
)
@pytest.mark.parametrize("warm", [False, True])
def test_arguments_that_differ_raise_before_any_gradient_changes(
    common: dict[str, Any], odd: dict[str, Any], word: str, warm: bool
) -> None:
    param = sharded_param()
    before = param.grad.to_local().clone()
    if warm:
        for arguments in (common, odd):
            distclip.clip_grad_norm_([param], **{**arguments, "max_norm": float("inf")})
    arguments = {"max_norm": 1.0, **(odd if dist.get_rank() == ODD else common)}
    check_all_raise(lambda: distclip.clip_grad_norm_([param], **arguments), word, f"on rank {ODD}")
    assert torch.equal(param.grad.to_local(), before)
    # The next call works again.
    norms = gather_from_ranks(float(distclip.clip_grad_norm_([param], 1.0)))
    assert len(set(norms)) == 1


@on_ranks(2, 4)
def test_other_function_on_one_rank_raises_on_all() -> None:
    param = sharded_param()
    if dist.get_rank() == ODD:
        check_all_raise(lambda: distclip.get_total_norm([param.grad]), "function")
    else:
        check_all_raise(lambda: distclip.clip_grad_norm_([param], 1.0), "function")


@on_ranks(2, 4)
def test_interrupt_while_measuring_leaves_no_rank_waiting() -> None:
    """An interrupted rank enters the all-reduce all the same, and the next call adds numbers of one step only."""

    class Interrupting(Tensor):
        """Gradient during whose measurement the user presses Ctrl-C."""

        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            raise KeyboardInterrupt

    param, plain = sharded_param(), nn.Parameter(torch.zeros(2))
    if dist.get_rank() == ODD:
        plain.grad = torch.ones(2).as_subclass(Interrupting)
    caught: str = ""
    try:
        distclip.clip_grad_norm_([param, plain], 1.0)
    except KeyboardInterrupt:
        caught = "interrupt"
    except PeerError as error:
        caught = str(error)
    everyone = gather_from_ranks(caught)
    assert everyone[ODD] == "interrupt", everyone
    assert all("KeyboardInterrupt" in text for rank, text in enumerate(everyone) if rank != ODD), everyone
    plain.grad = None
    assert len(set(gather_from_ranks(float(distclip.clip_grad_norm_([param, plain], 1.0))))) == 1


# ---- Clippers ----


class HalfOnOneRank:
    """Policy that is wrong: it returns another coefficient on one rank."""

    spec = distclip.NormSpec()

    def init(self, slots: int, device: torch.device) -> State:
        return {}

    def decide(self, totals: Any, state: State) -> tuple[Verdict, State]:
        coef = 0.5 if dist.get_rank() == ODD else 0.25
        return Verdict(torch.full((1,), coef, dtype=torch.float64)), state

    def __repr__(self) -> str:
        return "HalfOnOneRank()"


@on_ranks(2, 4)
def test_policy_with_other_coefficients_on_one_rank_is_found_in_the_next_step() -> None:
    param = sharded_param()
    clipper = GradClipper([("w", param)], HalfOnOneRank())
    clipper.clip()
    check_all_raise(clipper.clip, "coefficients of the last step")


@on_ranks(2, 4)
@pytest.mark.parametrize("key", ["state of the policy", "number of steps so far"])
def test_state_that_was_loaded_on_one_rank_is_found_in_the_next_step(key: str) -> None:
    param = sharded_param()
    clipper = GradClipper([("w", param)], distclip.ema(warmup=1, cap=1e9))
    for _ in range(3):
        clipper.clip()
    state = clipper.state_dict()
    if dist.get_rank() == ODD:
        if key == "number of steps so far":
            state["counts"]["steps"] += 1
        else:
            for tensors in state["state"].values():
                for value in tensors.values():
                    if value.is_floating_point():
                        value.mul_(0.5)
        clipper.load_state_dict(state)
    before = param.grad.to_local().clone()
    check_all_raise(clipper.clip, key)
    assert torch.equal(param.grad.to_local(), before)


@on_ranks(2, 4)
@pytest.mark.parametrize("odd", ["all", "other", "invalid"])
def test_selection_that_differs_on_one_rank(odd: str) -> None:
    """Measure a parameter of 8 x 4 elements on most ranks. Each rank also has another plain parameter."""
    mesh, wide = world_mesh("all"), sharded_param()
    narrow = nn.Parameter(distribute_tensor(torch.zeros(8, 2), mesh, [Shard(0)], src_data_rank=None))
    own = nn.Parameter(torch.zeros(1 + dist.get_rank()))
    clipper = GradClipper([("w", wide), ("n", narrow), ("own", own)], distclip.global_norm(1.0), split_over=mesh)
    only: Any = {"all": None, "other": [narrow], "invalid": "w"}[odd] if dist.get_rank() == ODD else [wide, own]
    kind = ArgumentError if odd == "invalid" else DisagreementError
    check_all_raise(lambda: clipper.clip(only=only), "only", kind=kind)
    # A rank may pass what it alone has, or nothing of it.
    norms = gather_from_ranks(float(clipper.clip(only=[wide, own] if dist.get_rank() else [("w", wide)]).norm))
    assert len(set(norms)) == 1


@on_ranks(2, 4)
def test_step_on_one_rank_and_clip_on_another() -> None:
    param = sharded_param()
    clipper, optimizer = GradClipper([("w", param)], distclip.global_norm(1.0)), torch.optim.SGD([param], lr=0.1)
    if dist.get_rank() == ODD:
        check_all_raise(lambda: clipper.step(optimizer), "function", "GradClipper.clip", "GradClipper.step")
    else:
        check_all_raise(clipper.clip, "function", "GradClipper.clip", "GradClipper.step")
    assert torch.count_nonzero(param.to_local()) == 0


@on_ranks(2, 4)
def test_gather_on_one_rank_and_step_on_the_others() -> None:
    param = sharded_param()
    clipper = GradClipper([("w", param)], distclip.global_norm(1.0))
    call = clipper.measure_tensors if dist.get_rank() == ODD else clipper.clip
    check_all_raise(call, "measure_tensors", "GradClipper.clip")
    assert len(set(gather_from_ranks(float(clipper.clip().norm)))) == 1


def scaled_step(clipper: GradClipper, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None) -> None:
    clipper.step(optimizer, scaler)
    if scaler is not None:
        scaler.update()


@on_ranks(2, 4)
@pytest.mark.parametrize("case", ["scale", "scaler from the second step on"])
def test_scaler_that_differs_on_one_rank(case: str) -> None:
    param = sharded_param()
    clipper, optimizer = GradClipper([("w", param)], distclip.global_norm(1.0)), torch.optim.SGD([param], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.ones(()))
    odd = dist.get_rank() == ODD
    scaled_step(clipper, optimizer, scaler if case == "scale" else None)
    if case == "scale":
        if odd:
            scaler.update(16.0)
        check_all_raise(lambda: scaled_step(clipper, optimizer, scaler), "loss scale: 8 ", "16 ")
    else:
        check_all_raise(lambda: scaled_step(clipper, optimizer, scaler if odd else None), "function")


@on_ranks(2, 4)
def test_observer_that_raises_on_one_rank_does_not_hold_its_step_back() -> None:
    param = sharded_param()
    clipper, optimizer = GradClipper([("w", param)], distclip.global_norm(1.0)), torch.optim.SGD([param], lr=0.1)

    def observe(outcome: Outcome) -> None:
        if dist.get_rank() == ODD:
            raise OSError("disk full")

    clipper.observe(observe)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        clipper.step(optimizer)
        clipper.step(optimizer)
    assert any("disk full" in str(one.message) for one in caught) == (dist.get_rank() == ODD)
    assert all(gather_from_ranks(torch.count_nonzero(param.to_local()).item() > 0))


@on_ranks(2)
def test_warning_of_an_observer_that_is_an_error_is_raised_in_the_next_step() -> None:
    """All ranks make the step, and raise together in the next one."""
    param = sharded_param()
    clipper, optimizer = GradClipper([("w", param)], distclip.global_norm(1.0)), torch.optim.SGD([param], lr=0.1)
    odd = dist.get_rank() == ODD

    def observe(outcome: Outcome) -> None:
        if odd and outcome.step == 1:
            raise OSError("disk full")

    clipper.observe(observe)
    clipper.step(optimizer)
    with pytest.raises(RuntimeWarning if odd else PeerError, match="disk full"):
        clipper.step(optimizer)
    clipper.step(optimizer)
    assert clipper.steps == 2


@on_ranks(2)
def test_error_in_a_further_step_of_one_loss_scale_is_raised_by_all_ranks_in_the_next_one() -> None:
    params = [sharded_param(), sharded_param()]
    clipper = GradClipper([("v", params[0]), ("w", params[1])], distclip.global_norm(1.0))
    one, other = (torch.optim.SGD([param], lr=0.1) for param in params)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.ones(()))
    clipper.step(one, scaler)
    if dist.get_rank() == ODD:
        wrong = torch.optim.SGD([params[1], nn.Parameter(torch.ones(1))], lr=0.1)
        with pytest.raises(ArgumentError, match="parameters that the clipper does not have"):
            clipper.step(wrong, scaler)
    else:
        clipper.step(other, scaler)
    scaler.update()
    check_all_raise(lambda: clipper.step([one, other], scaler), "it does not step w", kind=ArgumentError)


# ---- The program's own collectives ----


@on_ranks(2, 4)
def test_numbers_travel_on_a_process_group_that_the_program_does_not_use() -> None:
    """A call that one rank leaves out must not pair with a collective of the program."""
    size = dist.get_world_size()
    derived = resolve_comm([tuple(range(size))], (), None, FirstError())
    for comm in (derived, world_comm()):
        assert comm.group is not dist.group.WORLD
        assert comm.group is derived.group
    assert comm.group.group_desc == "distclip"


@on_ranks(2)
def test_destroyed_group_is_reported() -> None:
    """Frameworks destroy groups between two models. Those of distclip are not theirs."""
    param = sharded_param()
    distclip.clip_grad_norm_([param], 1.0)
    with mock.patch.dict(distributed_c10d._world.pg_map):
        for group in list(distributed_c10d._world.pg_map):
            if group.group_desc == "distclip":
                del distributed_c10d._world.pg_map[group]
        with pytest.raises(DistclipError, match="was destroyed"):
            distclip.clip_grad_norm_([param], 1.0)
    distclip.clip_grad_norm_([param], 1.0)


@on_ranks(2)
def test_function_under_ddp_is_local_as_in_torch() -> None:
    """One rank may call alone, and the program's own sums stay right."""
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Linear(4, 4))
    model(torch.ones(2, 4)).sum().backward()
    right = float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]))
    if dist.get_rank() == 0:
        assert float(distclip.clip_grad_norm_(model, float("inf"))) == pytest.approx(right, rel=1e-6)
    total = torch.tensor(float(dist.get_rank()))
    dist.all_reduce(total)
    assert float(total) == 1.0


@on_ranks(2)
def test_ranks_with_inputs_left_clip_alone_in_a_join() -> None:
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Linear(4, 4))
    clipper = GradClipper(model, distclip.global_norm(0.5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with model.join():
        for i in range(3 + dist.get_rank()):
            model.zero_grad()
            model(torch.ones(2, 4) * (i + 1)).sum().backward()
            right = float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]))
            assert float(clipper.step(optimizer).norm) == pytest.approx(right, rel=1e-6)
            assert float(distclip.clip_grad_norm_(model, float("inf"))) == pytest.approx(0.5, rel=1e-5)


@given(st.lists(st.floats(width=64), min_size=1, max_size=40))
def test_host_and_operators_compute_one_checksum(numbers: list[float]) -> None:
    """Ranks whose gradients are on a CPU compare themselves with ranks whose gradients are on an accelerator."""
    tensors = [torch.tensor(numbers, dtype=torch.float64)]
    with mock.patch.object(agreement, "_FEW", 0):
        expected = checksum_of(tensors)
    assert checksum_of(tensors) == expected
    assert checksum_of([tensors[0][:1], tensors[0][1:]]) == expected


@on_ranks(2)
def test_ranks_agree_on_the_dtype_although_only_some_have_gathered_it() -> None:
    """Return float64 on all ranks if one has such a gradient, and another has passed new tensors since the gather."""
    param, dtype = nn.Parameter(torch.zeros(3)), torch.float32
    if dist.get_rank() != ODD:
        dtype = torch.float64
        param = nn.Parameter(torch.zeros(3, dtype=dtype))
    for renews in (False, False, True, False):
        if renews and dist.get_rank() == ODD:
            param = nn.Parameter(torch.zeros(3))
        param.grad = torch.ones(3, dtype=dtype)
        norm = distclip.clip_grad_norm_([param], 1.0, split_over=dist.group.WORLD)
        assert gather_from_ranks((norm.dtype, float(norm))) == [(torch.float64, 6**0.5)] * 2
