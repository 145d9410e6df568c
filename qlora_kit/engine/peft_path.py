"""Adapters that are more than LoRA pairs (DoRA, biases, saved modules, tokens), through PEFT: one at a time, slower."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qlora_kit.adapter_loading import attach_adapter, detach_adapter, require_finite, trained_biases
from qlora_kit.adapters import AdapterSnapshot

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel


class PeftPath:
    """PEFT's wrappers around the base: adapters by slot, at most one of them active.

    The trained biases of an adapter stand in the base's modules while it is active, as parameters of their own: the
    base's wait beside them and are never written to.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._peft: PeftModel | None = None
        self.slots: list[str] = []
        self._attempts = 0
        self._active: str | None = None
        self._is_known = True  # what PEFT's layers do now is `_active`
        ends = ".bias"
        names = [name.removesuffix(ends) for name, _ in model.named_parameters() if name.endswith(ends)]
        self._owners = {name: model.get_submodule(name) for name in names}  # PEFT's wrappers keep them inside
        self._biases: dict[str, dict[str, torch.nn.Parameter]] = {}  # by slot, then by module
        self._displaced: dict[str, torch.nn.Parameter] = {}  # the base's, while others stand in their place

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
        self._use_biases({})
        biases = self._biases_of(adapter)
        self._peft = attach_adapter(self._model, self._peft, adapter, slot=slot)
        self._biases[slot] = biases
        self.slots.append(slot)
        return slot

    def detach(self, slot: str) -> None:
        """Take an adapter off; with the last one PEFT's wrappers go."""
        self._is_known = False
        self._use_biases({})
        del self._biases[slot]
        self.slots.remove(slot)
        if self._peft is not None and self.slots:  # PEFT looks at the settings of the active one whenever it switches
            self._peft.set_adapter(self.slots[0])
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
        self._use_biases({} if slot is None else self._biases[slot])
        self._active, self._is_known = slot, True

    def _biases_of(self, adapter: AdapterSnapshot) -> dict[str, torch.nn.Parameter]:
        """The adapter's biases, each as the base holds its own."""
        import torch

        biases = {}
        for name, trained in trained_biases(adapter).items():
            like = self._owners[name].get_parameter("bias")
            biases[name] = torch.nn.Parameter(trained.to(like.device, like.dtype), requires_grad=False)
        require_finite(adapter.files, {f"{name}.bias": bias for name, bias in biases.items()})
        return biases

    def _use_biases(self, biases: dict[str, torch.nn.Parameter]) -> None:
        """Put ``biases`` in the place of the base's, which come back everywhere else."""
        for name, own in self._displaced.items():
            self._owners[name].bias = own
        self._displaced = {name: self._owners[name].get_parameter("bias") for name in biases}
        for name, bias in biases.items():
            self._owners[name].bias = bias
