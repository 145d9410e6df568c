"""Fixtures that several test modules share; nothing here or in any test reaches for the network."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import importlib.util
import json
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from qlora_kit.training import TrainingProgress, TrainResult

_CACHE = tempfile.TemporaryDirectory(prefix="qlora-kit-tests-")
os.environ["QLORA_KIT_CACHE"] = _CACHE.name

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


def sentencepiece_tokenizer(template: str) -> PreTrainedTokenizerFast:
    """As Llama 2's and Mistral's: a space is a letter, ``▁``, and stands before each stretch without control tokens."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    control = ["<unk>", "<s>", "</s>"]
    words = Tokenizer(models.BPE(unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=control, show_progress=False)
    words.train_from_iterator(["[INST] Is this review positive, negative or neutral? [/INST] The answer"] * 4, trainer)
    learned = json.loads(words.to_str())["model"]
    merges = [tuple(pair) for pair in learned["merges"]]
    names = [*control, *(f"<0x{byte:02X}>" for byte in range(256))]  # any other character is spelt in bytes
    names += [name for name in learned["vocab"] if name not in control]
    vocabulary = {name: index for index, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.add_special_tokens(control)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return sentencepiece_kind(tokenizer, template)


def sentencepiece_kind(tokenizer: Tokenizer, template: str) -> PreTrainedTokenizerFast:
    """The tokenizer with SentencePiece's way back to text, Llama 2's special tokens and a chat template."""
    from tokenizers import decoders
    from transformers import PreTrainedTokenizerFast

    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token=None
    )
    fast.chat_template = template
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
def make_sentencepiece_tokenizer() -> Callable[[str], PreTrainedTokenizerFast]:
    """Makes a small tokenizer of the SentencePiece kind with a chat template."""
    return sentencepiece_tokenizer


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


REVIEW_WORDS = {
    "positive": "good nice great lovely",
    "negative": "bad cold slow awful",
    "neutral": "round red here plain",
}


@pytest.fixture(scope="session")
def run_yaml(random_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sentiment config on ``random_base`` with 48 / 9 / 6 short rows beside it; one epoch is 6 steps."""
    folder = tmp_path_factory.mktemp("reviews")
    things = ["soup", "room", "film", "walk", "game", "town", "book"]
    rows = [
        {"text": f"The {thing} is {word}.", "label": label}
        for thing in things
        for place in range(4)
        for label, words in REVIEW_WORDS.items()
        for word in [words.split()[place]]
    ]
    for name, chosen in (("train", rows[:48]), ("validation", rows[48:57]), ("test", rows[57:63])):
        lines = "".join(json.dumps(row) + "\n" for row in chosen)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    config = folder / "run.yaml"
    config.write_text(
        f"name: reviews\ntask: sentiment\nmodel: {{base: {random_base}}}\nlora: {{r: 4, lora_alpha: 8}}\n"
        f"data: {{train: {folder}/train.jsonl, validation: {folder}/validation.jsonl, test: {folder}/test.jsonl}}\n"
        "train: {max_length: 256, per_device_train_batch_size: 8, learning_rate: 1.0e-2, num_train_epochs: 2,\n"
        "  logging_steps: 1, warmup_steps: 0}\n"
        "eval: {max_new_tokens: 4}\n",
        encoding="utf-8",
    )
    return config


@pytest.fixture(scope="session")
def trained_run(run_yaml: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TrainResult]:
    """The folder of a run of ``run_yaml`` and its result: 12 steps, two evaluations. Not to be changed."""
    from qlora_kit.config import load_config
    from qlora_kit.training import train

    folder = tmp_path_factory.mktemp("runs") / "reviews"
    return folder, train(load_config(run_yaml, [f"output_dir={folder}"]))


@pytest.fixture(scope="session")
def merged_run(trained_run: tuple[Path, TrainResult], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That run's adapter merged into the 4-bit base it was trained on, verified. Read only."""
    from qlora_kit.merging import merge_adapter

    folder = tmp_path_factory.mktemp("merges") / "merged"
    merge_adapter(trained_run[0], folder, onto="dequantized", device="cpu")
    return folder


@pytest.fixture
def start_run(run_yaml: Path, tmp_path: Path) -> Callable[..., TrainResult]:
    """Trains ``run_yaml`` with overrides into ``tmp_path/NAME``: ``start_run(*overrides, name=..., resume=...)``."""
    from qlora_kit.config import load_config
    from qlora_kit.training import train

    def start(*overrides: str, name: str = "run", **options: Any) -> TrainResult:
        return train(load_config(run_yaml, [f"output_dir={tmp_path / name}", *overrides]), **options)

    return start


@pytest.fixture
def stop_at() -> Callable[[int], Callable[[TrainingProgress], None]]:
    """Makes a progress function that sends this process SIGINT after a step."""

    def at(step: int) -> Callable[[TrainingProgress], None]:
        sent: list[int] = []

        def watch(progress: TrainingProgress) -> None:
            if progress.step == step and not sent:
                sent.append(step)
                os.kill(os.getpid(), signal.SIGINT)

        return watch

    return at
