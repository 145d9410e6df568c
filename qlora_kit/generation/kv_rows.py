"""Keys and values of a batch whose rows come, grow and go by themselves: transformers' cache interface over one block.

Row i lies at place i of every layer's block, its tokens from the left. A step writes each row's new tokens behind its
own; what lies further right is never attended to. The last column takes what padding writes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from qlora_kit.errors import BaseModelError

COLUMNS = 64
"""Blocks grow by multiples of this many tokens."""


def columns_for(length: int) -> int:
    """Columns of a block whose longest row has ``length`` tokens; the last one is for padding."""
    return -(-(length + 1) // COLUMNS) * COLUMNS


@dataclass(frozen=True)
class StoredRow:
    """A row's keys and values, a pair for each layer, (kv heads, T, head dim) each."""

    layers: tuple[tuple[torch.Tensor, torch.Tensor], ...]

    @property
    def bytes(self) -> int:
        """Memory that they take."""
        return sum(tensor.nbytes for pair in self.layers for tensor in pair)


@dataclass
class _Step:
    """Where one forward pass writes: rows ``first`` to ``last``, each token at its column; ``length`` is read."""

    first: int
    last: int
    columns: torch.Tensor  # (n, T)
    length: int


class _Layer(CacheLayerMixin):
    """One layer's block: keys and values, (rows, kv heads, columns, head dim) each."""

    keys: torch.Tensor | None
    values: torch.Tensor | None

    def __init__(self, owner: KvRows) -> None:
        super().__init__()
        self.owner = owner

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        _, heads, _, dim = key_states.shape
        value_heads, value_dim = value_states.shape[1], value_states.shape[3]
        rows, columns = self.owner.size
        # Zeros: what is masked still takes part in the product with V, and 0 times NaN is NaN.
        self.keys = key_states.new_zeros(rows, heads, columns, dim)
        self.values = value_states.new_zeros(rows, value_heads, columns, value_dim)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write each row's new tokens; returns all of its tokens.  # (n, kv heads, length, head dim)"""
        if self.keys is None or self.values is None:
            self.lazy_initialization(key_states, value_states)
        step = self.owner.step
        if step is None or self.keys is None or self.values is None:
            raise RuntimeError("a forward pass outside KvRows.forward")
        found = []
        rows = torch.arange(step.last - step.first, device=key_states.device)[:, None]  # (n, 1)
        for block, new in ((self.keys, key_states), (self.values, value_states)):
            view = block[step.first : step.last]
            view.transpose(1, 2)[rows, step.columns] = new.transpose(1, 2)  # (n, T, heads, dim)
            found.append(view[:, :, : step.length])
        return found[0], found[1]

    def get_seq_length(self) -> int:
        return 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.owner.size[1], 0

    def get_max_length(self) -> int:
        return -1


