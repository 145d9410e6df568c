"""Pretrain `tiny`: token stream in, trained Qwen2 model out; the held-out copy loss shows that it reads its context."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from scripts.tiny_corpus import mixture
from scripts.tiny_corpus.copying import heldout_copy_ids, periodic_token_ids, repeated_token_ids

VOCABULARY = 2_048
COPY_SEGMENT_TOKENS = 32
LOG_EVERY_STEPS = 20
SNAPSHOT_EVERY_STEPS = 400


@dataclass(frozen=True)
class Stage:
    """A part of a cycle.

    Attributes:
        steps: Optimizer steps.
        rows: Sequences in a step.
        length_tokens: Of each sequence.
        copy_rows: Of the rows, so many are random ids said again instead of text.
        copies: Makes such a row.
    """

    steps: int
    rows: int
    length_tokens: int
    copy_rows: int
    copies: Callable[[random.Random, int, int], list[int]]

    @property
    def text_tokens(self) -> int:
        """Tokens of text that the stage goes through."""
        return self.steps * (self.rows - self.copy_rows) * self.length_tokens

    @property
    def tokens(self) -> int:
        """Tokens of text and of random ids."""
        return self.steps * self.rows * self.length_tokens


@dataclass(frozen=True)
class Cycle:
    """Stages under one rise and fall of the learning rate, over text of one kind.

    Attributes:
        documents: Chunk number -> documents.
        stages: In order.
        decay_share: The learning rate falls to zero over this share of the steps.
    """

    documents: Callable[[int], list[str]]
    stages: tuple[Stage, ...]
    decay_share: float

    @property
    def steps(self) -> int:
        """Optimizer steps of all stages."""
        return sum(stage.steps for stage in self.stages)


# Looking back is taught first and alone: mixed with text, 4 M tokens did not teach it at all (copy loss 7.6). After the
# first cycle the model reads and copies, but an adapter of 8,000 reviews or 6,000 questions reached no more than
# accuracy 0.55 and exact match 0.15; the second cycle practises those skills densely, in a form of its own. In
# both cycles separators part what does not belong together; after them questions stayed at 0.72. The third practises
# across separators.
CYCLES = (
    Cycle(
        mixture.documents,
        (
            Stage(1_083, 32, 128, 32, periodic_token_ids),
            Stage(1_311, 32, 256, 3, repeated_token_ids),
            Stage(456, 16, 512, 1, repeated_token_ids),
        ),
        decay_share=0.4,
    ),
    Cycle(mixture.practice_documents, (Stage(700, 32, 256, 1, repeated_token_ids),), decay_share=0.6),
    Cycle(mixture.block_practice_documents, (Stage(300, 32, 256, 1, repeated_token_ids),), decay_share=0.6),
)
WARMUP_STEPS = 100
MUON_LEARNING_RATE = 4e-3
ADAMW_LEARNING_RATE = 3e-3


def new_model(seed: int) -> Qwen2ForCausalLM:
    """The untrained model: 256 wide, 5 layers, 4 query and 2 key/value heads of 64, tied head, 4.46 M parameters."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        rope_theta=10_000.0,
        use_cache=True,
    )
    return Qwen2ForCausalLM(config)


