"""Linear layers that add their rows' adapters: the base's own, by type and parameters, with a seat in the bank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit

from qlora_kit.errors import BaseModelError

KEPT_BYTES = 256 * 1024**2
_Pairs = Mapping[str, tuple[torch.Tensor, torch.Tensor]]
_Picked = tuple[torch.Tensor, tuple[torch.Tensor | None, ...]]  # (B, in, layers x r), and (B, r, out) each
_Change = tuple[torch.Tensor, torch.Tensor]  # (B, T, r) and (B, r, out)


@dataclass
class Choice:
    """The slots that the rows of a batch use.

    Attributes:
        rows: One slot for each row, or one for all rows, however many.
        is_kept: Whether anything is kept.
        kept: What the index picked, by the group's id, for the next step with the same rows; at most ``KEPT_BYTES``.
    """

    rows: tuple[int, ...] | int
    is_kept: bool
    kept: dict[int, _Picked] = field(default_factory=dict)
    kept_bytes: int = 0
    _index: torch.Tensor | None = None

    @property
    def count(self) -> int:
        """How many rows; 0 where the number is free."""
        return 0 if isinstance(self.rows, int) else len(self.rows)

    def index(self, device: torch.device) -> torch.Tensor:
        """The rows' slots as a tensor.  # (B,)"""
        if self._index is None:
            self._index = torch.tensor(self.rows, device=device)
        return self._index