class KvRows:
    """The cache of one batch, and the forward passes that use it."""

    def __init__(self, model: Any) -> None:
        """Begin without rows.

        Raises:
            BaseModelError: The base has layers that keep something else than keys and values of all tokens.
        """
        self._model = model
        config = model.config.get_text_config()
        settings = config.to_dict()
        kinds = set(settings.get("layer_types") or ())
        if unknown := kinds - {"full_attention", "sliding_attention"}:
            raise BaseModelError(
                f"the base has layers of the kind {', '.join(sorted(unknown))}",
                expected="attention over all tokens, or over a sliding window",
                fix="use another base: Qwen2, Qwen2.5, Qwen3, Llama and Mistral are tested",
            )
        self._kinds = kinds
        self._window: int | None = settings.get("sliding_window")
        self._layers = [_Layer(self) for _ in range(config.num_hidden_layers)]
        self._cache = Cache(layers=list(self._layers))
        self.size = (0, 0)  # rows, columns
        self.step: _Step | None = None
        heads = settings.get("num_key_value_heads") or config.num_attention_heads
        width = settings.get("head_dim") or config.hidden_size // config.num_attention_heads
        self.token_bytes: int = 2 * config.num_hidden_layers * heads * width * model.dtype.itemsize

    @property
    def bytes(self) -> int:
        """Memory of the block."""
        rows, columns = self.size
        return rows * columns * self.token_bytes

    def reserve(self, rows: int, length: int, *, most_bytes: int) -> None:
        """Make room for ``rows`` rows of ``length`` tokens, and for more to come; what they hold stays.

        Args:
            rows: All that hold tokens, and those to come.
            length: The longest of them.
            most_bytes: Room for more is left out where the block would then be larger.
        """
        held_rows, held_columns = self.size
        if rows <= held_rows and length < held_columns:
            return
        if rows > held_rows:
            held_rows = max(rows, 2 * held_rows)
        if length >= held_columns:
            held_columns = columns_for(max(length, held_columns + held_columns // 2))
        spared = held_rows * held_columns * self.token_bytes
        self.resize(*((held_rows, held_columns) if spared <= most_bytes else (rows, columns_for(length))))

    def resize(self, rows: int, columns: int) -> None:
        """Give the block this size; what lies in it of the first rows and columns stays."""
        held_rows, held_columns = self.size
        self.size = (min(rows, held_rows), min(columns, held_columns))  # of every layer, where memory runs out half way
        for layer in self._layers:
            for name in ("keys", "values"):
                old: torch.Tensor | None = vars(layer)[name]
                if old is not None:
                    new = old.new_zeros(rows, old.shape[1], columns, old.shape[3])
                    part = old[:rows, :, :columns]
                    new[: part.shape[0], :, : part.shape[2]] = part
                    setattr(layer, name, new)
        self.size = (rows, columns)

    def release(self) -> None:
        """Give all memory back."""
        self.size = (0, 0)
        for layer in self._layers:
            layer.keys = layer.values = None
            layer.is_initialized = False

    def forward(self, first: int, tokens: Sequence[Sequence[int]], starts: Sequence[int]) -> torch.Tensor:
        """Feed tokens to rows ``first``, ``first`` + 1, …; room must be reserved.

        Args:
            first: The first of the rows.
            tokens: New tokens of each row, at least one; shorter ones are padded on the left.
            starts: How many tokens each row has.

        Returns:
            The logits behind each row's last token, fp32.  # (n, V)
        """
        device = self._model.device
        longest = max(map(len, tokens))
        pads = torch.tensor([longest - len(row) for row in tokens])[:, None]  # (n, 1)
        ids = torch.tensor([[0] * (longest - len(row)) + list(row) for row in tokens])  # (n, T)
        places = torch.tensor(starts)[:, None] + torch.arange(longest) - pads  # (n, T), the tokens' positions
        is_token = torch.arange(longest) >= pads  # (n, T)
        length = max(start + len(row) for start, row in zip(starts, tokens, strict=True))
        columns = torch.where(is_token, places, self.size[1] - 1).to(device)
        positions = torch.where(is_token, places, 0).to(device)  # padding looks at column 0 alone
        self.step = _Step(first, first + len(tokens), columns, length)
        try:
            with torch.inference_mode():
                output = self._model(
                    input_ids=ids.to(device),
                    attention_mask=self._masks(positions, length),
                    position_ids=positions,
                    past_key_values=self._cache,
                    use_cache=True,
                    logits_to_keep=1,
                )
        finally:
            self.step = None
        logits: torch.Tensor = output.logits[:, -1].float()
        return logits

    def _masks(self, positions: torch.Tensor, length: int) -> Any:
        """What each token may attend to, as an addend: (n, 1, T, length); by kind of layer where there are two."""
        place = torch.arange(length, device=positions.device)
        ahead = place > positions[:, :, None]  # (n, T, length)
        if self._window is None:
            return self._addend(ahead)
        near = self._addend(ahead | (place <= positions[:, :, None] - self._window))
        if not self._kinds:  # every layer has the window
            return near
        return {"full_attention": self._addend(ahead), "sliding_attention": near}

    def _addend(self, hidden: torch.Tensor) -> torch.Tensor:
        dtype = self._model.dtype
        mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
        return mask.masked_fill_(hidden, torch.finfo(dtype).min)[:, None]

    def decode(self, compiled: Callable[..., Any], tokens: Sequence[int], starts: Sequence[int]) -> torch.Tensor:
        """One token for each of the first rows; every place and column takes part, so that only ``size`` is a shape.

        Args:
            compiled: The model, compiled for shapes that stay.
            tokens: The new token of each row.
            starts: How many tokens each row has.

        Returns:
            The logits behind each token, fp32.  # (n, V)
        """
        device, (rows, columns) = self._model.device, self.size
        idle = rows - len(tokens)  # they write into the last column and look at column 0 alone
        ids = torch.tensor([*tokens, *[0] * idle], device=device)[:, None]  # (rows, 1)
        positions = torch.tensor([*starts, *[0] * idle], device=device)[:, None]
        written = torch.tensor([*starts, *[columns - 1] * idle], device=device)[:, None]
        self.step = _Step(0, rows, written, columns)
        try:
            with torch.inference_mode():
                output = compiled(
                    input_ids=ids,
                    attention_mask=self._masks(positions, columns),
                    position_ids=positions,
                    past_key_values=self._cache,
                    use_cache=True,
                    logits_to_keep=1,
                )
                # A copy: a CUDA graph writes over its output in the next step.
                return output.logits[: len(tokens), -1].to(torch.float32, copy=True)
        finally:
            self.step = None

    def move(self, source: int, target: int, length: int) -> None:
        """Row ``source`` takes the place of row ``target``."""
        for layer in self._layers:
            for block in (layer.keys, layer.values):
                if block is not None and source != target:
                    block[target, :, :length] = block[source, :, :length]

    def store(self, row: int, length: int) -> StoredRow:
        """A copy of a row's first ``length`` tokens."""
        layers = []
        for layer in self._layers:
            if layer.keys is None or layer.values is None:
                raise RuntimeError("nothing was written yet")
            layers.append((layer.keys[row, :, :length].clone(), layer.values[row, :, :length].clone()))
        return StoredRow(tuple(layers))

    def restore(self, row: int, stored: StoredRow, length: int) -> None:
        """Begin ``row`` with the first ``length`` tokens of ``stored``."""
        for layer, (keys, values) in zip(self._layers, stored.layers, strict=True):
            if layer.keys is None or layer.values is None:
                layer.lazy_initialization(keys[None], values[None])
            for block, part in ((layer.keys, keys), (layer.values, values)):
                if block is not None:
                    block[row, :, :length] = part[:, :length]

    def clear(self, row: int) -> None:
        """Forget a row whose values are not finite: they would reach the row that comes next."""
        for layer in self._layers:
            for block in (layer.keys, layer.values):
                if block is not None:
                    block[row].zero_()
