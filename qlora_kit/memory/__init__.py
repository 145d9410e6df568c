"""The planner: what a run takes in memory, whether it fits a card, and what to change; arithmetic alone, no torch."""

from qlora_kit.memory.planner import Plan, Suggestion, estimate_memory, make_plan

__all__ = ["Plan", "Suggestion", "estimate_memory", "make_plan"]