class SharedInput:
    """Layers that get the same input: their adapters' A's stacked in one tensor, their B's in one each.

    Attributes:
        names: The layers' names in the base, in the order in which they are called.
        choice: Which slots the next forward pass uses; for a compiled pass a tensor of them; None for the base.
    """

    def __init__(self, layers: Mapping[str, torch.nn.Linear]) -> None:
        self.names = tuple(layers)
        self.choice: Choice | torch.Tensor | None = None
        first = next(iter(layers.values()))
        self._in_features = first.in_features
        self._out_features = tuple(layer.out_features for layer in layers.values())
        self._layer = first  # says device and dtype, which may change when the model moves
        self._rank = 0
        self._a: torch.Tensor | None = None  # (slots, layers x rank, in), each A beneath the one before
        self._b: list[torch.Tensor | None] = [None] * len(layers)  # (slots, rank, out) each
        self._last = len(layers) - 1
        self._picked: _Picked | None = None
        # What a layer that shares its input with none picked.
        self._alone: tuple[torch.Tensor, torch.Tensor] | None = None
        self._input: torch.Tensor | None = None  # what the changes below were computed for
        self._changes: tuple[_Change | None, ...] = ()

    def shape_of(self, position: int) -> tuple[int, int]:
        """(out_features, in_features) of a layer."""
        return self._out_features[position], self._in_features

    @property
    def bytes(self) -> int:
        """Device memory of the factors."""
        return sum(tensor.nbytes for tensor in (self._a, *self._b) if tensor is not None)

    def write(self, slot: int, pairs: _Pairs, *, slots: int) -> None:
        """Put one adapter's pairs into ``slot``; zeros where it has none, and below its rank."""
        own = [pairs.get(name) for name in self.names]
        rank = max((pair[0].shape[0] for pair in own if pair is not None), default=0)
        if self._a is None and rank == 0:
            return
        self._make_room(slots, max(rank, self._rank), [pair is not None for pair in own])
        if self._a is None:
            raise RuntimeError("the bank has no room")
        self._a[slot].zero_()
        for position, pair in enumerate(own):
            b = self._b[position]
            if b is not None:
                b[slot].zero_()
            if pair is not None and b is not None:
                start, r = position * self._rank, pair[0].shape[0]
                self._a[slot, start : start + r].copy_(pair[0])
                b[slot, :r].copy_(pair[1])

    def _make_room(self, slots: int, rank: int, wanted: list[bool]) -> None:
        """Larger tensors with what the old ones hold, where slots, ranks or layers are more than before."""
        options: dict[str, Any] = {"device": self._layer.weight.device, "dtype": _dtype_of(self._layer)}
        count, whole, bs = len(self.names), self._a, list(self._b)
        if whole is None or whole.shape[0] < slots or rank > self._rank:
            a = torch.zeros(slots, count, rank, self._in_features, **options)
            if whole is not None:
                held = whole.shape[0]
                a[:held, :, : self._rank] = whole.view(held, count, self._rank, self._in_features)
            whole = a.view(slots, count * rank, self._in_features)
        for position, out_features in enumerate(self._out_features):
            old = bs[position]
            if old is None and not wanted[position]:
                continue
            if old is None or old.shape[0] < slots or rank > self._rank:
                b = torch.zeros(slots, rank, out_features, **options)
                if old is not None:
                    b[: old.shape[0], : self._rank] = old
                bs[position] = b
        self._a, self._b, self._rank = whole, bs, rank  # at once: memory may run out before

    def choose(self, choice: Choice | None) -> None:
        """Which slots the next forward passes use; None for the base."""
        self.choice = choice
        self._picked = None if choice is None else choice.kept.get(id(self))
        self._set_alone()
        self._input, self._changes = None, ()

    def _set_alone(self) -> None:
        b = None if self._picked is None or self._last > 0 else self._picked[1][0]
        self._alone = None if self._picked is None or b is None else (self._picked[0], b)

    def add(self, position: int, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """``out`` with the rows' changes in it, in place.

        Args:
            position: Which of the layers.
            x: Its input.  # (B, T, in)
            out: The base's output.  # (B, T, out)
        """
        alone = self._alone
        if alone is not None:  # nothing to share: the short way
            return out.baddbmm_(torch.bmm(x, alone[0]), alone[1])
        if self._input is not x:
            choice = self.choice
            if self._a is None or choice is None:
                return out
            if not isinstance(choice, Choice):
                return self._add_indexed(position, x, out, choice)
            if isinstance(choice.rows, int):
                return self._add_one(position, x, out, choice.rows)
            self._input, self._changes = x, self._multiplied(x, choice)
        change = self._changes[position]
        if position == self._last:  # hold on to nothing
            self._input, self._changes = None, ()
        return out if change is None else out.baddbmm_(*change)

    def _add_indexed(self, position: int, x: torch.Tensor, out: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """The rows' slots are a tensor that stays in its place: nothing here depends on what it holds."""
        b = self._b[position]
        if self._a is None or b is None:
            return out
        a = self._a[:, position * self._rank : (position + 1) * self._rank].index_select(0, index)  # (B, r, in)
        return torch.baddbmm(out, torch.bmm(x, a.transpose(1, 2)), b.index_select(0, index))

    def _multiplied(self, x: torch.Tensor, choice: Choice) -> tuple[_Change | None, ...]:
        """The input times the rows' A's, all layers at once; for each layer with the B's to go on with."""
        if x.dim() != 3 or x.shape[0] != choice.count:
            raise _rows_lost(self.names[0], tuple(x.shape), choice.count)
        a, bs = self._pick(choice) if self._picked is None else self._picked
        product = torch.bmm(x, a)  # (B, T, layers x r)
        parts = (product,) if self._last == 0 else product.split(self._rank, dim=2)
        return tuple([None if b is None else (part, b) for part, b in zip(parts, bs, strict=True)])

    def _add_one(self, position: int, x: torch.Tensor, out: torch.Tensor, slot: int) -> torch.Tensor:
        """All rows use one slot: plain products, whatever the shape of ``x``."""
        a, b = self._a, self._b[position]
        if a is None or b is None:
            return out
        factor = a[slot, position * self._rank : (position + 1) * self._rank]
        return out.add_(torch.nn.functional.linear(x, factor) @ b[slot])

    def _pick(self, choice: Choice) -> _Picked:
        """The rows' own factors; kept for the next step while they are small."""
        if self._a is None:
            raise RuntimeError("the bank is empty")
        index = choice.index(self._a.device)
        a = self._a.index_select(0, index)
        bs = tuple(None if b is None else b.index_select(0, index) for b in self._b)
        picked = (a.transpose(1, 2), bs)
        size = a.nbytes + sum(b.nbytes for b in bs if b is not None)
        if choice.is_kept and choice.kept_bytes + size <= KEPT_BYTES:
            self._picked = choice.kept[id(self)] = picked
            self._set_alone()
            choice.kept_bytes += size
        return picked


class BankedLinear(torch.nn.Linear):
    """A linear layer of the base, with a seat in the bank."""

    seat: tuple[SharedInput, int]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = torch.nn.functional.linear(x, self.weight, self.bias)
        group, position = self.seat
        return out if group.choice is None else group.add(position, x, out)


class BankedLinear4bit(Linear4bit):
    """A 4-bit linear layer of the base, with a seat in the bank."""

    seat: tuple[SharedInput, int]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = super().forward(x)
        group, position = self.seat
        return out if group.choice is None else group.add(position, x, out)


def install(model: torch.nn.Module) -> dict[str, BankedLinear | BankedLinear4bit]:
    """Replace each linear layer of ``model`` by a banked one with the same parameters; by name.

    Raises:
        BaseModelError: A layer is linear in a way of its own.
    """
    layers: dict[str, BankedLinear | BankedLinear4bit] = {}
    kinds: dict[type, type[BankedLinear] | type[BankedLinear4bit]] = {
        torch.nn.Linear: BankedLinear,
        Linear4bit: BankedLinear4bit,
    }
    for name, module in list(model.named_modules()):
        if not isinstance(module, torch.nn.Linear):
            continue
        kind = kinds.get(type(module))
        if kind is None:
            raise BaseModelError(
                f"{name} is a {type(module).__name__}",
                expected="layers of torch or of bitsandbytes' 4 bits",
                fix="load the base in 4 bits, or unquantized",
            )
        banked = kind.__new__(kind)
        vars(banked).update(vars(module))  # the same parameters, states and settings, not copies
        model.set_submodule(name, banked)
        layers[name] = banked
    return layers


def _dtype_of(layer: torch.nn.Linear) -> torch.dtype:
    """What the layer computes in."""
    return layer.weight.quant_state.dtype if isinstance(layer, Linear4bit) else layer.weight.dtype


def _rows_lost(name: str, shape: tuple[int, ...], rows: int) -> BaseModelError:
    return BaseModelError(
        f"{name} gets an input of shape {shape} in a batch of {rows} rows",
        expected="rows as the first dimension, so that each can have its own adapter",
        fix="use one adapter at a time on this base",
    )
