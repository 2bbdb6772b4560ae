"""Clip groups that share nothing, such as the adapters of a server: one all-reduce, one verdict for each group."""

from .checkpoint import group_state_dict, load_groups
from .counts import GroupCounts
from .engine import IsolatedEngine
from .groups import Groups

__all__ = ["GroupCounts", "Groups", "IsolatedEngine", "group_state_dict", "load_groups"]
