"""Fixtures that several test modules share; nothing here or in any test reaches for the network."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TRAINING_TEXT = (
    "The weather is nice today, is it not\n\nHello world, this is the answer to your question.\n"
    "system user assistant You are a helpful assistant. def total(values):\n    return sum(values)\n"
) * 4
CONTROL_TOKENS = {
    "qwen": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    "llama3": ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
}


def trl_template(name: str) -> str:
    """One of the chat templates that TRL ships, by file name without ending."""
    spec = importlib.util.find_spec("trl")
    assert spec is not None
    assert spec.origin is not None
    return (Path(spec.origin).parent / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


def byte_level_tokenizer(family: str, template: str, *, eos_token: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of about 400 tokens with a family's control tokens and one of TRL's templates."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(QWEN_PATTERN), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=CONTROL_TOKENS[family],
        show_progress=False,
    )
    tokenizer.train_from_iterator([TRAINING_TEXT], trainer)
    control = CONTROL_TOKENS[family]
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=control[0] if family == "llama3" else None,
        eos_token=eos_token,
        pad_token=control[0],
        additional_special_tokens=control,
    )
    fast.chat_template = trl_template(template)
    return fast


@pytest.fixture(scope="session")
def chatml_tokenizer() -> PreTrainedTokenizerFast:
    """Qwen2.5's tokenizer in small: its pre-tokenizer pattern, control tokens and chat template."""
    return byte_level_tokenizer("qwen", "qwen2_5", eos_token="<|im_end|>")


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    """Makes a small tokenizer: ``make_tokenizer(family, template, eos_token=...)``."""
    return byte_level_tokenizer


@pytest.fixture(scope="session")
def random_model(chatml_tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """A Qwen2 of two layers with random weights (seed 0) in fp32, whose outputs are far from uniform."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=len(chatml_tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        initializer_range=0.3,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Qwen2ForCausalLM(config).eval()


@pytest.fixture(scope="session")
def random_base(
    random_model: PreTrainedModel, chatml_tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The folder of a base model: ``random_model`` with ``chatml_tokenizer``."""
    folder = tmp_path_factory.mktemp("base")
    random_model.save_pretrained(folder)
    chatml_tokenizer.save_pretrained(folder)
    return folder
