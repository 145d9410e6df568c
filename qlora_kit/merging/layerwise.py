"""A model's logits with one layer's weights in memory at a time: a configuration and a source of weights in."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from qlora_kit.base_layout import building_model
from qlora_kit.checkpoint import TensorSpec
from qlora_kit.errors import BaseModelError
from qlora_kit.host_memory import give_back_freed_memory
from qlora_kit.merging.tensors import MergeTensors, Rows
from qlora_kit.safetensors_header import shown

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from qlora_kit.data.encoding import Encoded
    from qlora_kit.merging.planning import MergePlan

Adjust = Callable[[str, Sequence[int], "torch.Tensor"], "torch.Tensor"]
"""Called with a tensor's name, row numbers and these rows in fp32; gives the rows to compute with."""


class Weights(Protocol):
    """Where a model's tensors come from, by their names in its checkpoint."""

    def __contains__(self, name: object) -> bool:
        """Whether there is such a tensor."""

    def spec(self, name: str) -> TensorSpec:
        """Its dtype and shape."""

    def blocks(self, name: str) -> Iterator[Rows]:
        """Its rows from first to last."""

    def rows(self, name: str, ids: Sequence[int]) -> torch.Tensor:
        """Some of its rows in fp32: (len(ids), ...)."""


@dataclass(frozen=True)
class Sequences:
    """Token sequences, and at how many of each one's last positions logits are wanted.

    Attributes:
        ids: Token ids of each.
        kept: How many of each one's positions, counted from the last.
    """

    ids: Sequence[Sequence[int]]
    kept: Sequence[int]

    @classmethod
    def of_answers(cls, rows: Sequence[Encoded]) -> Sequences:
        """Rows with supervised answers, at the positions that predict these."""
        return cls([row.input_ids[:-1] for row in rows], [row.supervised_tokens for row in rows])

    @classmethod
    def within_memory(cls, ids: Sequence[Sequence[int]], *, vocabulary: int, max_bytes: int) -> Sequences:
        """``ids``, at so many of each one's last positions that all fp32 logits fit ``max_bytes``; one at least."""
        each = max(1, max_bytes // (4 * vocabulary * len(ids)))
        return cls(ids, [min(each, len(row)) for row in ids])


def plan_logits(
    plan: MergePlan, sequences: Sequences, *, four_bit: bool, with_adapter: bool = True, adjust: Adjust | None = None
) -> list[torch.Tensor]:
    """The logits of a plan's base, with the adapter or without, nothing written: as ``layerwise_logits``.

    Args:
        plan: Base and adapter.
        sequences: What to compute logits for.
        four_bit: Whether the weights that 4-bit layers hold go through their round trip.
        with_adapter: Whether the adapter is added, unrounded.
        adjust: Changes rows before they are computed with.
    """
    changes = plan.config if with_adapter else {}
    with MergeTensors(plan, four_bit=four_bit, with_adapter=with_adapter) as weights:
        return layerwise_logits(plan.base.path, weights, sequences, changes=changes, adjust=adjust, device=plan.device)


def layerwise_logits(
    folder: Path,
    weights: Weights,
    sequences: Sequences,
    *,
    changes: Mapping[str, Any] | None = None,
    adjust: Adjust | None = None,
    device: str = "cpu",
) -> list[torch.Tensor]:
    """The logits of a causal language model in fp32, as transformers computes them, layer by layer.

    All sequences go through a layer before the next one's weights are read. Of the embedding only the rows of the
    tokens are read, and the head is multiplied with a block of its rows at a time.

    Args:
        folder: Holds ``config.json``.
        weights: The model's tensors.
        sequences: What to compute logits for.
        changes: Keys of the configuration that are not as in the file.
        adjust: Changes rows before they are computed with.
        device: Where it is computed.

    Returns:
        For each sequence (kept positions, vocabulary), on the CPU.

    Raises:
        BaseModelError: The configuration cannot be used, or tensors are missing or have other shapes.
    """
    import torch

    model = _empty_model(folder, changes or {})
    names = _Names(weights, dict(model.all_tied_weights_keys), folder)
    selected = _stream_weights(model, names, adjust, device)
    longest = max(len(ids) for ids in sequences.ids)
    ids = torch.tensor([[*row, *([0] * (longest - len(row)))] for row in sequences.ids])  # (B, T)
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in sequences.ids])
    for index, (row, kept) in enumerate(zip(sequences.ids, sequences.kept, strict=True)):
        selected += [(index, position) for position in range(len(row) - kept, len(row))]
    with torch.no_grad():
        found = model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False)
    logits: torch.Tensor = found.logits[0].cpu()  # (S, V)
    return list(logits.split(list(sequences.kept)))


