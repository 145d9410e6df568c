"""Make the embedded base `tiny`: text from fixed seeds, tokenizer, pretraining, and the folder that the package ships.

    python scripts/build_tiny_base.py --work /tmp/tiny

Needs torch, transformers and a C++ compiler (torch.compile). About 50 minutes on two cores with AVX512-BF16.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers  # noqa: E402
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen2ForCausalLM  # noqa: E402

from scripts.tiny_corpus import mixture, pretraining  # noqa: E402

OUT = ROOT / "qlora_kit" / "bases" / "tiny"
SEED = 20
SPECIAL_TOKENS = [mixture.END_OF_TEXT, mixture.BLOCK_START, mixture.BLOCK_END]
TOKENIZER_CHUNKS = 12
# The pre-tokenizer of Qwen2.5's tokenizer.json.
QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """A byte-level BPE tokenizer built as Qwen2.5's is: NFC, the same pattern, special tokens last."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    for token in SPECIAL_TOKENS:
        texts = [text.replace(token, "\n") for text in texts]
    trainer = trainers.BpeTrainer(
        vocab_size=pretraining.VOCABULARY - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    return tokenizer


def wrap_tokenizer(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """The transformers tokenizer, with Qwen2.5's chat template as TRL ships it."""
    trl = find_spec("trl")
    if trl is None or trl.origin is None:
        raise SystemExit("trl is not installed; it carries Qwen2.5's chat template")
    template = (Path(trl.origin).parent / "chat_templates" / "qwen2_5.jinja").read_text()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=mixture.BLOCK_END,
        pad_token=mixture.END_OF_TEXT,
        chat_template=template,
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )


def encode_stream(tokenizer: Tokenizer, cycle: pretraining.Cycle) -> tuple[np.ndarray, int]:
    """Ids of a cycle's text, chunk after chunk, at least as many as it needs; and how many chunks that took."""
    needed = sum(stage.text_tokens for stage in cycle.stages)
    parts: list[np.ndarray] = []
    total, chunk = 0, 0
    with ProcessPoolExecutor(2) as pool:
        while total < needed:
            for texts in pool.map(cycle.documents, range(chunk, chunk + 8)):
                for encoding in tokenizer.encode_batch(texts):
                    parts.append(np.array(encoding.ids, np.uint16))
                    total += len(parts[-1])
            chunk += 8
    print(f"{total:,} tokens from {chunk:,} chunks of {mixture.DOCUMENTS_A_CHUNK:,} documents", flush=True)
    return np.concatenate(parts), chunk


def save(trained: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write bf16 safetensors, config, generation config and tokenizer; the model itself stays in fp32."""
    model = copy.deepcopy(trained)
    ids = tokenizer.convert_tokens_to_ids
    end_of_text, block_end = ids(mixture.END_OF_TEXT), ids(mixture.BLOCK_END)
    model.to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    model.config.eos_token_id = block_end
    model.config.pad_token_id = model.config.bos_token_id = end_of_text
    model.generation_config = GenerationConfig(
        eos_token_id=[block_end, end_of_text], pad_token_id=end_of_text, bos_token_id=end_of_text, do_sample=False
    )
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def write_card(out: Path, figures: dict[str, Any]) -> None:
    """The model card, with the figures of the run that made the weights; they stand in ``pretraining.json`` too."""
    (out / "pretraining.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    template = Path(pretraining.__file__).with_name("model_card.md").read_text(encoding="utf-8")
    card = template.format(
        **figures,
        millions=figures["tokens"] / 1e6,
        minutes=figures["seconds"] / 60,
        architecture=config["architectures"][0],
        layers=config["num_hidden_layers"],
        hidden=config["hidden_size"],
        intermediate=config["intermediate_size"],
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
    )
    (out / "README.md").write_text(card, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument(
        "--work", type=Path, required=True, help="scratch folder for the token stream, log and snapshots"
    )
    parser.add_argument("--from-cycle", type=int, default=0, help="go on from --out with this cycle (counted from 0)")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)

    texts = [text for chunk in range(TOKENIZER_CHUNKS) for text in mixture.documents(chunk)]
    tokenizer = train_tokenizer(texts)
    wrapped = wrap_tokenizer(tokenizer)
    if arguments.from_cycle:
        model = Qwen2ForCausalLM.from_pretrained(arguments.out, dtype=torch.float32)
        figures = json.loads((arguments.out / "pretraining.json").read_text(encoding="utf-8"))
    else:
        model, figures = pretraining.new_model(SEED), {"tokens": 0, "seconds": 0, "chunks": []}
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    for cycle in pretraining.CYCLES[arguments.from_cycle :]:
        stream, chunks = encode_stream(tokenizer, cycle)
        began = time.monotonic()
        figures["loss"] = pretraining.pretrain(model, stream, cycle, seed=SEED, work=arguments.work)
        figures["first_saying"], figures["copy_loss"] = pretraining.copy_loss(model)
        figures["seconds"] += round(time.monotonic() - began)
        figures["tokens"] += sum(stage.tokens for stage in cycle.stages)
        figures["chunks"].append(chunks)
        save(model, wrapped, arguments.out)
        write_card(arguments.out, figures)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
