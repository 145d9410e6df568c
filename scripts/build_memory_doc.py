"""Writes docs/memory.md and its plot: what QLoRA of the Qwen2.5 models takes by `plan`, and which cards hold it.

    python scripts/build_memory_doc.py [--check]

`--check` writes nothing and ends with 1 where docs/memory.md is not what it would write. The plot needs matplotlib.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

from qlora_kit.architecture import Architecture, read_architecture
from qlora_kit.config import LoraSection
from qlora_kit.memory.cards import CARDS, GIB, Card
from qlora_kit.memory.estimate import estimate
from qlora_kit.memory.planner import longest_length
from qlora_kit.memory.speed import tokens_per_second
from qlora_kit.memory.workload import Workload, lora_pairs

DOCS = Path(__file__).resolve().parent.parent / "docs"
DOCUMENT, PLOT = DOCS / "memory.md", DOCS / "memory.svg"
RANK = 16
# The config.json of Qwen/Qwen2.5-<size>-Instruct: hidden_size, intermediate_size, num_hidden_layers,
# num_attention_heads, num_key_value_heads, vocab_size, tie_word_embeddings.
QWEN2_5 = {
    "0.5B": (896, 4864, 24, 14, 2, 151_936, True),
    "1.5B": (1536, 8960, 28, 12, 2, 151_936, True),
    "3B": (2048, 11_008, 36, 16, 2, 151_936, True),
    "7B": (3584, 18_944, 28, 28, 4, 152_064, False),
    "14B": (5120, 13_824, 48, 40, 8, 152_064, False),
    "32B": (5120, 27_648, 64, 40, 8, 152_064, False),
}
CARD_NAMES = ("RTX 4060", "RTX 3060", "RTX 4080", "Tesla T4", "RTX 4090", "RTX 5090", "L40S", "A100 80GB")
HOST_CARDS = ("RTX 4060", "RTX 3060", "RTX 4080", "RTX 4090")
LENGTHS = (512, 1024, 2048, 4096, 8192, 16_384, 32_768)
PLOTTED_CARDS = (8, 12, 16, 24, 48, 80)
SPEED_CARDS = ("RTX 3060", "RTX 3090", "RTX 4090", "RTX 5090", "A100 80GB", "H100")


def architecture_of(size: str) -> Architecture:
    """The Qwen2.5 of a size."""
    hidden, inner, layers, heads, kv_heads, vocabulary, tied = QWEN2_5[size]
    config = {
        "model_type": "qwen2",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
        "max_position_embeddings": 32_768,
    }
    return read_architecture(config, where=size)


def run_of(
    size: str, *, length: int, checkpointing: bool = True, on_host: bool = False, card: Card | None = None
) -> Workload:
    """QLoRA of all linear layers, one row at a time, 8-bit AdamW."""
    architecture = architecture_of(size)
    return Workload(
        architecture=architecture,
        layers=lora_pairs(architecture, LoraSection(r=RANK)),
        batch_size=1,
        length=length,
        checkpointing=checkpointing,
        optim="paged_adamw_8bit",
        embedding_on_host=on_host,
        flash=card is None or card.bf16,
    )


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table whose first column is text and the others are numbers."""
    head = list(head)
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def peaks() -> str:
    """Peak by size and length, with and without checkpointing."""

    def cell(size: str, length: int) -> str:
        both = [estimate(run_of(size, length=length, checkpointing=kept)).peak_bytes / GIB for kept in (True, False)]
        return " / ".join(f"{peak:.1f}" for peak in both)

    return table(
        ["max_length", *QWEN2_5], ([f"{length:,}", *(cell(size, length) for size in QWEN2_5)] for length in LENGTHS)
    )


def longest() -> str:
    """The longest rows by card and size."""

    def cell(card: Card, size: str) -> str:
        lengths = [
            longest_length(run_of(size, length=1, checkpointing=kept, card=card), card.free_bytes)
            for kept in (True, False)
        ]
        return " / ".join(f"{length:,}" if length else "-" for length in lengths)

    return table(
        ["card", "GiB", *QWEN2_5],
        (
            [name, f"{CARDS[name].memory_bytes / GIB:.0f}", *(cell(CARDS[name], size) for size in QWEN2_5)]
            for name in CARD_NAMES
        ),
    )


def longest_on_host() -> str:
    """The longest rows with checkpointing, with the embedding on the host, of the sizes whose head is not tied."""
    sizes = [size for size in QWEN2_5 if not architecture_of(size).tied]

    def cell(card: Card, size: str) -> str:
        length = longest_length(run_of(size, length=1, on_host=True, card=card), card.free_bytes)
        return f"{length:,}" if length else "-"

    return table(
        ["card", "GiB", *sizes],
        (
            [name, f"{CARDS[name].memory_bytes / GIB:.0f}", *(cell(CARDS[name], size) for size in sizes)]
            for name in HOST_CARDS
        ),
    )


def ceilings() -> str:
    """Tokens a second by card, 7B, 2,048 tokens."""

    def cell(name: str, *, checkpointing: bool) -> str:
        run = run_of("7B", length=2048, checkpointing=checkpointing)
        return f"{tokens_per_second(run, CARDS[name]) or 0:,.0f}"

    return table(
        ["card", "with checkpointing", "without"],
        ([name, cell(name, checkpointing=True), cell(name, checkpointing=False)] for name in SPEED_CARDS),
    )


