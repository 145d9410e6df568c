"""Adopting: a plain PEFT adapter and what is known of it in, measured on its base; an adapter with contract out."""

from qlora_kit.adoption.adopt import Adoption, adopt_adapter
from qlora_kit.adoption.planning import Claims

__all__ = ["Adoption", "Claims", "adopt_adapter"]
