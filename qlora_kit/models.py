"""The base model: load tokenizer and (4-bit) weights, attach LoRA, measure what a contract records."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING, Any

from qlora_kit.adapters import BaseFacts, base_fingerprint
from qlora_kit.base_files import BaseRef, read_model_config
from qlora_kit.base_layout import prequantized_config, require_described_shapes
from qlora_kit.config import LoraSection, QuantizationSection
from qlora_kit.data.chat import chat_template_sha256, stop_token_ids
from qlora_kit.errors import BaseModelError
from qlora_kit.four_bit import keep_4bit_weights_as_they_are, nf4_code_samples, refuse_wrong_cpu_layers
from qlora_kit.launched import index_on_this_machine
from qlora_kit.prequantized import agreed_quantization, described_shapes, read_prequantization
from qlora_kit.safetensors_header import locate_tensors

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FP32_BYTES = 4


def load_tokenizer(ref: BaseRef) -> PreTrainedTokenizerBase:
    """The base's tokenizer, padding on the left as decoding needs it.

    Raises:
        BaseModelError: It cannot be loaded, or has no vocabulary or no chat template.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            ref.path, local_files_only=True, trust_remote_code=False, padding_side="left"
        )
    except (OSError, ValueError) as error:
        raise BaseModelError(
            f"{ref.path}: the tokenizer cannot be loaded ({error})",
            expected="tokenizer.json and tokenizer_config.json beside the weights",
            fix="copy the base's tokenizer files into the folder",
        ) from error
    known = set(tokenizer("a model", add_special_tokens=False)["input_ids"]) - {tokenizer.unk_token_id}
    if not known:  # transformers 5.23 makes an empty vocabulary where the file is missing, without a word
        raise BaseModelError(
            f"{ref.path}: the tokenizer has no vocabulary: it turns a text into no tokens",
            expected="tokenizer.json (or tokenizer.model, or vocab.json and merges.txt) beside the weights",
            fix="copy the base's tokenizer files into the folder",
        )
    if not tokenizer.chat_template:
        raise BaseModelError(
            f"{ref.id}: the tokenizer has no chat template",
            expected="a chat template, since conversations are rendered with it",
            fix="use the instruct version of the base, or put its chat_template.jinja into the folder",
        )
    if tokenizer.pad_token is None:  # Llama has none; padding is never attended to and never supervised
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def default_device() -> torch.device:
    """The first GPU, of several processes on a machine each its own; the CPU where there is none."""
    import torch

    if not torch.cuda.is_available():
        return torch.device("cpu")
    local = index_on_this_machine()
    return torch.device("cuda") if local is None else torch.device("cuda", local)


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """The compute dtype; ``auto`` is bf16 where the GPU has it, fp16 on older ones, fp32 on a CPU."""
    import torch

    if name != "auto":
        return {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}[name]
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def base_quantization(ref: BaseRef, asked: QuantizationSection) -> QuantizationSection:
    """How a base is loaded: as asked for; where its files hold 4-bit weights already, as they hold them.

    Raises:
        BaseModelError: What was asked for by name is not what the files hold, or they are quantized in another way.
    """
    found = read_prequantization(read_model_config(ref), where=str(ref.path / "config.json"))
    return agreed_quantization(asked, found, where=ref.id)


def load_base_model(
    ref: BaseRef,
    quantization: QuantizationSection,
    *,
    device: torch.device | None = None,
    unquantized: Collection[str] = (),
    shardable: bool = False,
) -> PreTrainedModel:
    """The base on ``device``, its linear layers quantized to 4 bits while loading if ``quantization`` says so.

    The files of a base that is quantized already rule but for the compute dtype. Of a base's generation defaults only
    the special tokens stay: ``generation.Sampling`` alone says how tokens are chosen.

    Args:
        ref: The base.
        quantization: How to load it.
        device: None for the GPU where there is one.
        unquantized: Linear layers that stay as they are, by full name; none leaves the choice to transformers.
        shardable: Whether the 4-bit codes lie in the compute dtype, for FSDP, which takes no whole numbers.

    Raises:
        BaseModelError: transformers cannot load it, weights are missing (it would make them up), the 4-bit weights of
            its files are not whole, ``quantization`` asks for others, or the CPU would compute wrongly with them.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GenerationConfig

    quantization = base_quantization(ref, quantization)
    require_described_shapes(ref)
    device = default_device() if device is None else device
    dtype = compute_dtype(quantization.bnb_4bit_compute_dtype, device)
    config = prequantized_config(ref, dtype)
    settings = None
    if quantization.load_in_4bit and config is None:
        settings = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=quantization.bnb_4bit_quant_type,
            bnb_4bit_use_double_quant=quantization.bnb_4bit_use_double_quant,
            bnb_4bit_compute_dtype=dtype,
            bnb_4bit_quant_storage=dtype if shardable else torch.uint8,
            llm_int8_skip_modules=sorted(unquantized) or None,
        )
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            ref.path,
            config=config,
            quantization_config=settings,
            dtype=dtype,
            device_map={"": device},
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise BaseModelError(
            f"{ref.path}: the model cannot be loaded ({error})",
            expected="a complete causal language model in safetensors",
            fix="check that every shard is there and unbroken",
        ) from error
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise BaseModelError(
            f"{ref.path}: {len(missing)} weights are missing, the first is {missing[0]}",
            expected="every weight that config.json describes",
            fix="check that every shard is there and unbroken",
        )
    keep_4bit_weights_as_they_are(model, dtype)
    refuse_wrong_cpu_layers(model)
    if config is not None:
        _cast_unquantized(model, dtype)
    defaults = model.generation_config
    model.generation_config = GenerationConfig(
        bos_token_id=defaults.bos_token_id, eos_token_id=defaults.eos_token_id, pad_token_id=defaults.pad_token_id
    )
    return model


def linear_shapes(model: torch.nn.Module) -> dict[str, tuple[int, int]]:
    """Name of each linear layer of the base to its ``(out_features, in_features)``."""
    import torch

    return {
        name: (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }


def _cast_unquantized(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Give embeddings, norms and head of a base of 4-bit files the dtype that was asked for.

    transformers 5.23 leaves each tensor named ``weight`` of such a checkpoint in the dtype of its file, and the model
    would compute in that one.
    """
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


