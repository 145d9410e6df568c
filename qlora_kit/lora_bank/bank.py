"""The bank: for each linear layer of a base the factors of many adapters in slots, and which slot each row uses.

Slot 0 holds zeros and stands for the base. Layers with the same input (q, k and v; gate and up) share one product with
their stacked A's. A row's adapter is a number in an index, so that choosing costs the same for any number of layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from qlora_kit.errors import AdapterError
from qlora_kit.lora_bank.factors import LoraFactors
from qlora_kit.lora_bank.layers import Choice, SharedInput, install

if TYPE_CHECKING:
    import torch

BASE_SLOT = 0
_TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class LoraBank:
    """Slots for adapters beside each linear layer of one base."""

    def __init__(self, model: torch.nn.Module, *, slots: int) -> None:
        """Give every linear layer of ``model`` its place in the bank; parameters and their names stay.

        Args:
            model: A base without adapters.
            slots: How many adapters at most; memory is taken when adapters are written.
        """
        self.slots = slots
        self._kept: Choice | None = None
        self._index: torch.Tensor | None = None
        self._device = next(model.parameters()).device
        self._held = 1  # slots that have memory; the first is the base's
        shapes = install(model)
        self._groups = _grouped(shapes)
        self._place: dict[str, tuple[SharedInput, int]] = {}
        for group in self._groups:
            for position, name in enumerate(group.names):
                self._place[name] = (group, position)
                shapes[name].seat = (group, position)

    def write(self, slot: int, factors: LoraFactors) -> None:
        """Put an adapter into ``slot`` (1 to ``slots``) in place of what was there.

        Raises:
            AdapterError: It adapts a layer that the base lacks, or of another size.
        """
        if not 1 <= slot <= self.slots:
            raise ValueError(f"slot {slot} is not one of 1 to {self.slots}")
        import torch

        self._require_fit(factors)
        self._kept = None
        if slot >= self._held:
            self._held = min(self.slots + 1, max(2 * self._held, slot + 1))
        with torch.inference_mode(False), torch.no_grad():
            for group in self._groups:
                group.write(slot, factors.pairs, slots=self._held)

    def choose(self, rows: Sequence[int] | int | None, *, keep: bool = False) -> None:
        """Which slot the next forward passes use.

        Args:
            rows: One slot for each row of the batch; one number for all rows, however many; None for the base.
            keep: The same rows are likely to be chosen again: what the index picks is kept, while it is small.
        """
        if rows is not None and not isinstance(rows, int):
            rows = rows[0] if len(set(rows)) == 1 else tuple(rows)
        if rows is None or rows == BASE_SLOT:
            choice = None
        elif self._kept is not None and self._kept.rows == rows:
            choice = self._kept
        else:
            choice = Choice(rows, is_kept=keep)
            self._kept = choice if keep else self._kept
        for group in self._groups:
            group.choose(choice)

    def choose_by_index(self, rows: Sequence[int], *, places: int) -> None:
        """As ``choose``, by a tensor in one place, so that a compiled pass may be used again for other rows.

        Args:
            rows: One slot for each row.
            places: Rows of the pass; those behind ``rows`` get the base.
        """
        import torch

        self.choose(None)
        if not any(rows):
            return
        slots = torch.tensor([*rows, *[BASE_SLOT] * (places - len(rows))])
        if self._index is None or len(self._index) != places:
            self._index = slots.to(self._device)
        else:
            self._index.copy_(slots)
        for group in self._groups:
            group.choice = self._index

    @property
    def bytes(self) -> int:
        """Device memory of all slots."""
        return sum(group.bytes for group in self._groups)

    def _require_fit(self, factors: LoraFactors) -> None:
        for module, (a, b) in factors.pairs.items():
            place = self._place.get(module)
            found = (b.shape[1], a.shape[1])
            if place is None or place[0].shape_of(place[1]) != found:
                raise AdapterError(
                    f"{module} is adapted as {found}",
                    expected="a linear layer of the base, in its size",
                    fix="load the adapter on the base it was trained on",
                )


def _grouped(layers: Mapping[str, torch.nn.Linear]) -> list[SharedInput]:
    """The layers, those together that get the same input, in the order in which they are called."""
    groups = []
    done: set[str] = set()
    for name in layers:
        if name in done:
            continue
        parent, dot, child = name.rpartition(".")
        family = next((family for family in _TOGETHER if child in family), (child,))
        names = [f"{parent}{dot}{sibling}" for sibling in family]
        names = [sibling for sibling in names if sibling in layers]
        if len({layers[sibling].in_features for sibling in names}) > 1:
            names = [name]
        done.update(names)
        groups.append(SharedInput({sibling: layers[sibling] for sibling in names}))
    return groups
