"""The reference a merge is held against: the base and adapter as PEFT runs them, unmerged, in fp32 on the CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qlora_kit.adapters import BaseFacts
from qlora_kit.four_bit import dequantize, linear4bit_modules
from qlora_kit.merging.planning import MergePlan
from qlora_kit.models import load_base_model, quantization_facts

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer

ADAPTER_NAME = "default"


class Reference:
    """A live base + adapter, and the weights that they compute with.

    Args:
        plan: The merge.
        four_bit: Whether the base is quantized as the adapter was trained on it.

    Raises:
        AdapterError: The 4-bit codes at hand are not those of training.
    """

    def __init__(self, plan: MergePlan, *, four_bit: bool) -> None:
        import torch
        from peft import PeftModel

        by_codes = plan.base_match == "nf4_codes"
        quantization = plan.quantization.model_copy(
            update={"load_in_4bit": four_bit, "bnb_4bit_compute_dtype": "float32"}
        )
        model = load_base_model(
            plan.base,
            quantization,
            device=torch.device("cpu"),
            unquantized=plan.layout.linear_shapes.keys() - plan.layout.quantized if by_codes and four_bit else (),
        )
        if four_bit and plan.contract is not None:
            facts = quantization_facts(quantization, model)
            if by_codes:
                del facts["prequantized"]  # here the 16-bit model stands for the base of training
            plan.contract.require_match(
                BaseFacts(id=plan.contract.base.id, fingerprint=plan.contract.base.fingerprint, quantization=facts)
            )
        self.model: PeftModel = PeftModel.from_pretrained(model, str(plan.adapter.folder), adapter_name=ADAPTER_NAME)
        self.model.eval()
        self._linear = {
            _base_name(name): module
            for name, module in self.model.named_modules()
            if isinstance(module, torch.nn.Linear)
        }
        self._adapted = _lora_layers(self.model)
        self._four_bit = frozenset(linear4bit_modules(self.model))

    def base_used(self, module: str) -> torch.Tensor:
        """The weight of ``module`` before the adapter, as its layer uses it: fp32, (out_features, in_features)."""
        weight: Any = self._linear[module].weight
        if module in self._four_bit:
            return dequantize(weight.data, weight.quant_state).float()
        return weight.data.float()

    def delta(self, module: str) -> torch.Tensor:
        """PEFT's own Δ of ``module``: fp32, (out_features, in_features)."""
        return self._adapted[module].get_delta_weight(ADAPTER_NAME).detach().float()

    def trained_rows(self, module: str) -> torch.Tensor:
        """The rows of ``module`` that PEFT holds in place of the base's: fp32, (rows, hidden size)."""
        wrapper: Any = self.model.get_submodule(f"base_model.model.{module}")
        rows: torch.Tensor = wrapper.token_adapter.trainable_tokens_delta[ADAPTER_NAME].detach()
        return rows.float()


def _base_name(name: str) -> str:
    return name.removeprefix("base_model.model.").removesuffix(".base_layer")


def _lora_layers(model: PeftModel) -> dict[str, LoraLayer]:
    from peft.tuners.lora import LoraLayer

    return {_base_name(name): module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
