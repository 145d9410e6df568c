"""Where the weights of a new adapter begin: EVA from the activations of training rows, LoftQ from the 4-bit error.

Neither changes the base. PEFT's own LoftQ needs a GPU and leaves the adapter's scaling out, so it is done here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from qlora_kit.checkpoint import TensorSource
from qlora_kit.errors import BaseModelError, ConfigError
from qlora_kit.four_bit import dequantize

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftModel

EVA_BATCHES = 32
EVA_ROUNDS = 20
_PEFT_PREFIX = "base_model.model."


def initialise_with_eva(model: PeftModel, rows: Dataset, *, pad_token_id: int, seed: int) -> None:
    """Set each ``lora_A`` to the directions in which the layer's inputs vary most, and share the ranks out by them.

    EVA (Paischer et al. 2024, https://arxiv.org/abs/2410.07170), computed by PEFT: an incremental principal component
    analysis until it stands still, then layers whose inputs vary more get a higher rank (at most twice ``r``), others a
    lower one. The adapter's configuration afterwards says each layer's rank and alpha.

    Args:
        model: With a new adapter whose ``init_lora_weights`` is ``eva``.
        rows: Training rows, with ``input_ids``.
        pad_token_id: Fills shorter rows; never looked at.
        seed: Of the choice of rows.

    Raises:
        ConfigError: The rows hold too few tokens or too little variety, or the layers are too narrow for the rank.
    """
    from peft import initialize_lora_eva_weights
    from peft.tuners.lora import LoraLayer

    settings = model.peft_config["default"]
    components = round(max([settings.r, *settings.rank_pattern.values()]) * settings.eva_config.rho)
    sketch = 2 * components  # PEFT's randomised decomposition looks for so many directions
    narrowest = min(module.in_features for module in model.modules() if isinstance(module, LoraLayer))
    if sketch > narrowest:
        raise _no_eva(f"it needs layers of {sketch} inputs at least, four times the rank, and one has {narrowest}")
    batches = EvaBatches(rows, tokens=sketch, pad_token_id=pad_token_id, seed=seed)
    if not len(batches):
        raise _no_eva(f"it needs {sketch} tokens at least, four times the rank, and the training rows hold fewer")
    decoder = model.get_base_model().base_model  # without the head: no logits are needed
    initialize_lora_eva_weights(
        model,
        batches,
        forward_fn=lambda _, batch: decoder(**batch),
        gather_distributed_inputs=False,  # each process sees the same rows
        show_progress_bar=False,
    )


def _no_eva(reason: str) -> ConfigError:
    return ConfigError(
        f"lora.init_lora_weights: eva cannot begin: {reason}",
        expected="rows and layers in which so many directions can be found",
        fix="lower lora.r, give more varied training rows, or use another initialisation",
    )


class EvaBatches:
    """Training rows in random order, in batches of at least ``tokens`` tokens; gone through a limited number of times.

    PEFT goes through them until the directions stand still. They never do where inputs vary in fewer directions than
    are looked for.

    Args:
        rows: With ``input_ids``.
        tokens: Least number in a batch.
        pad_token_id: For shorter rows.
        seed: Of the order.
    """

    def __init__(self, rows: Dataset, *, tokens: int, pad_token_id: int, seed: int) -> None:
        self._batches: list[dict[str, torch.Tensor]] = []
        waiting: list[Sequence[int]] = []
        for index in torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist():
            waiting.append(rows[index]["input_ids"])
            if sum(map(len, waiting)) >= tokens:
                self._batches.append(_padded(waiting, pad_token_id))
                waiting = []
            if len(self._batches) == EVA_BATCHES:
                break

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for _ in range(EVA_ROUNDS):
            yield from self._batches
        raise _no_eva("the inputs of a layer vary in fewer directions than twice the rank")


def _padded(rows: Sequence[Sequence[int]], pad_token_id: int) -> dict[str, torch.Tensor]:
    longest = max(map(len, rows))
    return {
        "input_ids": torch.tensor([[*row, *[pad_token_id] * (longest - len(row))] for row in rows]),  # (B, T)
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows]),
    }


def initialise_with_loftq(model: PeftModel, base_folder: Path) -> None:
    """Set each adapter so that 4-bit weight + scaling · B·A comes nearest to the 16-bit weight at its rank.

    One step of LoftQ (Li et al. 2023, https://arxiv.org/abs/2310.08659); further steps would quantize the base anew,
    and the base is shared.

    Args:
        model: With a new adapter on a base in 4 bits.
        base_folder: The base's 16-bit weights.

    Raises:
        BaseModelError: A weight is missing or of another shape.
    """
    from peft.tuners.lora import Linear4bit

    with TensorSource(base_folder) as source, torch.no_grad():
        for name, module in model.named_modules():
            if not isinstance(module, Linear4bit):
                continue
            weight = module.get_base_layer().weight
            used = dequantize(weight.data, weight.quant_state).float()  # (out_features, in_features)
            original = _original(source, f"{name.removeprefix(_PEFT_PREFIX)}.weight", used)
            factor_a, factor_b = best_factors(original - used, module.r["default"])
            module.lora_A["default"].weight.copy_(factor_a)
            module.lora_B["default"].weight.copy_(factor_b / module.scaling["default"])


def _original(source: TensorSource, name: str, used: torch.Tensor) -> torch.Tensor:
    if source.shape(name) != tuple(used.shape):
        raise BaseModelError(
            f"{source.folder}: {name} has shape {source.shape(name)}, and the 4-bit weight {tuple(used.shape)}",
            expected="the 16-bit weights that the base was quantized from",
            fix="use the 16-bit base, or another lora.init_lora_weights than loftq",
        )
    return source.get(name).to(device=used.device, dtype=torch.float32)


def best_factors(matrix: torch.Tensor, r: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A (r, n) and B (m, r) of equal weight whose product B @ A is the best approximation of rank ``r`` (m, n).

    Eckart and Young's, from the eigenvectors of the smaller Gram matrix: at 3584 x 18944 that is far less work than a
    whole singular value decomposition.
    """
    if matrix.shape[0] > matrix.shape[1]:
        factor_b, factor_a = best_factors(matrix.T, r)
        return factor_a.T, factor_b.T
    left = torch.linalg.eigh(matrix @ matrix.T).eigenvectors[:, -r:].flip(1)  # (m, r), the largest first
    projected = left.T @ matrix  # (r, n): singular values times right vectors
    root = projected.norm(dim=1).clamp(min=torch.finfo(matrix.dtype).tiny).sqrt()  # (r,)
    return projected / root[:, None], left * root
