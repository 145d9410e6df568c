"""Many LoRA adapters on one base at once: stacked factors for each linear layer, and an index that picks a row's."""

from qlora_kit.lora_bank.bank import LoraBank
from qlora_kit.lora_bank.factors import LoraFactors, can_be_banked, read_factors, weighted_sum

__all__ = ["LoraBank", "LoraFactors", "can_be_banked", "read_factors", "weighted_sum"]