def quantization_facts(quantization: QuantizationSection, model: PreTrainedModel | None = None) -> dict[str, Any]:
    """The contract's ``quantization``; with the loaded ``model``, what is measured on it too."""
    facts: dict[str, Any] = {"load_in_4bit": quantization.load_in_4bit}
    if quantization.load_in_4bit:
        facts["bnb_4bit_quant_type"] = quantization.bnb_4bit_quant_type
        facts["bnb_4bit_use_double_quant"] = quantization.bnb_4bit_use_double_quant
    if model is not None:
        facts["prequantized"] = quantization.load_in_4bit and bool(model.hf_quantizer.pre_quantized)
        facts["bnb_4bit_compute_dtype"] = str(model.dtype).removeprefix("torch.")
        if quantization.load_in_4bit:
            facts["nf4_codes"] = nf4_code_samples(model)
    return facts


def base_facts(
    ref: BaseRef, tokenizer: PreTrainedTokenizerBase, quantization: Mapping[str, Any] | None = None
) -> BaseFacts:
    """What a contract is compared with: weights, template and stop tokens of the base at hand."""
    return BaseFacts(
        id=ref.id,
        revision=ref.revision,
        fingerprint=base_fingerprint(ref.path),
        chat_template_sha256=chat_template_sha256(tokenizer),
        stop_token_ids=stop_token_ids(tokenizer),
        quantization=quantization,
    )


def attach_lora(
    model: PreTrainedModel, lora: LoraSection, token_rows: Mapping[str, Sequence[int]] | None = None
) -> PeftModel:
    """A PEFT model with one new adapter, ``default``, whose weights are fp32.

    What EVA and LoftQ make of data and weights is up to ``training.initialising``; without it B is zero.

    Args:
        model: The base.
        lora: The configuration.
        token_rows: Module name to the token ids whose rows are trained too (``stop_token.choose_token_rows``).

    Raises:
        BaseModelError: A target module does not exist in the base.
    """
    from peft import EvaConfig, LoraConfig, get_peft_model

    kind = lora.init_lora_weights
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        target_modules=_as_peft(lora.target_modules),
        exclude_modules=_as_peft(lora.exclude_modules),
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        init_lora_weights=True if kind == "loftq" else kind,
        eva_config=EvaConfig(use_label_mask=False) if kind == "eva" else None,
        bias=lora.bias,
        modules_to_save=list(lora.modules_to_save) or None,
        trainable_token_indices={module: list(ids) for module, ids in token_rows.items()} if token_rows else None,
        rank_pattern=dict(lora.rank_pattern),
        alpha_pattern=dict(lora.alpha_pattern),
        task_type="CAUSAL_LM",
    )
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise BaseModelError(
            f"lora: no adapter can be attached ({error})",
            expected="lora.target_modules that name linear layers of the base",
            fix="use all-linear, or names from `qlora-kit info`",
        ) from error


def _as_peft(modules: str | tuple[str, ...] | None) -> str | list[str] | None:
    return list(modules) if isinstance(modules, tuple) else modules


def adapter_bytes_at_most(ref: BaseRef, lora: LoraSection) -> int:
    """Upper bound of the adapter's size in fp32, from the headers of the base's weight files.

    Every matrix is counted as adapted, whatever ``target_modules`` says, and modules to save with all their weights.

    Raises:
        BaseModelError: The weight files are damaged.
    """
    tensors = described_shapes(locate_tensors(ref.path, error=BaseModelError))
    r = max(lora.r, *lora.rank_pattern.values(), 0)
    pairs = sum(r * sum(shape) for shape in tensors.values() if len(shape) == 2)
    saved = sum(
        prod(shape) for name, shape in tensors.items() if name.rpartition(".")[0].endswith(lora.modules_to_save)
    )
    rows = 1 if lora.trainable_token_indices == "auto" else len(lora.trainable_token_indices or ())
    widest = max((shape[1] for shape in tensors.values() if len(shape) == 2), default=0)
    return FP32_BYTES * (pairs + saved + 2 * rows * widest)  # of the embedding and of the head


def trainable_parameters(model: torch.nn.Module) -> int:
    """How many numbers are trained."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
