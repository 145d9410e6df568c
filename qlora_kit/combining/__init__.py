"""Combining: several adapters of one base become one, through PEFT, measured on each one's task."""

from qlora_kit.combining.combine import Combination, combine_adapters
from qlora_kit.combining.layers import METHODS, Method
from qlora_kit.combining.planning import Part, Wishes, parse_part

__all__ = ["METHODS", "Combination", "Method", "Part", "Wishes", "combine_adapters", "parse_part"]
