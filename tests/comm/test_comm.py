"""Check what a communicator of a caller must have, and how one becomes an axis of `split_over=`."""

from __future__ import annotations

import sys
from unittest import mock

import pytest
import torch
from torch import nn

import distclip
from distclip import ArgumentError, Comm, LayoutError, LocalComm
from distclip.comm import global_ranks, threads
from distclip.comm.consensus import FirstError
from distclip.comm.discovery import global_rank, resolve_comm, uncovered_ranks
from distclip.comm.mpi import MPIComm
from distclip.comm.ranks import Axis
from distclip.sharding import split_axes


class FourRanks(LocalComm):
    """Communicator over every other rank of a job of eight, of which this process is the third."""

    rank, size = 2, 4
    ranks = (0, 2, 4, 6)  # type: ignore[assignment]


class RankAndSize:
    """Object that has two of the members of a communicator."""

    rank, size = 0, 1


def test_communicators_within_a_process_satisfy_the_protocol() -> None:
    for comm in (LocalComm(), *threads(2)):
        assert isinstance(comm, Comm)
        assert comm.ranks is None
        assert global_ranks(comm) == range(comm.size)


def test_error_names_the_missing_members() -> None:
    weight = nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    with pytest.raises(ArgumentError, match="ranks, device, covers_holders, sum_, max_, gather_objects are missing"):
        distclip.clip_grad_norm_([weight], 1.0, comm=RankAndSize())  # type: ignore[arg-type]
    assert torch.equal(weight.grad, torch.ones(2))


def test_any_communicator_with_global_ranks_is_an_axis() -> None:
    (axis,) = split_axes({"pp": FourRanks()}, FourRanks())
    assert (axis.ranks, axis.name) == ((0, 2, 4, 6), "pp")
    assert axis.identity == split_axes([FourRanks()], FourRanks())[0].identity
    assert axis.identity.endswith("0,2,4,6")


def test_communicator_without_global_ranks_is_no_axis() -> None:
    with pytest.raises(ArgumentError, match="global ranks"):
        split_axes({"pp": LocalComm()}, LocalComm())


def test_communicator_as_an_axis_needs_one_for_the_call() -> None:
    with pytest.raises(ArgumentError, match="comm= is not given"):
        split_axes({"pp": FourRanks()})


def test_ranks_outside_of_a_communicator_are_an_error_for_all_ranks() -> None:
    """The error is collected, because the ranks of the communicator must raise it together."""
    comm, errors = FourRanks(), FirstError()
    axes = (Axis((4, 5), "pp", "pp4"),)
    assert uncovered_ranks(comm, [], axes) == {5}
    assert resolve_comm([], axes, comm, errors) is comm
    assert isinstance(errors.error, LayoutError)
    assert "does not contain ranks [5]" in str(errors.error)


def test_global_rank_is_that_of_the_communicator() -> None:
    assert global_rank(FourRanks()) == 4
    assert global_rank(LocalComm()) == 0


def test_mpi_that_is_missing_is_named() -> None:
    class WithoutLibrary:
        """Raises what mpi4py raises where it finds no MPI."""

        @property
        def MPI(self) -> None:
            raise RuntimeError("cannot load MPI library\nlibmpi.so: cannot open")

    for module, message in ((None, r"mpi4py is not installed. Use pip install"), (WithoutLibrary(), "module load")):
        with mock.patch.dict(sys.modules, {"mpi4py": module}), pytest.raises(ImportError, match=message):
            MPIComm()
