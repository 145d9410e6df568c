"""Adapters that are more than LoRA pairs (DoRA, saved modules, trained tokens), through PEFT: one at a time, slower."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qlora_kit.adapter_loading import attach_adapter, detach_adapter
from qlora_kit.adapters import AdapterSnapshot

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


class PeftPath:
    """PEFT's wrappers around the base: adapters by slot, at most one of them active."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._peft: PeftModel | None = None
        self.slots: list[str] = []
        self._attempts = 0
        self._active: str | None = None
        self._is_known = True  # what PEFT's layers do now is `_active`

    def attach(self, adapter: AdapterSnapshot) -> str:
        """Put ``adapter`` on the base and return PEFT's name for it.

        PEFT never sees a user's name: some (train, keys, lora) clash with attributes of its modules.

        Raises:
            AdapterError: PEFT does not take it.
        """
        # A name that failed is not used again: PEFT may keep some of its settings.
        slot = f"slot-{self._attempts}"
        self._attempts += 1
        self._is_known = False
        self._peft = attach_adapter(self._model, self._peft, adapter, slot=slot)
        self.slots.append(slot)
        return slot

    def detach(self, slot: str) -> None:
        """Take an adapter off; with the last one PEFT's wrappers go."""
        self._is_known = False
        self.slots.remove(slot)
        detach_adapter(self._model, slot, is_last=not self.slots)
        if not self.slots:
            self._peft = None
            self._active, self._is_known = None, True

    def activate(self, slot: str | None) -> None:
        """Let the adapter in ``slot`` take part in what follows; None for no adapter."""
        if self._peft is None or (self._is_known and slot == self._active):
            return
        tuner = self._peft.base_model
        if slot is None:
            tuner.disable_adapter_layers()
        else:
            tuner.enable_adapter_layers()
            self._peft.set_adapter(slot)
        self._active, self._is_known = slot, True
