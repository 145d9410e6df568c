"""The fused path of a model that is trained, put in and taken out between two passes."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import ExitStack
from typing import TYPE_CHECKING

import torch

from qlora_kit.fast import PIECES, FastHead, FastPath, Piece, fast_path

if TYPE_CHECKING:
    from peft import PeftModel

MEASURED_ON = ("cpu",)
"""Kinds of devices that docs/performance.md has figures of the fused path for; on others ``auto`` tries it first."""


def card_of(device: torch.device) -> str:
    """What a trial holds for: the name of the GPU, or the kind of another device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


class FastSwitch:
    """The fused path of one model, which is in use or not from one pass to the next.

    Attributes:
        undecided: Whether a trial is to find out if it is used, or the run that is resumed says so.
    """

    def __init__(self, model: PeftModel, *, undecided: bool = False, pieces: Collection[str] = PIECES) -> None:
        self.undecided = undecided
        self._model, self._pieces = model, pieces
        self._installed = ExitStack()
        self._path: FastPath | None = None

    @property
    def used(self) -> bool:
        """Whether it is in use."""
        return self._path is not None

    @property
    def head(self) -> FastHead | None:
        """What scores the labels; None for TRL's own."""
        return None if self._path is None else self._path.head

    @property
    def fuses(self) -> bool:
        """Whether it is in use and takes any part of the model."""
        return self._path is not None and any(piece.places for piece in self._path.pieces)

    @property
    def left(self) -> tuple[Piece, ...]:
        """The pieces that are in use nowhere, or not everywhere."""
        return () if self._path is None else tuple(piece for piece in self._path.pieces if piece.reason is not None)

    def use(self, wanted: bool) -> None:
        """Put it into the model, or take it out."""
        if wanted == self.used:
            return
        if wanted:
            self._path = self._installed.enter_context(fast_path(self._model, pieces=self._pieces))
        else:
            self._path = None
            self._installed.close()

    def tell(self) -> None:
        """Log what of the model takes it."""
        if self._path is not None:
            self._path.tell()