def optimizers(model: Qwen2ForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for embedding, norms and biases (https://kellerjordan.github.io/posts/muon)."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    muon = torch.optim.Muon(
        matrices, lr=MUON_LEARNING_RATE, weight_decay=0.01, momentum=0.95, adjust_lr_fn="match_rms_adamw"
    )
    adamw = torch.optim.AdamW(others, lr=ADAMW_LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0)
    return [muon, adamw]


def learning_rate_factor(step: int, cycle: Cycle) -> float:
    """Warm-up, plateau, then linear decay to zero over the last ``decay_share`` of the cycle."""
    decay_from = cycle.steps * (1 - cycle.decay_share)
    return min(1.0, (step + 1) / WARMUP_STEPS, max(0.0, (cycle.steps - step) / (cycle.steps - decay_from)))


def batches(stream: np.ndarray, cycle: Cycle, seed: int) -> Iterator[torch.Tensor]:
    """One ``(rows, length)`` batch of ids for each step; each part of the stream is seen once, blocks shuffled."""
    rng = np.random.default_rng(seed)
    copy_rng = random.Random(seed)
    position = 0
    for stage in cycle.stages:
        text_rows = stage.rows - stage.copy_rows
        count = stage.steps * text_rows
        blocks = stream[position : position + stage.text_tokens].reshape(count, stage.length_tokens)
        position += stage.text_tokens
        order = rng.permutation(count)
        for step in range(stage.steps):
            text = blocks[order[step * text_rows : (step + 1) * text_rows]].astype(np.int64)
            copies = [stage.copies(copy_rng, VOCABULARY, stage.length_tokens) for _ in range(stage.copy_rows)]
            yield torch.from_numpy(np.concatenate([text, np.array(copies, np.int64).reshape(-1, stage.length_tokens)]))


@torch.no_grad()
def copy_loss(model: Qwen2ForCausalLM, rows: int = 32) -> tuple[float, float]:
    """Mean loss on the first and on the second saying of held-out random segments, in nats per token.

    A model that cannot look back has the same loss on both: ln(2,048) = 7.6.
    """
    rng = random.Random("held-out copy loss")
    pairs = [heldout_copy_ids(rng, VOCABULARY, 2 * COPY_SEGMENT_TOKENS) for _ in range(rows)]
    ids = torch.tensor([row for row, _ in pairs])
    half = pairs[0][1]
    logits = model(input_ids=ids.to(model.device)).logits.float().cpu()
    losses = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    return losses[:, : half - 1].mean().item(), losses[:, half:].mean().item()


def pretrain(model: Qwen2ForCausalLM, stream: np.ndarray, cycle: Cycle, *, seed: int, work: Path) -> float:
    """Train one cycle in place; the log goes to ``work/log.jsonl``, snapshots to ``work/snapshot``.

    Returns:
        The mean loss of the last steps, in nats per token.
    """
    compiled = torch.compile(model)
    workers = optimizers(model)
    start_rates = [[group["lr"] for group in worker.param_groups] for worker in workers]
    model.train()
    began, running = time.monotonic(), 0.0
    with (work / "log.jsonl").open("a", encoding="utf-8") as log:
        for step, ids in enumerate(batches(stream, cycle, seed)):
            factor = learning_rate_factor(step, cycle)
            for worker, rates in zip(workers, start_rates, strict=True):
                for group, rate in zip(worker.param_groups, rates, strict=True):
                    group["lr"] = rate * factor
            ids = ids.to(model.device)
            with torch.autocast(model.device.type, dtype=torch.bfloat16):
                logits = compiled(input_ids=ids).logits
            loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for worker in workers:
                worker.step()
                worker.zero_grad()
            running = loss.item() if step == 0 else 0.95 * running + 0.05 * loss.item()
            if (step + 1) % LOG_EVERY_STEPS == 0 or step + 1 == cycle.steps:
                first, second = copy_loss(model)
                entry = {"step": step + 1, "loss": round(running, 4)}
                entry |= {"first_saying": round(first, 3), "copy_loss": round(second, 3)}
                entry |= {"seconds": round(time.monotonic() - began)}
                log.write(json.dumps(entry) + "\n")
                log.flush()
            if (step + 1) % SNAPSHOT_EVERY_STEPS == 0:
                model.save_pretrained(work / "snapshot")
    _round_as_shipped(model)
    return running


@torch.no_grad()
def _round_as_shipped(model: Qwen2ForCausalLM) -> None:
    """Round the weights to bf16, in which they are saved, and keep them in fp32."""
    for parameter in model.parameters():
        parameter.copy_(parameter.to(torch.bfloat16))
