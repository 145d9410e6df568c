"""Small random models of the families that GGUF files are written of, for several test modules."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from conftest import sentencepiece_kind
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.tokenization_utils_base import generate_merges

LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
MISTRAL_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% elif m['role'] == 'assistant' %} {{ m['content'] }}{{ eos_token }}"
    "{% else %}{{ raise_exception('no system turn') }}{% endif %}{% endfor %}"
)
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
}
CLASSES: dict[str, tuple[type[Any], type[Any]]] = {
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
}


def random_model(family: str, vocab_size: int, *, eos_token_id: int, **settings: Any) -> PreTrainedModel:
    """A model of two layers with random weights, biases and norms, all of which matter to its logits."""
    config_class, model_class = CLASSES[family]
    torch.manual_seed(0)
    config = config_class(**{**SIZES, "vocab_size": vocab_size, "eos_token_id": eos_token_id, **settings})
    model: PreTrainedModel = model_class(config).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.data.normal_(mean=0.0 if name.endswith("bias") else 1.0, std=0.2)
    return model


def save_base(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> Path:
    """The folder of a base, its weights in bf16."""
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def llama3_tokenizer(template: str) -> PreTrainedTokenizerFast:
    """Llama 3's in small: its split, words that are tokens are not merged, and BOS stands before a text."""
    from tokenizers import processors

    control = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    split = pre_tokenizers.Split(Regex(LLAMA3_PATTERN), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=control,
        show_progress=False,
    )
    tokenizer.train_from_iterator(["Hello world, this is the answer to your 12345 questions.\n"] * 4, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 0)]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=control[0], eos_token="<|eot_id|>")
    fast.chat_template = template
    return fast


def mistral_tokenizer(*, prefix: str = "prepend", whole: bool = True) -> PreTrainedTokenizerFast:
    """Mistral's in small, as converted from SentencePiece: a piece's id is its rank, each split of it is a merge.

    Args:
        prefix: ``prepend`` as a normalizer does it, else the scheme of a Metaspace pre-tokenizer.
        whole: Whether all merges are listed.
    """
    control = ["<unk>", "<s>", "</s>"]
    words = Tokenizer(models.BPE(unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=control, show_progress=False)
    words.train_from_iterator(
        ["[INST] Is this review positive, negative or neutral? [/INST] The answer is 12"] * 4, trainer
    )
    learned = json.loads(words.to_str())["model"]
    pieces = [name for name in learned["vocab"] if name not in control]
    names = [*control, *(f"<0x{byte:02X}>" for byte in range(256))]
    names += [*(piece for piece in pieces if len(piece) > 1), *(piece for piece in pieces if len(piece) == 1)]
    vocabulary = {name: number for number, name in enumerate(names)}
    merges = generate_merges(vocabulary, skip_tokens=control)
    kept = merges if whole else merges[1:]
    tokenizer = Tokenizer(models.BPE(vocabulary, kept, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.add_special_tokens(control)
    if prefix == "prepend":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prefix, split=False)
    return sentencepiece_kind(tokenizer, MISTRAL_TEMPLATE)
