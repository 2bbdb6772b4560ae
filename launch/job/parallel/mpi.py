"""Distribute a model as replicas whose gradients mpi4py averages."""

import torch
from torch import Tensor, nn

from distclip.comm.mpi import MPIComm

from ..data import Criterion
from .base import ParallelModel


class MPIModel(ParallelModel):
    """A replica of the model. One Allreduce averages the gradients after every backward pass."""

    def __init__(self, module: nn.Module, criterion: Criterion, comm: MPIComm) -> None:
        super().__init__(module, criterion, comm=comm)
        self._mpi = comm

    def backward(self, loss: Tensor) -> None:
        super().backward(loss)
        grads = [p.grad for p in self.module.parameters() if p.grad is not None]
        mean = torch.cat([grad.flatten() for grad in grads]).div_(self._mpi.size)
        self._mpi.sum_(mean)
        for grad, values in zip(grads, mean.split([grad.numel() for grad in grads]), strict=True):
            grad.copy_(values.view_as(grad))


def data_parallel(model: nn.Sequential, comm: MPIComm, criterion: Criterion, x: Tensor) -> ParallelModel:
    """Build a replica of the model on every MPI rank."""
    return MPIModel(model, criterion, comm)
