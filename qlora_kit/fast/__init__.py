"""The fused training path: linear layers with LoRA, the MLP, attention and the loss, with the same results in less."""

from qlora_kit.fast.head import FastHead, ScoredModel
from qlora_kit.fast.install import PIECES, FastPath, Piece, fast_path

__all__ = ["PIECES", "FastHead", "FastPath", "Piece", "ScoredModel", "fast_path"]
