"""Data parallelism by MPI alone."""

import torch
from torch import Tensor, nn

from distclip.comm.mpi import MPIComm
from parallel import Criterion, Placed


class Averaged(Placed):
    """A copy of the model, whose gradients are the mean over all ranks after every backward: one Allreduce."""

    def __init__(self, module: nn.Module, criterion: Criterion, comm: MPIComm) -> None:
        super().__init__(module, criterion, comm=comm)
        self.ranks = comm

    def train(self, x: Tensor, y: Tensor) -> Tensor | None:
        loss = super().train(x, y)
        grads = [p.grad for p in self.module.parameters() if p.grad is not None]
        together = torch.cat([grad.flatten() for grad in grads]).div_(self.ranks.size)
        self.ranks.sum_(together)
        for grad, mean in zip(grads, together.split([grad.numel() for grad in grads]), strict=True):
            grad.copy_(mean.view_as(grad))
        return loss


def averaged(model: nn.Sequential, comm: MPIComm, criterion: Criterion, x: Tensor) -> Placed:
    return Averaged(model, criterion, comm)
