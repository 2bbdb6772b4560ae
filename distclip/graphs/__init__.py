"""Run calls inside a graph of torch.compile, make_fx or a CUDA graph, where all stages use tensors and no host."""

from .plan import GraphPlan
from .step import clip, reason_against_clip, reason_against_step, step
from .tracing import in_graph, is_tracing, leave_graph

__all__ = [
    "GraphPlan",
    "clip",
    "in_graph",
    "is_tracing",
    "leave_graph",
    "reason_against_clip",
    "reason_against_step",
    "step",
]
