"""Decode steps through `torch.compile`: shapes change with the block alone, and the rows' adapters are a tensor."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qlora_kit.errors import ConfigError
from qlora_kit.lora_bank import LoraBank

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from qlora_kit.generation.kv_rows import KvRows

MAX_GRAPHS = 64
"""Sizes of blocks and of the bank that are compiled; later ones run uncompiled, as PyTorch does by itself after 8."""


class CompiledDecode:
    """The model's pass for one token of each row, compiled when a size is first met."""

    def __init__(self, model: PreTrainedModel, bank: LoraBank, backend: str) -> None:
        """Compile nothing yet.

        Raises:
            ConfigError: ``torch.compile`` has no such backend.
        """
        import torch

        known = torch.compiler.list_backends(exclude_tags=())
        if backend not in known:
            what = f"compile_backend is {backend!r}"
            raise ConfigError(what, expected=f"one of {', '.join(known)}", fix="inductor, or None for none")
        self._bank = bank
        self._forward = torch.compile(model.forward, backend=backend, dynamic=False)

    def logits(self, kv: KvRows, tokens: list[int], starts: list[int], *, slots: list[int]) -> torch.Tensor:
        """The logits behind each row's token, fp32.  # (n, V)

        Args:
            kv: Room is reserved.
            tokens: The new token of each row.
            starts: How many tokens each row has.
            slots: Each row's slot of the bank.
        """
        import torch

        self._bank.choose_by_index(slots, places=kv.size[0])
        with torch._dynamo.config.patch(recompile_limit=MAX_GRAPHS):
            return kv.decode(self._forward, tokens, starts)
