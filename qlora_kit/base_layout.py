"""What a base's configuration describes, its linear layers and 4-bit layers, and whether the files hold that."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_kit.architecture import FAMILIES, read_architecture
from qlora_kit.base_files import BaseRef, read_model_config
from qlora_kit.errors import BaseModelError
from qlora_kit.prequantized import described_shapes, read_packed_weights, read_prequantization
from qlora_kit.safetensors_header import locate_tensors

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class BaseLayout:
    """The base's linear layers, as transformers builds them.

    Attributes:
        linear_shapes: (out_features, in_features) by module name, the head included.
        quantized: Those that are 4-bit layers once the base is loaded in 4 bits (transformers leaves the head, and
            whatever is tied, alone; a base that is quantized already names others in ``llm_int8_skip_modules``).
        tied: Modules whose weight is shared with another one.
    """

    linear_shapes: Mapping[str, tuple[int, int]]
    quantized: frozenset[str]
    tied: frozenset[str]


def read_layout(ref: BaseRef, *, four_bit: bool = True) -> BaseLayout:
    """The base's linear layers: transformers builds the model without weights, and its own quantizer chooses.

    Args:
        ref: The base.
        four_bit: Whether to ask which layers are quantized, which takes bitsandbytes; none of them otherwise.

    Raises:
        BaseModelError: transformers has no causal language model for the configuration.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with building_model(ref.path):
        config = AutoConfig.from_pretrained(ref.path, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        tied = {*model.all_tied_weights_keys, *model.all_tied_weights_keys.values()}
        linear = _linear_layers(model)
        quantized = _quantized_layers(model, config) if four_bit else frozenset()
    return BaseLayout(
        linear_shapes={name: (module.out_features, module.in_features) for name, module in linear.items()},
        quantized=quantized,
        tied=frozenset(name.removesuffix(".weight") for name in tied),
    )


@contextmanager
def building_model(folder: Path) -> Iterator[None]:
    """Around what transformers makes of a base's ``config.json``.

    Raises:
        BaseModelError: transformers has no causal language model for the configuration.
    """
    from huggingface_hub.errors import StrictDataclassError

    try:
        yield
    except (OSError, ValueError, KeyError, StrictDataclassError) as error:
        raise BaseModelError(
            f"{folder / 'config.json'}: transformers cannot build the model ({error})",
            expected="a causal language model that transformers itself has",
            fix="check the file, or upgrade transformers",
        ) from error


def _linear_layers(model: PreTrainedModel) -> dict[str, torch.nn.Linear]:
    import torch

    return {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}


def _quantized_layers(model: PreTrainedModel, config: PreTrainedConfig) -> frozenset[str]:
    """Those of an empty ``model`` that transformers' quantizer makes 4-bit layers of; it changes the model."""
    from bitsandbytes.nn import Linear4bit
    from transformers import BitsAndBytesConfig
    from transformers.quantizers import AutoHfQuantizer

    own = config.to_dict().get("quantization_config")
    settings = BitsAndBytesConfig(load_in_4bit=True) if own is None else own
    quantizer = AutoHfQuantizer.from_config(settings, pre_quantized=own is not None)
    quantizer.preprocess_model(model=model, device_map={"": "cpu"})
    return frozenset(name for name, module in _linear_layers(model).items() if isinstance(module, Linear4bit))


def require_described_shapes(ref: BaseRef) -> None:
    """Compare the files with ``config.json``: transformers 5.17 loads a 4-bit base of other shapes in silence.

    Raises:
        BaseModelError: A weight has another shape, or the quantization state of a 4-bit weight is not whole.
    """
    config = read_model_config(ref)
    found = described_shapes(locate_tensors(ref.path, error=BaseModelError))
    if config.get("model_type") not in FAMILIES:
        return
    planned = read_architecture(config, where=str(ref.path / "config.json")).tensors()
    wrong = [
        f"{name} is {list(shape)}, not {list(planned[name].shape)}"
        for name, shape in found.items()
        if name in planned and shape != planned[name].shape
    ]
    if wrong:
        raise BaseModelError(
            f"{ref.path}: the model cannot be loaded, {len(wrong)} weights have another shape: {wrong[0]}",
            expected="weights of the shapes that config.json describes",
            fix="check that config.json and the weights belong together",
        )


def require_described_packing(ref: BaseRef) -> bool:
    """Compare which weights are 4-bit in the files with ``config.json``; returns whether any are.

    Raises:
        BaseModelError: They disagree about which weights are quantized, or how.
    """
    held = read_prequantization(read_model_config(ref), where=str(ref.path / "config.json"))
    packed = read_packed_weights(locate_tensors(ref.path, error=BaseModelError))
    if held is None and not packed:
        return False
    expected = set() if held is None else {f"{module}.weight" for module in read_layout(ref).quantized}
    wrong = sorted({*(expected ^ packed.keys()), *(name for name in packed if packed[name].quantization != held)})
    if wrong:
        raise BaseModelError(
            f"{ref.path}: {len(wrong)} weights are not quantized as config.json says, the first is {wrong[0]}",
            expected="4-bit files of the weights, types and llm_int8_skip_modules that quantization_config describes",
            fix="check that config.json and the weights belong together",
        )
    return True


def prequantized_config(ref: BaseRef, dtype: torch.dtype) -> PreTrainedConfig | None:
    """The configuration that loads a base of 4-bit files to compute in ``dtype``; None for a base of plain weights.

    Raises:
        BaseModelError: ``config.json`` and the files disagree about which weights are quantized, or how.
    """
    from transformers import AutoConfig

    if not require_described_packing(ref):
        return None
    config = AutoConfig.from_pretrained(ref.path, local_files_only=True, trust_remote_code=False)
    name = str(dtype).removeprefix("torch.")
    config.quantization_config = {**config.quantization_config, "bnb_4bit_compute_dtype": name}
    return config
