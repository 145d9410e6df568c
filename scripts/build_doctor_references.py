"""Compute the references of `qlora-kit doctor --train`: NF4, a Qwen2 and AdamW in fp64, by plain numpy and torch.

python scripts/build_doctor_references.py

Nothing here is taken from the kit's training or merging, from transformers, PEFT or bitsandbytes; only the inputs
(`qlora_kit/doctor/subject.py`) and the file format are shared. It is independent of them on purpose.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from qlora_kit.doctor import subject  # noqa: E402
from qlora_kit.doctor.references import TENSORS_FILE, VALUES_FILE, Reference, save_reference  # noqa: E402

Floats = NDArray[np.float64]

# The 16 values of NF4 (Dettmers et al. 2023, QLoRA, https://arxiv.org/abs/2305.14314, appendix E).
NF4 = np.array(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ]
)  # fmt: skip
BLOCK_SIZE = 64  # weights that share a scale
SCALE_BLOCK_SIZE = 256  # scales that share a scale of their own
# A value this near to the middle between two codes could be rounded either way in fp32 (spacing 1.2e-7 at 1).
MARGIN = 1e-6


@dataclass(frozen=True)
class Quantized:
    """One weight in NF4 with double quantization: codes (out_features, in_features), and the scale of each block."""

    codes: NDArray[np.uint8]
    scales: Floats

    def dequantized(self) -> Floats:
        """What a 4-bit layer computes with, (out_features, in_features)."""
        return (NF4[self.codes].reshape(-1, BLOCK_SIZE) * self.scales[:, None]).reshape(self.codes.shape)


def dynamic_map() -> Floats:
    """The 256 values of 8-bit dynamic quantization, ascending (Dettmers 2015, https://arxiv.org/abs/1511.04561).

    For each decimal exponent from -6 to 0, twice as many values as for the one below, evenly spaced between a tenth of
    the power of ten and the power itself; with both signs; and 0 and 1.
    """
    values = [0.0, 1.0]
    for place in range(7):
        edges = np.linspace(0.1, 1, 2**place + 1)
        middles = 10.0 ** (place - 6) * (edges[:-1] + edges[1:]) / 2
        values += [*middles, *-middles]
    return np.sort(values)


def nearest(values: Floats, codebook: Floats) -> NDArray[np.uint8]:
    """The index of the value of ``codebook`` that is nearest to each of ``values``.

    Raises:
        ValueError: A value lies so near to the middle between two codes that fp32 could decide otherwise.
    """
    middles = (codebook[:-1] + codebook[1:]) / 2
    margin = np.abs(values.reshape(-1, 1) - middles).min()
    if margin < MARGIN:
        raise ValueError(f"a value lies {margin:.1e} from the middle between two codes: change the subject's seed")
    return np.searchsorted(middles, values).astype(np.uint8)


def quantize(weight: Floats) -> Quantized:
    """NF4 with double quantization, as section 3 of the QLoRA paper has it.

    Blocks of 64 weights are divided by their largest magnitude. These scales, less their mean, are quantized to 8 bits
    in blocks of 256, each divided by its own largest magnitude, which stays unquantized.
    """
    blocks = weight.reshape(-1, BLOCK_SIZE)
    largest = np.abs(blocks).max(axis=1)  # (blocks,)
    codes = nearest(blocks / largest[:, None], NF4)
    mean = largest.mean()
    scales = np.empty_like(largest)
    for start in range(0, len(largest), SCALE_BLOCK_SIZE):
        centred = largest[start : start + SCALE_BLOCK_SIZE] - mean
        unit = np.abs(centred).max()
        table = dynamic_map()
        scales[start : start + SCALE_BLOCK_SIZE] = table[nearest(centred / unit, table)] * unit + mean
    return Quantized(codes.reshape(weight.shape), scales)


def loss_of(weights: Mapping[str, torch.Tensor], batch: subject.Batch) -> torch.Tensor:
    """Mean cross-entropy of a Qwen2 over the supervised tokens of a batch (https://arxiv.org/abs/2407.10671)."""
    ids, mask, labels = (torch.from_numpy(array) for array in (batch.input_ids, batch.attention_mask, batch.labels))
    hidden = weights["model.embed_tokens.weight"][ids]  # (B, T, H)
    for layer in range(subject.LAYERS):
        name = f"model.layers.{layer}"
        hidden = hidden + attention(
            weights, f"{name}.self_attn", _rms(hidden, weights, f"{name}.input_layernorm"), mask
        )
        normed = _rms(hidden, weights, f"{name}.post_attention_layernorm")
        gate, up = (normed @ weights[f"{name}.mlp.{part}_proj.weight"].T for part in ("gate", "up"))
        hidden = hidden + (gate * torch.sigmoid(gate) * up) @ weights[f"{name}.mlp.down_proj.weight"].T
    logits = _rms(hidden, weights, "model.norm") @ weights["lm_head.weight"].T  # (B, T, V)
    targets = labels[:, 1:]
    log_probabilities = torch.log_softmax(logits[:, :-1], dim=-1)
    picked = log_probabilities.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return -picked[targets != subject.IGNORED].mean()


def attention(weights: Mapping[str, torch.Tensor], name: str, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Causal grouped-query attention with rotary positions; ``mask`` (B, T) is 0 on padding. (B, T, H) in and out."""
    rows, length, _ = hidden.shape
    states = {}
    for part, heads in (("q", subject.HEADS), ("k", subject.KV_HEADS), ("v", subject.KV_HEADS)):
        flat = hidden @ weights[f"{name}.{part}_proj.weight"].T + weights[f"{name}.{part}_proj.bias"]
        states[part] = flat.reshape(rows, length, heads, subject.HEAD_DIM).transpose(1, 2)  # (B, heads, T, D)
    shared = subject.HEADS // subject.KV_HEADS
    query = _rotated(states["q"])
    key = _rotated(states["k"]).repeat_interleave(shared, dim=1)
    value = states["v"].repeat_interleave(shared, dim=1)
    scores = query @ key.transpose(2, 3) / subject.HEAD_DIM**0.5  # (B, heads, T, T)
    seen = torch.ones(length, length).tril().bool() & mask[:, None, None, :].bool()
    mixed = torch.softmax(scores.masked_fill(~seen, float("-inf")), dim=-1) @ value
    return mixed.transpose(1, 2).reshape(rows, length, subject.HIDDEN_SIZE) @ weights[f"{name}.o_proj.weight"].T


def _rotated(states: torch.Tensor) -> torch.Tensor:
    """RoPE (https://arxiv.org/abs/2104.09864): a head's halves are turned against each other, (B, heads, T, D)."""
    half = subject.HEAD_DIM // 2
    frequencies = subject.ROPE_THETA ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = torch.arange(states.shape[2], dtype=torch.float64)[:, None] * frequencies  # (T, D/2)
    first, second = states[..., :half], states[..., half:]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def _rms(hidden: torch.Tensor, weights: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
    variance = hidden.pow(2).mean(dim=-1, keepdim=True)
    return hidden / (variance + subject.RMS_EPSILON).sqrt() * weights[f"{name}.weight"]


def compute() -> Reference:
    """Quantize the subject, take its three steps, and keep what `doctor --train` measures."""
    weights = subject.base_weights()
    quantized = {module: quantize(weights[f"{module}.weight"]) for module in subject.linear_shapes()}
    fixed = {name: torch.from_numpy(array) for name, array in weights.items()}
    fixed |= {f"{module}.weight": torch.from_numpy(value.dequantized()) for module, value in quantized.items()}
    adapter = {name: torch.from_numpy(array).requires_grad_() for name, array in subject.adapter_weights().items()}
    optimizer = torch.optim.AdamW(
        adapter.values(), lr=subject.LEARNING_RATE, eps=subject.ADAM_EPSILON, weight_decay=0.0
    )
    losses: list[float] = []
    gradients: dict[str, Floats] = {}
    for batch in subject.batches():
        loss = loss_of(_adapted(fixed, adapter), batch)
        optimizer.zero_grad()
        loss.backward()
        losses.append(loss.item())
        gradients = gradients or {name: _gradient(tensor) for name, tensor in adapter.items()}
        optimizer.step()
    return Reference(
        inputs_sha256=subject.inputs_sha256(),
        made_with={"python": platform.python_version(), "numpy": np.__version__, "torch": torch.__version__},
        losses=tuple(losses),
        codebook=NF4,
        codes={module: value.codes for module, value in quantized.items()},
        scales={module: value.scales for module, value in quantized.items()},
        gradients=gradients,
        adapter={name: tensor.detach().numpy() for name, tensor in adapter.items()},
    )


def _adapted(fixed: Mapping[str, torch.Tensor], adapter: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """W + alpha/r · B·A for each adapted weight."""
    scaling = subject.LORA_ALPHA / subject.R
    sums = {
        f"{module}.weight": fixed[f"{module}.weight"]
        + scaling * adapter[f"{module}.lora_B"] @ adapter[f"{module}.lora_A"]
        for module in subject.linear_shapes()
    }
    return {**fixed, **sums}


def _gradient(tensor: torch.Tensor) -> Floats:
    if tensor.grad is None:
        raise ValueError("a tensor of the adapter got no gradient")
    return tensor.grad.detach().numpy().copy()


def main() -> None:
    """Write both files, and say how large they became."""
    torch.set_num_threads(1)  # the order of additions, and with it the last bits, stays the same
    save_reference(compute())
    for path in (VALUES_FILE, TENSORS_FILE):
        print(f"{path.relative_to(ROOT)}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
