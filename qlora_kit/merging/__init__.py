"""Merging: a base's shards and an adapter in, a plain checkpoint out, proven against both; no torch until it runs."""

from qlora_kit.merging.merge import merge_adapter, write_trained_base
from qlora_kit.merging.results import LogitDifference, MergeResult, TensorCheck, Verification

__all__ = ["LogitDifference", "MergeResult", "TensorCheck", "Verification", "merge_adapter", "write_trained_base"]
