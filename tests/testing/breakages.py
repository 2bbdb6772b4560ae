"""Break the protocol of a call by hand, in ways that a change of the code could: `BREAKAGES[name]`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch

from distclip.comm import LocalComm, consensus, rendezvous
from distclip.comm.process_group import ProcessGroupComm
from distclip.engine import engine, measuring, setup
from distclip.norms import message, reduce
from distclip.norms.measure import Partials
from distclip.testing.scenarios import Condition, Scenario

Patch = Any

BREAKAGES: dict[str, tuple[Scenario, Callable[[], Patch]]] = {}


def breakage(call: str, layout: str, *conditions: tuple[str, int]) -> Callable[[Callable[[], Patch]], Any]:
    """Enter a breakage into the table, with the scenario that must show it."""
    scenario = Scenario(3, ((call, layout),), tuple(Condition(name, rank, 0, 100.0) for name, rank in conditions))

    def enter(make: Callable[[], Patch]) -> Callable[[], Patch]:
        BREAKAGES[make.__name__] = scenario, make
        return make

    return enter


@breakage("function", "stages", ("raises before measuring", 1))
def an_error_is_raised_before_the_all_reduce() -> Patch:
    return mock.patch.object(consensus.FirstError, "__exit__", lambda self, kind, error, trace: self.add(error))


@breakage("function", "stages", ("raises while measuring", 1))
def an_error_does_not_travel_in_the_all_reduce() -> Patch:
    real = reduce.start_reduce

    def without_error(partials: Partials, *args: Any, **kwargs: Any) -> Any:
        return real(dataclasses.replace(partials, failed=False), *args, **kwargs)

    return mock.patch.object(measuring, "start_reduce", without_error)


@breakage("function", "stages", ("different arguments", 1))
def arguments_are_not_compared() -> Patch:
    return mock.patch.object(message, "zero_sum_weight", return_value=0)


@breakage("function", "stages", ("raises while measuring", 1))
def only_the_failed_rank_gathers_the_reason() -> Patch:
    real = measuring.gather_facts

    def alone(totals: Any, partials: Any, spec: Any, error: Any, comm: Any) -> Any:
        return real(totals, partials, spec, error, comm) if error is not None else totals

    return mock.patch.object(measuring, "gather_facts", alone)


@breakage("function", "stages", ("no gradients", 1))
def a_rank_without_gradients_leaves_the_all_reduce_out() -> Patch:
    real = measuring.start_reduce

    def skipping(partials: Partials, spec: Any, comm: Any, **kwargs: Any) -> Any:
        if float(partials.powers.sum()) == 0:
            return real(partials, spec, LocalComm(), **kwargs)
        return real(partials, spec, comm, **kwargs)

    return mock.patch.object(measuring, "start_reduce", skipping)


@breakage("clipper", "stages", ("NaN", 1))
def only_the_rank_with_a_nan_gathers_culprits() -> Patch:
    real = engine.gather_culprits
    return mock.patch.object(engine, "gather_culprits", lambda own, comm: real(own, comm) if any(own) else [])


@breakage("function", "stages", ("raises while measuring", 1))
def gradients_are_written_before_the_check() -> Patch:
    real = measuring.measure

    def writing(shards: Any, *args: Any, **kwargs: Any) -> Any:
        partials = real(shards, *args, **kwargs)
        for grad in shards.grads:
            grad.mul_(0.5)
        return partials

    return mock.patch.object(measuring, "measure", writing)


@breakage("function", "shards", ("Partial gradients", 1))
def only_the_rank_with_a_partial_gradient_sums_it() -> Patch:
    real = measuring.reduce_partial_grads

    def alone(totals: Any, table: Any, shards: Any, *args: Any) -> Any:
        own = any(info.partial_sums for info in shards.infos)
        return real(totals, table, shards, *args) if own else totals

    return mock.patch.object(measuring, "reduce_partial_grads", alone)


@breakage("clipper", "stages", ("raises before measuring", 2))
def a_rank_raises_its_error_without_the_gather() -> Patch:
    real = measuring.gather_facts

    def raising(totals: Any, partials: Any, spec: Any, error: Any, comm: Any) -> Any:
        if error is not None:
            raise error
        return real(totals, partials, spec, error, comm)

    return mock.patch.object(measuring, "gather_facts", raising)


@breakage("function", "stages")
def the_last_rank_tells_nobody_that_a_round_is_complete() -> Patch:
    def silent(self: Any, base: str, result: Any) -> None:
        self._store.add(f"{base.rpartition('/')[0]}/round", 1)
        if result.get("error") is None:
            return
        self._store.set(f"{base}/result", rendezvous.json.dumps(result))

    return mock.patch.object(rendezvous.Rendezvous, "_end_round", silent)


@breakage("clipper", "stages", ("different arguments", 1))
def a_clipper_compares_no_arguments() -> Patch:
    real = setup.exchange_setup
    return mock.patch.object(
        setup, "exchange_setup", lambda table, comm, error, arguments: real(table, comm, error, "arguments")
    )


@breakage("function", "stages")
def ranks_gather_and_add_up_in_an_order_of_their_own() -> Patch:
    real = ProcessGroupComm.sum_

    def swapped(self: ProcessGroupComm, tensor: torch.Tensor) -> None:
        if self.rank == 1:
            self.max_(tensor.clone())
        real(self, tensor)

    return mock.patch.object(ProcessGroupComm, "sum_", swapped)
