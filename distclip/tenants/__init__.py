"""Clip groups that share nothing, such as the adapters of a server, by one all-reduce and one verdict per group."""

from .checkpoint import group_state_dict, load_groups
from .counts import GroupCounts
from .engine import IsolatedEngine
from .groups import Groups

__all__ = ["GroupCounts", "Groups", "IsolatedEngine", "group_state_dict", "load_groups"]