@dataclass(frozen=True)
class _Names:
    """Finds a parameter's tensor: its own, or the one that the configuration ties it to."""

    weights: Weights
    tied: Mapping[str, str]
    folder: Path

    def tensor_of(self, parameter: str, shape: Sequence[int]) -> str:
        name = self.tied.get(parameter, parameter)
        if name not in self.weights:
            what, expected = "there is no tensor", "every weight that config.json describes"
        elif tuple(self.weights.spec(name).shape) != tuple(shape):
            what, expected = f"{list(self.weights.spec(name).shape)} is the shape of", f"{list(shape)}"
        else:
            return name
        raise BaseModelError(
            f"{self.folder}: {what} {shown(name)}",
            expected=expected,
            fix="give a complete checkpoint of an architecture whose tensors are named as its modules",
        )


def _empty_model(folder: Path, changes: Mapping[str, Any]) -> PreTrainedModel:
    """The model without weights; what is computed from the configuration alone (rotary frequencies) is there."""
    import torch
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    with building_model(folder):
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        for key, value in changes.items():
            setattr(config.get_text_config(), key, value)
            setattr(config, key, value)
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model.eval()


def _stream_weights(model: PreTrainedModel, names: _Names, adjust: Adjust | None, device: str) -> list[tuple[int, int]]:
    """Make each module read its weights when it is called; returns the list of positions that the head will take."""
    import torch

    head = model.get_output_embeddings()
    modules = dict(model.named_modules())
    head_name = next((name for name, module in modules.items() if module is head), None)
    if head is None or head_name is None:
        raise BaseModelError(
            f"{names.folder}: the model has no head", expected="a causal language model", fix="choose another base"
        )
    for name, module in modules.items():
        for key, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, key, buffer.to(device))
        own = {key: parameter.shape for key, parameter in module.named_parameters(recurse=False)}
        if not own or module is head:
            continue
        tensors = {key: names.tensor_of(f"{name}.{key}", shape) for key, shape in own.items()}
        if isinstance(module, torch.nn.Embedding):
            module.register_forward_pre_hook(partial(_look_up, names.weights, tensors["weight"], adjust))
        else:
            module.register_forward_pre_hook(partial(_fill, names.weights, tensors, adjust, device))
        module.register_forward_hook(_empty)
    weight = names.tensor_of(f"{head_name}.weight", head.weight.shape)
    bias = None if head.bias is None else names.tensor_of(f"{head_name}.bias", head.bias.shape)
    selected: list[tuple[int, int]] = []
    model.set_output_embeddings(_streamed_head(names.weights, weight, bias, adjust, selected))
    return selected


def _whole(weights: Weights, name: str, adjust: Adjust | None) -> torch.Tensor:
    import torch

    whole = torch.empty(weights.spec(name).shape)
    flat = whole.view(-1, *whole.shape[1:]) if whole.dim() else whole.view(1)
    for rows in weights.blocks(name):
        flat[rows.start : rows.start + len(rows.result)] = _adjusted(name, rows, adjust)
    return whole


def _adjusted(name: str, rows: Rows, adjust: Adjust | None) -> torch.Tensor:
    found = rows.result.float()
    return found if adjust is None else adjust(name, range(rows.start, rows.start + len(found)), found)


def _parameter(values: torch.Tensor) -> torch.nn.Parameter:
    import torch

    return torch.nn.Parameter(values, requires_grad=False)


def _fill(
    weights: Weights,
    tensors: Mapping[str, str],
    adjust: Adjust | None,
    device: str,
    module: torch.nn.Module,
    inputs: Any,
) -> None:
    for key, name in tensors.items():
        setattr(module, key, _parameter(_whole(weights, name, adjust).to(device)))


def _look_up(
    weights: Weights, name: str, adjust: Adjust | None, module: torch.nn.Embedding, inputs: tuple[torch.Tensor, ...]
) -> tuple[torch.Tensor, ...]:
    """Give an embedding the rows of the tokens at hand, and the tokens as numbers of these rows."""
    import torch

    used, places = torch.unique(inputs[0], return_inverse=True)
    rows = weights.rows(name, used.tolist())
    rows = rows if adjust is None else adjust(name, used.tolist(), rows)
    module.weight = _parameter(rows.to(inputs[0].device))
    module.padding_idx = None  # it is a number of the whole embedding, and matters to gradients alone
    return (places, *inputs[1:])


def _empty(module: torch.nn.Module, inputs: Any, output: Any) -> None:
    for key, parameter in list(module.named_parameters(recurse=False)):
        setattr(module, key, _parameter(parameter.to("meta")))
    give_back_freed_memory()


def _streamed_head(
    weights: Weights, weight: str, bias: str | None, adjust: Adjust | None, selected: list[tuple[int, int]]
) -> torch.nn.Module:
    import torch

    class StreamedHead(torch.nn.Module):
        """The logits of the selected positions: (B, T, H) -> (1, S, V)."""

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            chosen = hidden[[row for row, _ in selected], [place for _, place in selected]]  # (S, H)
            logits = torch.empty(len(selected), weights.spec(weight).shape[0], device=hidden.device)
            for rows in weights.blocks(weight):
                part = _adjusted(weight, rows, adjust).to(hidden.device)
                torch.mm(chosen, part.T, out=logits[:, rows.start : rows.start + len(part)])
            if bias is not None:
                logits += _whole(weights, bias, adjust).to(hidden.device)
            return logits[None]

    return StreamedHead()