def document() -> str:
    """docs/memory.md."""
    return f"""# Memory

**Predicted, not measured.** Every figure here comes from the arithmetic of `qlora-kit plan`
(`python scripts/build_memory_doc.py`). On a CPU its parts are compared with counted bytes in tests
(`tests/test_memory_counts.py`); on a GPU nothing is measured yet (`benchmarks/memory_gpu.py` does it).

The runs: QLoRA of all linear layers, NF4 with double quantization, r = {RANK}, one row at a time, `paged_adamw_8bit`,
no validation data. For your own config:

```sh
qlora-kit plan configs/qwen2.5-7b-24gb.yaml --gpu "RTX 4090"    # or --gpu 24GiB; without --gpu: the card here
```

It says what each part takes, whether it fits, the longest `max_length`, and prints the lines to change. `train` makes
the same comparison with the memory that is free and the longest row that there is, and refuses what cannot fit.
`train.memory: auto` changes micro-batch, accumulation, checkpointing (of all, of some or of no layers) and the place of
the embedding instead; the rows of a step stay the same. `train.memory: ignore` tries anyway.

## Peak, in GiB: with checkpointing / without

{peaks()}

![Peak memory over the length of a row, by size of the model](memory.svg)

## The longest row that fits, in tokens: with checkpointing / without

{longest()}

`-`: the model does not fit. 32,768 is all that the models take. Of a T4 with error correction on, the driver shows only
15 GiB: plan with `--gpu 15GiB`. It has no flash attention, so that attention takes the square of the length.

With `train.embedding_on_host: true` the input embedding stays in host memory, and a micro-batch's rows are sent to the
GPU: 1.0 GiB less at 7B, 1.5 GiB at 14B and 32B. (Smaller Qwen2.5 use it as head too: it is refused
there, since nothing would be saved.) With checkpointing:

{longest_on_host()}

## The most tokens a second, Qwen2.5-7B, rows of 2,048 tokens

{ceilings()}

Operations over the data sheet's speed, and passes over the weights over its bandwidth. Real runs stay below it.

## What is counted

| part | bytes |
|---|---|
| linear layers | 0.5159 a weight in NF4 with double quantization, 0.5625 without, 2 in 16 bits |
| embedding, head, norms, biases | 2 a number; a tied head is the embedding |
| embedding on the host | none, but while the base is loaded; its rows of a micro-batch are the first checkpoint |
| adapter, gradients | 4 a trained number each: the kit's master weights are fp32 |
| optimizer | 8 a trained number with `adamw_torch`, about 2 with the 8-bit ones; paged state may move to the host |
| checkpoints | 2 · hidden size · checkpointed layers a token |
| activations of a block | 211 kB a token at 7B, of every block that is not checkpointed |
| the same, fused | 107 kB a token at 7B in 16 bits (`train.fast: on`; `auto` may leave it on a GPU), and no mask |
| a mask | padded rows or packing: 2 a cell of length × length for each block; packed rows are one long sequence |
| work of one block | gradients of the MLP's width and the largest weight dequantized, or the loss, whichever is more |
| loss | one tile of logits, 4,096 × 32,768 (TRL's chunked loss), never all logits |
| allowance | 5 % of what comes and goes, for fragmentation; 50 % on a CPU |
| margin | 5 % of the peak: so much must be free beside it, since a prediction may be too low |
| context | 0.5 GB for CUDA |

Not counted: `torch_compile`, Liger kernels, offloaded activations. Roughly counted: DoRA, label smoothing.
"""


def draw() -> None:
    """docs/memory.svg: both axes logarithmic, dashed lines for cards."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams |= {"svg.hashsalt": "memory", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10}
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    figure.patch.set_facecolor("white")
    for size, colour in zip(QWEN2_5, plt.get_cmap("viridis")([0, 0.18, 0.36, 0.54, 0.72, 0.9]), strict=True):
        for checkpointing, style in ((True, "-"), (False, ":")):
            runs = [run_of(size, length=length, checkpointing=checkpointing) for length in LENGTHS]
            values = [estimate(run).peak_bytes / GIB for run in runs]
            axes.plot(LENGTHS, values, style, color=colour, label=size if checkpointing else None, linewidth=1.8)
    for gib in PLOTTED_CARDS:
        axes.axhline(gib, color="0.75", linewidth=0.8, linestyle="--", zorder=0)
        axes.annotate(f"{gib} GiB", (LENGTHS[-1] * 1.04, gib), va="center", color="0.35", annotation_clip=False)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(LENGTHS, [f"{length:,}" for length in LENGTHS])
    axes.set_yticks((1, 2, 4, 8, 16, 32, 64), ["1", "2", "4", "8", "16", "32", "64"])
    axes.set_xlim(LENGTHS[0], LENGTHS[-1])
    axes.set_ylim(1, 128)
    axes.set_xlabel("tokens of a row (one row at a time)")
    axes.set_ylabel("predicted peak, GiB")
    axes.set_title("QLoRA of Qwen2.5, r = 16: solid with checkpointing, dotted without", fontsize=11)
    axes.legend(loc="upper left", ncols=2, framealpha=1, edgecolor="white")
    figure.savefig(PLOT, metadata={"Date": None, "Creator": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="only compare docs/memory.md")
    if parser.parse_args().check:
        if DOCUMENT.read_text(encoding="utf-8") != document():
            sys.exit("docs/memory.md is not what the planner says: run python scripts/build_memory_doc.py")
        return
    DOCUMENT.write_text(document(), encoding="utf-8")
    draw()


if __name__ == "__main__":
    main()
